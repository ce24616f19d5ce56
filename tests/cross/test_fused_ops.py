# SPDX-License-Identifier: MIT
"""MUL_MAT, MUL_MAT_ID and GET_ROWS on entropy-coded weights, at every kernel level, against numpy
and the reference decoder."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from fused_cases import Made, all_cases, make, scrambled, write
from reference import decoder
from running import levels, ops_program, refusal_of_level

from entrollm_gguf.codec import EntropyType

# relative to the sum of absolute products: f32 rounding of sums of up to 4096 products
BOUND = 2e-6
# of all results of a case, against products of the same int8 activations in f64
NMSE = 1e-12


@pytest.fixture(scope="module")
def made() -> list[Made]:
    generator = np.random.default_rng(20250502)
    return [make(case, generator) for case in all_cases()]


@pytest.fixture(scope="module")
def case_file(made, tmp_path_factory):
    path = tmp_path_factory.mktemp("ops") / "cases.gguf"
    write(path, made)
    return path


def weights_of(one: Made) -> np.ndarray:
    """What the document says that the payload means, f64 (n_slabs, n_rows, n_cols)."""
    n_slabs, n_rows, n_cols = one.codes.shape
    slabs = decoder.parse_tensor(one.payload.tobytes(), 1 if one.case.kind is EntropyType.EQ8 else 2, (n_cols, n_rows, n_slabs, 1))
    if one.codes.size > 40_000:  # the reference takes a minute for a million codes: the codes it would find are known, and tested elsewhere
        offset = 0 if one.offsets is None else one.offsets[:, :, None].astype(np.float64)
        return one.codes * one.scales[:, :, None].astype(np.float64) + offset
    return np.stack([decoder.decode_weights(slab) for slab in slabs]).astype(np.float64)


def run(case_file, level: str, *threads: int) -> tuple[str, np.ndarray]:
    out = case_file.with_name(f"{level}.f32")
    command = [*ops_program(), case_file, out, *map(str, threads)]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "GGML_ENTROPY_KERNEL": level}, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout, np.fromfile(out, np.float32)


@pytest.mark.parametrize("level", ["ref", "generic", "avx2-nopdep", "avx2", "avx512", "neon"])
def test_every_level_against_numpy(made, case_file, level):
    if level not in levels():
        pytest.skip(f"level {level} cannot run here")
    said, results = run(case_file, level, *((1, 2) if level == "ref" else (1, 2, 3, 4, 8)))
    assert said.startswith(f"kernel {level}, {len(made)} cases")
    at = 0
    for one in made:
        expected, size = one.expected(weights_of(one))
        got = results[at : at + expected.size].reshape(expected.shape).astype(np.float64)
        at += expected.size
        error = np.abs(got - expected) / np.maximum(size, 1e-30)
        assert error.max() <= BOUND, (str(one.case), error.max())
        if one.offsets is None:  # offsets can cancel most of a product, and then f32 cannot hold what is left to twelve digits
            assert ((got - expected) ** 2).sum() <= NMSE * (expected**2).sum(), str(one.case)
    assert at == results.size


def test_levels_are_as_they_should_be():
    """The list above is all there is, and a fast level is there where the processor can."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file() or "ENTROLLM_OPS_COMMAND" in os.environ:
        pytest.skip("what the processor can is not known here")
    text = cpuinfo.read_text()
    fast = all(re.search(rf"\b{flag}\b", text) for flag in ("avx2", "bmi1", "bmi2", "fma", "popcnt"))
    nopdep = fast
    # AMD before Zen 3 (family 25) has pdep in microcode
    family = re.search(r"cpu family\s*: (\d+)", text)
    fast = fast and "HygonGenuine" not in text and not ("AuthenticAMD" in text and int(family[1]) < 25)
    wide = fast and all(re.search(rf"\b{flag}\b", text) for flag in ("avx512f", "avx512bw"))
    special = {"avx512": wide, "avx2": fast, "avx2-nopdep": nopdep, "neon": platform.machine() == "aarch64"}
    assert levels() == [*(name for name, there in special.items() if there), "generic", "ref"]


def test_any_bits_mean_the_same_at_every_level(made, tmp_path):
    """Codes that no encoder wrote: tails run beyond their group, far streams run out
    (docs/format.md 6)."""
    cases = scrambled(made, np.random.default_rng(7))
    path = tmp_path / "scrambled.gguf"
    write(path, cases)
    ref = run(path, "ref", 1)[1]
    for level in levels():
        results = run(path, level, 1)[1]
        at = 0
        for one in cases:
            part = slice(at, at + one.n_results)
            at = part.stop
            if one.columns is None:  # nothing is summed, so these are the codes themselves
                assert np.array_equal(results[part], ref[part]), (level, str(one.case))
            else:
                assert np.abs(results[part] - ref[part]).max() <= 5e-7 * one.largest(), (level, str(one.case))
        assert at == ref.size


def test_any_bits_mean_what_the_document_says(made, tmp_path):
    """Random bodies against the reference decoder, code by code."""
    cases = [one for one in scrambled(made, np.random.default_rng(11)) if one.columns is None and one.codes.size < 40_000]
    path = tmp_path / "rows.gguf"
    write(path, cases)
    results = run(path, levels()[0], 1)[1]
    at = 0
    for one in cases:
        expected, _ = one.expected(weights_of(one))
        got = results[at : at + expected.size].reshape(expected.shape)
        at += expected.size
        # with offsets a processor may multiply and add in one step
        tolerance = 0 if one.offsets is None else 1e-6 * np.abs(expected).max()
        assert np.abs(got - expected).max() <= tolerance, str(one.case)


def test_the_best_level_is_the_default(case_file):
    environment = {key: value for key, value in os.environ.items() if key != "GGML_ENTROPY_KERNEL"}
    command = [*ops_program(), case_file, case_file.with_name("default.f32")]
    best = levels()[0]
    assert subprocess.run(command, capture_output=True, text=True, env=environment).stdout.startswith(f"kernel {best},")


def test_an_unknown_level_is_refused(case_file):
    """Here by a program that has no model loader: it stops where it first asks for the level."""
    environment = {**os.environ, "GGML_ENTROPY_KERNEL": "none", "GGML_NO_BACKTRACE": "1"}
    command = [*ops_program(), case_file, case_file.with_name("unknown.f32")]
    unknown = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert unknown.returncode != 0 and unknown.stdout == "" and refusal_of_level("none") in unknown.stderr
