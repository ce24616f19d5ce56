# SPDX-License-Identifier: MIT
"""Checks before anything is converted: the files of a model folder are there, are whole, and hold
one save of the weights.

Only files that will be read are looked at. Which ones these are follows llama.cpp's converter: the
files that model.safetensors.index.json names, else all model*.safetensors, else the same of
pytorch_model*.bin.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from entrollm_gguf.errors import ConversionError

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_PART_NAME = re.compile(r"(?P<prefix>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.\w+)")
_SAVES = (("model", ".safetensors"), ("pytorch_model", ".bin"))

# Files that tokenizers are read from. Only its converter class knows which of them a model needs.
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "tekken.json", "chat_template.json",
    "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "merges.txt", "vocab.txt", "chat_template.jinja",
)  # fmt: skip


def check_checkpoint(folder: Path) -> None:
    """Check that a Hugging Face model folder is complete. Weights are not read.

    Raises:
        ConversionError: naming the file that is missing or damaged, or two files that hold the same
            tensor.
    """
    if not folder.is_dir():
        raise ConversionError(f"{folder}: no such folder; name the folder of a Hugging Face model")
    if not (folder / "config.json").is_file():
        raise ConversionError(f"{folder}: has no config.json; this is not a Hugging Face model folder")
    read_json(folder / "config.json")
    for name in _TOKENIZER_FILES:
        refuse_pointer(folder / name)
    named, files = _weight_files(folder)
    holders: dict[str, Path] = {}
    for path in files:
        for name in _tensor_names(path, alone=len(files) == 1):
            if name in holders:
                raise ConversionError(
                    f"{folder}: {holders[name].name} and {path.name} both hold {name}; these are two saves: take one of them away"
                )
            holders[name] = path
    if named and holders:
        _compare(folder, named, set(holders))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the checkpoint.

    Raises:
        ConversionError: it is damaged, or something else.
    """
    refuse_pointer(path)
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConversionError(f"{path}: no valid JSON ({' '.join(str(error).split())}); download it again") from error
    if not isinstance(found, dict):
        raise ConversionError(f"{path}: holds no JSON object; download it again")
    return found


def refuse_pointer(path: Path) -> None:
    """Refuse what git-lfs leaves in the place of a file that was not downloaded.

    Raises:
        ConversionError: the file is such a pointer.
    """
    if not path.is_file():
        return
    with open(path, "rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ConversionError(f"{path}: is a git-lfs pointer, not the file itself; run `git lfs pull` in {path.parent}")


def damaged_tokenizer_file(folder: Path) -> str | None:
    """What is wrong with the first JSON file of the tokenizer that is damaged; None if all are
    whole."""
    for name in _TOKENIZER_FILES:
        path = folder / name
        if path.suffix == ".json" and path.is_file():
            try:
                read_json(path)
            except ConversionError as error:
                return str(error)
    return None


def has_tokenizer(folder: Path) -> bool:
    """Whether there is any file that a vocabulary could come from."""
    return any(
        ("token" in path.name and path.suffix in (".json", ".model", ".tiktoken")) or "vocab" in path.name
        for path in folder.iterdir()
        if not path.name.endswith("_config.json")
    )


def n_tokens(folder: Path) -> int | None:
    """One more than the largest token id in tokenizer.json; None if there is no such file."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    tokenizer = read_json(path)
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
    return max([*ids, *(token["id"] for token in tokenizer.get("added_tokens", []))], default=-1) + 1


def _weight_files(folder: Path) -> tuple[dict[str, str], list[Path]]:
    """Tensor names with the file that the index gives for each, empty without an index; and the
    files.

    Raises:
        ConversionError: no weights, a missing part, or two saves.
    """
    for prefix, suffix in _SAVES:
        index = folder / f"{prefix}{suffix}.index.json"
        if index.is_file():
            named = read_json(index).get("weight_map")
            if not isinstance(named, dict) or not named or not all(isinstance(name, str) for name in named.values()):
                raise ConversionError(f"{index}: has no weight_map; download it again")
            files = [folder / name for name in sorted(set(named.values()))]
            for path in files:
                if not path.is_file():
                    raise ConversionError(f"{path}: is missing; {index.name} names it: download it")
            single = folder / f"{prefix}{suffix}"
            if single.is_file() and single not in files:  # llama.cpp's converter would read the one, transformers the other
                raise ConversionError(f"{folder}: {single.name} and the files that {index.name} names are two saves; take one of them away")
            return named, files
        files = sorted(path for path in folder.iterdir() if path.name.startswith(prefix) and path.name.endswith(suffix))
        for path in _other_parts(files):
            if not path.is_file():
                raise ConversionError(f"{path}: is missing; the other parts are there: download it")
        if files:
            return {}, files
    raise ConversionError(f"{folder}: holds no weights (model*.safetensors or pytorch_model*.bin); download them")


def _other_parts(files: list[Path]) -> Iterator[Path]:
    """All parts of the saves that some files are parts of, by their names."""
    for group in {(match["prefix"], int(match["count"]), match["suffix"]) for path in files if (match := _PART_NAME.fullmatch(path.name))}:
        prefix, count, suffix = group
        for number in range(1, count + 1):
            yield files[0].with_name(f"{prefix}-{number:05}-of-{count:05}{suffix}")


def _tensor_names(path: Path, alone: bool) -> list[str]:
    """Names in a file of weights, which is whole.

    Args:
        alone: there is no other file; then the names of pickled tensors are not needed.
    Raises:
        ConversionError: it is not.
    """
    refuse_pointer(path)
    if path.suffix == ".bin":
        return _pickled_names(path, alone)
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ConversionError(f"{path}: damaged or cut short ({error}); download it again") from error


def _pickled_names(path: Path, alone: bool) -> list[str]:
    if not zipfile.is_zipfile(path):
        raise ConversionError(
            f"{path}: damaged, cut short, or written by a PyTorch before 1.6; download it again, or save the model as safetensors"
        )
    if alone:
        return []
    import torch

    try:
        return list(torch.load(path, map_location="meta", mmap=True, weights_only=True))
    except Exception as error:  # unpickling raises nearly anything
        raise ConversionError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]}); download it again") from error


def _compare(folder: Path, named: dict[str, str], held: set[str]) -> None:
    """Raises ConversionError where an index and its files differ."""
    missing, more = sorted(named.keys() - held), sorted(held - named.keys())
    if missing:
        raise ConversionError(
            f"{folder / named[missing[0]]}: does not hold {missing[0]} ({len(missing)} in all), which the index gives it; download both again"
        )
    if more:
        raise ConversionError(
            f"{folder}: the files hold {more[0]} ({len(more)} in all), which the index does not name; they belong to two saves"
        )
