# SPDX-License-Identifier: MIT
"""All CUDA sources that are ours or patched compile, without warnings, and the inner loop is as
short as it was."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench" / "gpu"))

import instructions
import objects


def _missing() -> str | None:
    """Why CUDA sources are not compiled here, or None. In CI it is a warning as well, since nobody
    reads the list of skipped tests."""
    try:
        objects.nvcc()
    except objects.CompileError as error:
        if os.environ.get("CI"):
            warnings.warn(f"CUDA SOURCES ARE NOT COMPILED IN THIS RUN: {error}", stacklevel=2)
        return str(error)
    return None


MISSING = _missing()
needs_nvcc = pytest.mark.skipif(MISSING is not None, reason=f"CUDA sources are not compiled: {MISSING}")


@pytest.fixture(scope="module")
def compiled() -> list[objects.Object]:
    # the harness takes a minute for all of them; `make cuda-objects` compiles the rest
    return objects.compile_objects(programs_for=("90",))


@needs_nvcc
def test_every_architecture_compiles(compiled):
    expected = {(s, a) for s in ("entropy.cu", "ggml-cuda.cu") for a in objects.ARCHITECTURES} | {("harness.cu", "90")}
    assert {(one.source, one.architecture) for one in compiled} == expected
    assert all(one.path.stat().st_size > 10_000 for one in compiled)


@needs_nvcc
def test_instructions_per_weight(compiled):
    loops = objects.count(compiled)
    assert {loop.kernel for loop in loops} == {f"{kind} x {n}" for kind in ("EQ8", "EQ4") for n in range(1, 9)}
    assert not objects.over_budget(loops)
    # the least that a unit needs: three words and four look-ups for four symbols, a dot product for
    # four weights and for a look-up
    one = next(loop for loop in loops if loop.kernel == "EQ8 x 1")
    assert one.by_name["LDS"] >= 56 and one.by_name["IDP"] == 8 + 32
    longer = [instructions.Loop("EQ8 x 1", 400, 60, {})]
    assert len(objects.over_budget(longer)) == 1


def test_the_compiler_that_is_meant(monkeypatch, tmp_path):
    """CUDACXX wins over PATH, as in CMake; one that is not there is an error, not another
    compiler."""
    compiler = tmp_path / "nvcc"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDACXX", raising=False)
    assert objects.nvcc() == str(compiler)
    monkeypatch.setenv("CUDACXX", str(tmp_path / "absent"))
    with pytest.raises(objects.CompileError, match="absent is missing"):
        objects.nvcc()
    monkeypatch.setenv("CUDACXX", str(compiler))
    monkeypatch.setenv("PATH", "/nowhere")
    assert objects.nvcc() == str(compiler)
