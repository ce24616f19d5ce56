# SPDX-License-Identifier: MIT
"""Model folders that are incomplete, or hold more than one save, are refused with a line that names
the file."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from entrollm_gguf.convert.checkpoint import check_checkpoint, n_tokens
from entrollm_gguf.errors import ConversionError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n"


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def save(path: Path, *names: str) -> None:
    save_file({name: np.zeros((2, 2), np.float32) for name in names}, path)


def index(folder: Path, weight_map: dict[str, str], name: str = "model.safetensors.index.json") -> None:
    (folder / name).write_text(json.dumps({"weight_map": weight_map}))


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(ConversionError, match=".*".join(map(re.escape, words))) as caught:
        check_checkpoint(folder)
    assert "\n" not in str(caught.value)


def test_whole_checkpoints(folder):
    save(folder / "model-00001-of-00002.safetensors", "a", "b")
    save(folder / "model-00002-of-00002.safetensors", "c")
    check_checkpoint(folder)
    index(
        folder, {"a": "model-00001-of-00002.safetensors", "b": "model-00001-of-00002.safetensors", "c": "model-00002-of-00002.safetensors"}
    )
    check_checkpoint(folder)


def test_what_nobody_reads_may_be_damaged(folder):
    save(folder / "model.safetensors", "a")
    (folder / "consolidated.safetensors").write_bytes(bytes(64))
    (folder / "adapter_model.safetensors").write_text(POINTER)
    (folder / "pytorch_model-00001-of-00002.bin").write_text(POINTER)
    (folder / "preprocessor_config.json").write_text(POINTER)
    check_checkpoint(folder)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_part_is_missing(folder, suffix):
    prefix = "model" if suffix == ".safetensors" else "pytorch_model"
    first = folder / f"{prefix}-00001-of-00003{suffix}"
    save(first, "a") if suffix == ".safetensors" else torch.save({"a": torch.zeros(2)}, first)
    refused(folder, f"{prefix}-00002-of-00003{suffix}: is missing", "download")
    index(folder, {"a": first.name, "b": "elsewhere" + suffix}, f"{prefix}{suffix}.index.json")
    refused(folder, f"elsewhere{suffix}: is missing", "index.json")


def test_no_weights(folder):
    refused(folder, str(folder), "holds no weights")


def test_two_saves(folder):
    save(folder / "model.safetensors", "a", "b")
    save(folder / "model-00001-of-00001.safetensors", "b", "c")
    refused(folder, "model-00001-of-00001.safetensors and model.safetensors both hold b", "take one of them away")
    index(folder, dict.fromkeys("bc", "model-00001-of-00001.safetensors"))
    refused(folder, "model.safetensors and the files that model.safetensors.index.json names are two saves")


def test_two_pickled_saves(folder):
    for name in ("pytorch_model.bin", "pytorch_model-00001-of-00001.bin"):
        torch.save({"a": torch.zeros(2)}, folder / name)
    refused(folder, "both hold a")


def test_several_files_of_different_tensors_are_one_save(folder):
    save(folder / "model.safetensors", "a")
    save(folder / "model-extra.safetensors", "b")
    check_checkpoint(folder)


def test_an_index_of_another_save(folder):
    save(folder / "model-1.safetensors", "a", "b")
    index(folder, {"a": "model-1.safetensors", "x": "model-1.safetensors"})
    refused(folder, "model-1.safetensors: does not hold x (1 in all)")
    index(folder, {"a": "model-1.safetensors"})
    refused(folder, "hold b (1 in all), which the index does not name")


@pytest.mark.parametrize("text", [POINTER, "", "{", "[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "\xff"])
def test_damaged_index(folder, text):
    save(folder / "model.safetensors", "a")
    (folder / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
    refused(folder, "model.safetensors.index.json: ", "git lfs pull" if text == POINTER else "download it again")


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer.model", "merges.txt", "chat_template.jinja", "model.safetensors"]
)
def test_pointers_of_git_lfs(folder, name):
    save(folder / "model.safetensors", "a")
    (folder / name).write_text(POINTER)
    refused(folder, name, "git-lfs pointer", "git lfs pull")


@pytest.mark.parametrize(
    "content, words", [(POINTER.encode(), "git lfs pull"), (b"PK\x03\x04 cut short", "download it again"), (b"", "download it again")]
)
def test_damaged_pickles(folder, content, words):
    (folder / "pytorch_model.bin").write_bytes(content)
    refused(folder, "pytorch_model.bin", words)


def test_tokens_are_counted(folder):
    assert n_tokens(folder) is None
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 7}}, "added_tokens": [{"id": 3}]}))
    assert n_tokens(folder) == 8
    tokenizer.write_text(json.dumps({"model": {"vocab": [["a", -1.0], ["b", -2.0]]}, "added_tokens": [{"id": 9}]}))
    assert n_tokens(folder) == 10
