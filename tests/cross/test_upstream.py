# SPDX-License-Identifier: MIT
"""llama.cpp's own tests on the patched tree."""

from __future__ import annotations

import subprocess

import pytest

from entrollm_gguf import runtime


def run(name: str, *arguments: str, seconds: int = 600) -> str:
    result = subprocess.run([runtime.tool(name), *arguments], capture_output=True, text=True, errors="replace", timeout=seconds)
    assert result.returncode == 0, (result.stdout + result.stderr)[-2000:]
    return result.stdout


def test_gguf():
    output = run("test-gguf")
    assert "FAIL" not in output


def test_quantize_fns():
    run("test-quantize-fns")


@pytest.mark.slow
def test_backend_ops_on_the_cpu():
    # the ops that meet weights, and those that copy; the whole run is part of the release check
    output = run("test-backend-ops", "test", "-b", "CPU", "-o", "MUL_MAT,MUL_MAT_ID,GET_ROWS,CPY,DUP,CONT")
    assert "backends passed" in output
