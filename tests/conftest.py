# SPDX-License-Identifier: MIT
"""Fixtures that several tests share: SmolLM2 from its package, and tiny random models of many
architectures."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

# ggml's threads wait for each other by spinning. Where two workers with two threads each share two
# cores, they spend most of the time so: test_every_way_to_load takes 25 s with it and 2 s without,
# on a busy machine. Read when an OpenMP library is loaded, ours or torch's.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

sys.path.insert(0, str(Path(__file__).parent))  # tests import `reference`, `models` and the like by name

from models import TinyModel, build_tiny_model

from entrollm_gguf import runtime
from entrollm_gguf.convert.pipeline import convert_model
from entrollm_gguf.eval.demo_model import build_hf_folder, english_text, fetch_gguf

# these take minutes each: with two workers they come first, or one worker would wait for the other
# at the end
_LONG = ("test_smollm2.py", "test_architectures.py", "test_host_kernels.py", "test_gpu_run.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; the order is kept otherwise."""
    items.sort(key=lambda item: _LONG.index(item.path.name) if item.path.name in _LONG else len(_LONG))


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator with a fixed seed."""
    return np.random.default_rng(20250502)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """English text for perplexity."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(english_text(), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def smollm2_hf() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder, kept in the cache between runs (transformers
    needs a minute to make it)."""
    folder = runtime.cache_folder() / "models" / "SmolLM2-135M-Instruct-hf-1"
    original = fetch_gguf(folder.parent)
    part = folder.with_name(folder.name + ".part")
    with FileLock(folder.with_name(folder.name + ".lock")):  # on a fresh machine both workers find the cache empty
        if not (folder / "tokenizer.json").is_file():
            shutil.rmtree(part, ignore_errors=True)
            build_hf_folder(original, part)
            part.replace(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, smollm2_hf):
    """Function: architecture name -> TinyModel with its Hugging Face folder. Each is built once."""
    built: dict[str, TinyModel] = {}

    def get(name: str) -> TinyModel:
        if name not in built:
            built[name] = build_tiny_model(name, tmp_path_factory.mktemp(name), smollm2_hf)
        return built[name]

    return get


@pytest.fixture(scope="session")
def converted(tmp_path_factory, tiny_model):
    """Function: (architecture, recipe) -> converted GGUF. Each is made once."""
    made: dict[tuple[str, str], Path] = {}

    def get(name: str, recipe: str) -> Path:
        if (name, recipe) not in made:
            out = tmp_path_factory.mktemp("gguf") / f"{name}-{recipe}.gguf"
            convert_model(tiny_model(name).folder, out, recipe=recipe)
            made[name, recipe] = out
        return made[name, recipe]

    return get
