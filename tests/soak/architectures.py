# SPDX-License-Identifier: MIT
"""Every architecture that upstream's test-llama-archs can make, tiny and of random weights: 128
models (`make test-archs`, a quarter of an hour).

Of each, two files: one in which every tensor is coded that can be, as a hostile one may, less what
the loader refuses by name; and one that the converter makes. Load mode gives exactly the logits of
the decoded file, fused mode nearly, and no process crashes.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import gguf
import numpy as np
import pytest
from handmade import recode
from running import Trial, outcomes

from entrollm_gguf import runtime
from entrollm_gguf.convert.pipeline import convert_model
from entrollm_gguf.inspect.decode import decode_file
from entrollm_gguf.runtime import tree
from entrollm_gguf.runtime.fetch import fetch_sdist
from entrollm_gguf.runtime.paths import patches_folder
from entrollm_gguf.runtime.pin import read_pin

LEAST = 120  # models that upstream's program makes
FUSED = 1e-3  # of the logits' squares; most are at 1e-14, those whose experts or blocks are chosen by a coded matrix are not


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    """Upstream's models, F32, by its own program."""
    folder, pin = tmp_path_factory.mktemp("archs"), read_pin()
    tree.assemble(tree.unpacked_source(fetch_sdist(pin), pin), patches_folder(), folder / "tree")
    source, program, libraries = folder / "tree" / tree.LLAMA_CPP, folder / "archs", runtime.library("llama").parent
    includes = [f"-I{source / part}" for part in ("src", "include", "common", "ggml/include", "ggml/src", "vendor")]
    linked = [f"-l{name}" for name in ("llama-common", "llama", "ggml-base", "ggml", "ggml-cpu")]
    command = ["g++", "-std=c++17", "-O1", "-w", *includes, source / "tests" / "test-llama-archs.cpp", "-o", program]
    subprocess.run([*command, f"-L{libraries}", *linked, f"-Wl,-rpath,{libraries}"], check=True)
    (folder / "models").mkdir()
    subprocess.run([program, "-o", folder / "models"], check=True, capture_output=True)
    made = sorted((folder / "models").glob("*.gguf"))
    assert len(made) >= LEAST
    return made


def nmse(found: np.ndarray, right: np.ndarray) -> float:
    return float(np.square(found - right).sum() / np.square(right).sum())


def kind(name: str) -> str:
    """A tensor's name without its layer."""
    return re.sub(r"\d+", "#", name)


def check(path: Path, folder: Path) -> None:
    decoded = folder / "decoded.gguf"
    decoded.unlink(missing_ok=True)
    decode_file(path, decoded)
    right, load, fused = outcomes([Trial(decoded), Trial(path, "load"), Trial(path, "fused")])
    assert (right.refusal, load.refusal, fused.refusal) == (None, None, None)
    assert np.array_equal(load.logits, right.logits) and nmse(fused.logits, right.logits) < FUSED


def test_whatever_is_coded(models, tmp_path):
    refused: set[str] = set()  # kinds, which mean the same in every architecture
    path, failed = tmp_path / "coded.gguf", {}
    for model in models:
        tensors = gguf.GGUFReader(model).tensors
        names = [t.name for t in tensors if t.tensor_type.name == "F32" and t.shape[0] % 32 == 0 and (len(t.shape) < 4 or t.shape[3] == 1)]
        try:
            while True:
                recode(model, path, tuple(name for name in names if kind(name) not in refused))
                (found,) = outcomes([Trial(path, "load")])
                if found.refusal is None:
                    break
                said = re.search(r"tensor '([^']+)' is entropy-coded", found.refusal)
                assert said and kind(said[1]) not in refused, found.refusal
                refused.add(kind(said[1]))
            check(path, tmp_path)
        except AssertionError as error:
            failed[model.name] = str(error)
    assert not failed
    print(f"{len(models)} models, refused: {sorted(refused)}")


def test_what_the_converter_makes(models, tmp_path):
    path, failed = tmp_path / "converted.gguf", {}
    for model in models:
        try:
            path.unlink(missing_ok=True)
            assert any(t.type_name == "EQ8" for t in convert_model(model, path, recipe="EQ8-rows").tensors)
            check(path, tmp_path)
        except Exception as error:
            failed[model.name] = str(error)
    assert not failed
