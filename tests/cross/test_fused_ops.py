# SPDX-License-Identifier: MIT
"""MUL_MAT, MUL_MAT_ID and GET_ROWS on entropy-coded weights, at every kernel level, against numpy and the reference decoder."""

from __future__ import annotations

import os
import shlex
import subprocess

import numpy as np
import pytest
from fused_cases import Made, all_cases, make, write
from reference import decoder

from entrollm_gguf import runtime
from entrollm_gguf.codec import EntropyType

# relative to the sum of absolute products: f32 rounding of sums of up to 4096 products
BOUND = 2e-6


def program() -> list[str]:
    """The command that runs test-entropy-ops; ENTROLLM_OPS_COMMAND names another build of it (tests/neon/run.py)."""
    given = os.environ.get("ENTROLLM_OPS_COMMAND")
    return shlex.split(given) if given else [str(runtime.tool("test-entropy-ops"))]


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
    command = [*program(), case_file, out, *map(str, threads)]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "GGML_ENTROPY_KERNEL": level}, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout, np.fromfile(out, np.float32)


@pytest.mark.parametrize("level, threads", [("ref", (1, 2)), ("generic", (1, 2, 3, 4, 8))])
def test_every_level_against_numpy(made, case_file, level, threads):
    said, results = run(case_file, level, *threads)
    assert said.startswith(f"kernel {level}, {len(made)} cases")
    at = 0
    for one in made:
        expected, size = one.expected(weights_of(one))
        got = results[at : at + expected.size].reshape(expected.shape).astype(np.float64)
        at += expected.size
        error = np.abs(got - expected) / np.maximum(size, 1e-30)
        assert error.max() <= BOUND, (str(one.case), error.max())
    assert at == results.size


def test_the_best_level_is_the_default(case_file):
    environment = {key: value for key, value in os.environ.items() if key != "GGML_ENTROPY_KERNEL"}
    command = [*program(), case_file, case_file.with_name("default.f32")]
    assert subprocess.run(command, capture_output=True, text=True, env=environment).stdout.startswith("kernel generic")
    unknown = subprocess.run(command, capture_output=True, text=True, env={**environment, "GGML_ENTROPY_KERNEL": "none"})
    assert unknown.stdout.startswith("kernel generic") and "GGML_ENTROPY_KERNEL=none" in unknown.stderr
