# SPDX-License-Identifier: MIT
"""Whole models in fused mode: as close to the stock types as arithmetic allows, whatever the way to load."""

from __future__ import annotations

import re
import subprocess

import pytest
from models import ARCHITECTURES

from entrollm_gguf import runtime
from entrollm_gguf.inspect.decode import decode_file

# without offsets the sums are those of Q8_0 and Q4_0; with offsets activations are rounded to 8 bits where F16 rounds nothing
BOUNDS = {"EQ8-rows": 1e-8, "EQ4-rows": 1e-8, "EQ8-paper": 5e-4, "EQ4-mixed": 5e-4}


@pytest.mark.parametrize("recipe", BOUNDS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_fused_logits(converted, tmp_path, name, recipe):
    """The overlay's own test: fused against the decoded-back file without repacking, all load modes, `auto`, the switch."""
    coded, plain = converted(name, recipe), tmp_path / "plain.gguf"
    decode_file(coded, plain)
    command = [runtime.tool("test-entropy-equal"), coded, plain, str(BOUNDS[recipe])]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-1000:]
    assert result.stdout.rstrip().endswith(" passed, 0 failed")
    assert re.search(r"NMSE of fused logits: \d", result.stdout)
