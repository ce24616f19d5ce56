# SPDX-License-Identifier: MIT
"""What can be converted: a model folder of Hugging Face, or a GGUF."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from entrollm_gguf.convert.checkpoint import check_checkpoint
from entrollm_gguf.convert.gguf_source import GgufSource, huggingface_folder
from entrollm_gguf.convert.llama_cpp import SourceModel
from entrollm_gguf.errors import ConversionError

Source = SourceModel | GgufSource


def check_source(path: Path) -> None:
    """Check that a model is complete, as far as that can be told without opening it.

    Raises:
        ConversionError: it is missing, or files of the folder are missing or damaged.
    """
    if not path.is_file():
        check_checkpoint(path)
    elif path.suffix != ".gguf":
        raise ConversionError(f"{path}: is no GGUF by its name; name a .gguf file, or the folder of a Hugging Face model")


def open_source(path: Path) -> Source:
    """The model.

    Args:
        path: a folder or a .gguf file.
    Raises:
        ConversionError, FormatError, UnsupportedModelError: see `SourceModel` and `GgufSource`.
    """
    return GgufSource(path) if path.is_file() else SourceModel(path)


@contextlib.contextmanager
def as_folder(path: Path, sample: str | None) -> Iterator[Path]:
    """A folder that transformers loads: the model's own, or one made of its GGUF.

    Args:
        sample: see `huggingface_folder`.
    Raises:
        ConversionError: transformers cannot load the GGUF, or reads its vocabulary otherwise.
    """
    if not path.is_file():
        yield path
        return
    with huggingface_folder(path, sample) as folder:
        yield folder
