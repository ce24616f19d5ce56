# SPDX-License-Identifier: MIT
"""llama.cpp's own tests on the patched tree."""

from __future__ import annotations

import re
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


@pytest.mark.parametrize(
    "ops, cases",
    [
        ("GET_ROWS", ""),  # with ours
        ("MUL_MAT", "type_a=eq"),
        ("MUL_MAT_ID", "type_a=eq"),
        # the types that ours decode to; all cases of all types take a quarter of an hour
        ("MUL_MAT", r"type_a=(f16|q8_0|q4_0|q4_1),type_b=f32,m=16,n=(1|9),k=256"),
    ],
)
def test_backend_ops_on_the_cpu(ops, cases):
    output = run("test-backend-ops", "test", "-b", "CPU", "-o", ops, *(["-p", cases] if cases else []))
    assert "backends passed" in output and re.search(r"([1-9]\d*)/\1 tests passed", output)
