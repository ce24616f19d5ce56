# SPDX-License-Identifier: MIT
"""Kernel level neon against ref: natively on aarch64, elsewhere cross-compiled and under qemu-user
(Debian: g++-aarch64-linux-gnu, qemu-user)."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "cuda"))

from host import patched_tree  # noqa: E402


@pytest.mark.parametrize("target", ["armv8.2-a+dotprod", "armv8-a"])
def test_codes_and_products(tmp_path, target):
    """Some eight hundred random codes, streams and blocks of columns; the program says what
    differs."""
    native = platform.machine() in ("aarch64", "arm64")
    compiler, runner = ("g++", []) if native else ("aarch64-linux-gnu-g++", ["qemu-aarch64"])
    if any(shutil.which(program) is None for program in (compiler, *runner)):
        pytest.skip("no way to compile and run programs of aarch64 (apt-get install g++-aarch64-linux-gnu qemu-user)")
    info = Path("/proc/cpuinfo")
    if native and "dotprod" in target and info.is_file() and "asimddp" not in info.read_text():
        pytest.skip("this processor has no dot products")
    ggml = patched_tree(tmp_path) / "ggml"
    kernels = ggml / "src" / "ggml-cpu" / "entropy"
    command = [
        compiler,
        "-std=c++17",
        "-O1",
        f"-march={target}",
        *([] if native else ["-static"]),
        f"-I{ggml / 'include'}",
        f"-I{ggml / 'src'}",
        f"-I{ROOT / 'tests'}",
        str(ROOT / "tests" / "neon" / "neon.cpp"),
    ]
    built = subprocess.run(
        [*command, str(kernels / "entropy-kernel-ref.cpp"), "-o", str(tmp_path / "neon")], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr[-2000:]
    said = subprocess.run([*runner, tmp_path / "neon"], capture_output=True, text=True).stdout
    assert said.splitlines()[-1].endswith(" checks, 0 wrong"), said
