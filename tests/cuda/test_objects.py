# SPDX-License-Identifier: MIT
"""All CUDA sources that are ours or patched compile, without warnings, and the inner loop is as short as it was."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench" / "gpu"))

import instructions
import objects

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on this machine: CUDA sources are not compiled")


@pytest.fixture(scope="module")
def compiled() -> list[objects.Object]:
    return objects.compile_objects()


def test_every_architecture_compiles(compiled):
    assert {(one.source, one.architecture) for one in compiled} == {(s, a) for s in objects.SOURCES for a in objects.ARCHITECTURES}
    assert all(one.path.stat().st_size > 10_000 for one in compiled)


def test_instructions_per_weight(compiled):
    loops = objects.count(compiled)
    assert {loop.kernel for loop in loops} == {f"{kind} x {n}" for kind in ("EQ8", "EQ4") for n in range(1, 9)}
    assert not objects.over_budget(loops)
    # what a unit cannot do without: three words and four look-ups for four symbols, a dot product for four weights and for a look-up
    one = next(loop for loop in loops if loop.kernel == "EQ8 x 1")
    assert one.by_name["LDS"] >= 56 and one.by_name["IDP"] == 8 + 32
    longer = [instructions.Loop("EQ8 x 1", 400, 60, {})]
    assert len(objects.over_budget(longer)) == 1
