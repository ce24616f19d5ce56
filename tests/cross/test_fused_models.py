# SPDX-License-Identifier: MIT
"""Whole models in fused mode: as close to the stock types as arithmetic allows, in every way to
load."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from models import ARCHITECTURES, HELD_OUT
from running import logits

from entrollm_gguf import runtime
from entrollm_gguf.inspect.decode import decode_file

# Without offsets the products are those of Q8_0 and Q4_0 in another order: 4e-15 measured on most
# of these models, 1e-4 where an activation is therefore rounded to the other side. With offsets
# activations are rounded to two terms of 8 bits where F16 rounds nothing. Q4_1 rounds them to one:
# 1e-3 is that type's own error, see the test below
BOUNDS = {"EQ8-rows": 5e-4, "EQ4-rows": 5e-4, "EQ8-paper": 5e-4, "EQ4-mixed": 5e-4, "EQ4-paper": 2e-3}


@pytest.mark.parametrize("recipe", BOUNDS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_fused_logits(converted, tmp_path, name, recipe):
    """The overlay's own test: fused against the decoded-back file without repacking, all load
    modes, `auto`."""
    check(converted(name, recipe), tmp_path, BOUNDS[recipe])


def has_avx2() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.is_file() and " avx2 " in cpuinfo.read_text()


@pytest.mark.skipif(not has_avx2(), reason="ggml's products for one column and for several (llamafile's) sum in one order with AVX2 only")
@pytest.mark.parametrize("recipe", ["EQ8-rows", "EQ4-rows"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_with_stock_products_logits_are_those_of_load_mode(converted, tmp_path, monkeypatch, name, recipe):
    """Bit by bit: nothing but the order of sums tells fused mode from the stock types."""
    monkeypatch.setenv("GGML_ENTROPY_PRODUCTS", "stock")
    check(converted(name, recipe), tmp_path, 0)


@pytest.mark.parametrize("recipe", ["EQ8-paper", "EQ4-paper"])
@pytest.mark.parametrize("name", ["mistral", "qwen2_moe"])
def test_stock_products_with_offsets(converted, tmp_path, monkeypatch, name, recipe):
    """F16 and Q4_1: ggml has several products of F16, which sum differently."""
    monkeypatch.setenv("GGML_ENTROPY_PRODUCTS", "stock")
    check(converted(name, recipe), tmp_path, 5e-4)


def test_four_bits_with_offsets_are_nearer_to_f32_than_q4_1_is(converted, tmp_path):
    coded, plain, exact = converted("mistral", "EQ4-paper"), tmp_path / "plain.gguf", tmp_path / "f32.gguf"
    assert set(decode_file(coded, plain).types) == {"Q4_1"}
    subprocess.run([runtime.tool("llama-quantize"), "--allow-requantize", plain, exact, "F32"], check=True, capture_output=True)
    expected = logits(exact)

    def error(found: np.ndarray) -> float:
        return float(((found - expected) ** 2).sum() / (expected**2).sum())

    fused, stock = error(logits(coded, kv_overrides={"entropy.mode": "fused"})), error(logits(plain))
    assert fused < 1e-5 < stock


@pytest.mark.parametrize("name", HELD_OUT)
def test_held_out_architectures(converted, tmp_path, name):
    """Architectures that nothing here was written for (docs/models.md)."""
    coded = converted(name, "EQ8-rows")
    check(coded, tmp_path, 5e-4)
    assert np.array_equal(logits(coded, kv_overrides={"entropy.mode": "load"}), logits(tmp_path / "plain.gguf"))
    check(converted(name, "EQ8-paper"), tmp_path, 5e-4)


def check(coded, folder, bound) -> None:
    plain = folder / "plain.gguf"
    decode_file(coded, plain, force=True)
    command = [runtime.tool("test-entropy-equal"), "--fused", coded, plain, str(bound)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-1000:]
    assert result.stdout.rstrip().endswith(" passed, 0 failed")
    assert re.search(r"NMSE of fused logits: \d", result.stdout)
