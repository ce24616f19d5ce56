# SPDX-License-Identifier: MIT
"""The model card (README.md) and generation_config.json give a file its name, license, sampling
parameters and the like. No model needs these: what cannot be used is left out, with a warning."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from entrollm_gguf.errors import ConversionWarning
from entrollm_gguf.gguf_io.patched import import_gguf

_LOADERS = {"load_model_card": "README.md", "load_generation_config": "generation_config.json"}


@contextlib.contextmanager
def tolerant_metadata(folder: Path) -> Iterator[None]:
    """While the converter class of the model in `folder` writes metadata, these files raise no
    errors, and their entries get the types that GGUF asks for."""
    metadata = import_gguf().Metadata
    load, loaders = metadata.load, {name: getattr(metadata, name) for name in _LOADERS}

    def warn(path: Path, reason: Any) -> None:
        warnings.warn(f"{path}: {' '.join(str(reason).split())[:150]}; left out of the file's metadata", ConversionWarning, stacklevel=2)

    def tolerant(name: str) -> Callable[[Path], dict]:
        def load_one(model_path: Path) -> dict:
            try:
                found = loaders[name](model_path)
            except Exception as error:  # parsers of YAML, JSON and text
                warn(folder / _LOADERS[name], f"cannot be read ({error})")
                return {}
            return found if isinstance(found, dict) else {}

        return load_one

    def load_all(*arguments: Any) -> Any:
        try:
            found = load(*arguments)
        except Exception as error:  # it takes much for granted of what people write in model cards
            warn(folder / "README.md", f"entries of an unexpected kind ({error})")
            metadata.load_model_card = staticmethod(lambda _: {})
            found = load(*arguments)
        for name in _make_typed(found):
            warn(folder / "README.md", f"{name} is no such thing")
        return found

    try:
        for name in _LOADERS:
            setattr(metadata, name, staticmethod(tolerant(name)))
        metadata.load = staticmethod(load_all)
        yield
    finally:
        for name, original in {"load": load, **loaders}.items():
            setattr(metadata, name, staticmethod(original))


def _make_typed(metadata: Any) -> list[str]:
    """Give every field of gguf.Metadata its declared type, or None where that is impossible;
    returns the names of the latter."""
    casts = {
        "Optional[str]": _text,
        "Optional[int]": _integer,
        "Optional[float]": _number,
        "Optional[list[str]]": _texts,
        "Optional[list[dict]]": _entries,
    }
    unusable = []
    for field in dataclasses.fields(metadata):
        value = getattr(metadata, field.name)
        if value is not None:
            try:
                setattr(metadata, field.name, casts[field.type](value))
            except (TypeError, ValueError, OverflowError):
                setattr(metadata, field.name, None)
                unusable.append(field.name)
    return unusable


def _text(value: Any) -> str:
    if isinstance(value, list):  # several licenses
        return ",".join(_texts(value))
    if isinstance(value, bool):
        # YAML reads some words as truth values, such as the language code no: back to the word
        return "yes" if value else "no"
    if not isinstance(value, (str, int, float, datetime.date)):
        raise TypeError
    return str(value).encode("utf-8", "replace").decode()


def _integer(value: Any) -> int:
    if not -(2**31) <= int(value) < 2**31:
        raise ValueError
    return int(value)


def _number(value: Any) -> float:
    if not math.isfinite(float(value)) or abs(float(value)) > 3e38:
        raise ValueError
    return float(value)


def _texts(values: list) -> list[str]:
    return [_text(value) for value in values if value is not None]


def _entries(values: list) -> list[dict]:
    return [{str(key): _text(value) for key, value in entry.items() if value is not None} for entry in values if isinstance(entry, dict)]
