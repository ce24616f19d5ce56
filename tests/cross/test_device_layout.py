# SPDX-License-Identifier: MIT
"""Models whose tensors go to a device that reads the device layout: a stand-in for a GPU, that
computes on the CPU."""

from __future__ import annotations

import subprocess

import pytest

from entrollm_gguf import runtime
from entrollm_gguf.inspect.decode import decode_file


@pytest.mark.parametrize(
    ("name", "recipe"), [("llama", "EQ8-rows"), ("mistral", "EQ4-rows"), ("qwen2", "EQ8-paper"), ("qwen2_moe", "EQ4-mixed")]
)
def test_a_device_with_memory_of_its_own(converted, tmp_path, name, recipe):
    """The overlay's own test: all modes and ways to load, a part of the layers on the CPU, headers
    that promise another size."""
    coded, plain = converted(name, recipe), tmp_path / "plain.gguf"
    decode_file(coded, plain)
    command = [runtime.tool("test-entropy-device"), coded, plain, tmp_path / "scratch.gguf"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-1000:]
    assert result.stdout.rstrip().endswith(" passed, 0 failed")
