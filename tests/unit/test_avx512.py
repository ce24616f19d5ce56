# SPDX-License-Identifier: MIT
"""Kernel level avx512 against ref, natively where the processor has it, else over SIMDe's emulation
(Debian: libsimde-dev), which needs AVX2 and BMI2."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "cuda"))

from host import patched_tree  # noqa: E402


def _flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    line = next((line for line in info.read_text().splitlines() if line.startswith("flags")), "") if info.is_file() else ""
    return set(line.split())


@pytest.mark.skipif(platform.machine() != "x86_64", reason="a kernel of x86-64")
def test_codes_and_products(tmp_path):
    """About a thousand random codes, streams and blocks of columns; the program says what
    differs."""
    flags = _flags()
    if {"avx512f", "avx512bw", "avx512_vnni"} <= flags:
        options = []
    elif not Path("/usr/include/simde/x86/avx512.h").is_file():
        pytest.skip("no AVX-512 here, and no emulation (apt-get install libsimde-dev)")
    elif not {"avx2", "bmi2"} <= flags:
        pytest.skip("neither AVX-512 nor AVX2 and BMI2 here")
    else:
        options = ["-DEMULATED", "-mavx2", "-mfma", "-mbmi", "-mbmi2", "-mpopcnt"]
    ggml = patched_tree(tmp_path) / "ggml"
    kernels = ggml / "src" / "ggml-cpu" / "entropy"
    command = [
        "g++",
        "-std=c++17",
        "-O1",
        *options,
        f"-I{ggml / 'include'}",
        f"-I{ggml / 'src'}",
        f"-I{ROOT / 'tests'}",
        str(ROOT / "tests" / "avx512" / "avx512.cpp"),
    ]
    built = subprocess.run(
        [*command, str(kernels / "entropy-kernel-ref.cpp"), "-o", str(tmp_path / "avx512")], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr[-2000:]
    said = subprocess.run([tmp_path / "avx512"], capture_output=True, text=True).stdout
    assert said.splitlines()[-1].endswith(" checks, 0 wrong"), said
