# SPDX-License-Identifier: MIT
"""GGUF files seen as tensors with true shapes, entropy-coded ones included; split files are read as
one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from entrollm_gguf.codec import EntropyType
from entrollm_gguf.errors import FormatError
from entrollm_gguf.gguf_io.patched import import_gguf

if TYPE_CHECKING:
    import gguf

_SPLIT_NAME = re.compile(r"^(?P<prefix>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file."""

    name: str
    type_name: str  # "EQ8", "F32", "Q8_0", ...
    shape: tuple[int, ...]  # true shape in numpy order: (n_cols,), (n_rows, n_cols), (n_slabs, n_rows, n_cols), ...
    data: np.ndarray  # memory map; uint8 of shape (n_bytes,) for entropy-coded tensors
    reader_tensor: gguf.ReaderTensor

    @property
    def kind(self) -> EntropyType | None:
        """The entropy-coded type, or None for a stock one."""
        return EntropyType[self.type_name] if self.type_name in EntropyType.__members__ else None

    @property
    def n_bytes(self) -> int:
        """Bytes in the file."""
        return int(self.reader_tensor.n_bytes)

    @property
    def n_elements(self) -> int:
        """Number of weights."""
        return int(self.reader_tensor.n_elements)


@dataclass(frozen=True)
class ModelFile:
    """An open GGUF, or all parts of a split one; the first part carries the metadata."""

    paths: tuple[Path, ...]
    readers: tuple[gguf.GGUFReader, ...]

    @property
    def path(self) -> Path:
        """The file that was named: the first part of a split file."""
        return self.paths[0]

    @property
    def n_bytes(self) -> int:
        """Size on disk."""
        return sum(path.stat().st_size for path in self.paths)

    def field(self, key: str):
        """Value of a metadata key, or None."""
        field = self.readers[0].get_field(key)
        return None if field is None else field.contents()

    def text(self, key: str) -> str | None:
        """Value of a key that holds a string; None where it is missing or holds anything else."""
        value = self.field(key)
        return value if isinstance(value, str) else None

    def texts(self, key: str) -> list[str]:
        """Value of a key that holds an array of strings; empty where it is missing or holds
        anything else."""
        value = self.field(key)
        return value if isinstance(value, list) and all(isinstance(v, str) for v in value) else []

    def tensors(self) -> Iterator[TensorEntry]:
        """All tensors in file order."""
        for reader in self.readers:
            for tensor in reader.tensors:
                yield TensorEntry(tensor.name, tensor.tensor_type.name, _shape(tensor), tensor.data, tensor)


def _shape(tensor: gguf.ReaderTensor) -> tuple[int, ...]:
    """Shape without the ones at the end: ggml always has four dimensions, so these say nothing. A
    matrix of a single row stays a matrix."""
    dims = [int(n) for n in tensor.shape] or [1]
    while len(dims) > 2 and dims[-1] == 1:
        dims.pop()
    return tuple(reversed(dims))


def open_model(path: Path) -> ModelFile:
    """Open a GGUF file, or the first part of a split one with all the others.

    Raises:
        FormatError: missing, truncated, not a GGUF, big-endian with entropy-coded tensors, or a
            part that is missing.
        RuntimeMissingError: the patched runtime is not installed.

    >>> model = open_model(Path("model.gguf"))
    >>> model.text("general.architecture"), model.text("entrollm.recipe")
    ('llama', 'EQ8-rows')
    >>> entry = next(entry for entry in model.tensors() if entry.name == "blk.0.ffn_up.weight")
    >>> entry.type_name, entry.shape, entry.data.dtype
    ('EQ8', (224, 96), dtype('uint8'))
    """
    path = Path(path)
    first = _open_one(path)
    n_parts = _count_parts(path, first)
    if n_parts <= 1:
        return ModelFile((path,), (first,))
    match = _SPLIT_NAME.match(path.name)
    if not match or int(match["number"]) != 1 or int(match["count"]) != n_parts:
        raise FormatError(f"{path}: part of a split file; name the first part (...-00001-of-{n_parts:05}.gguf)")
    paths = [path.with_name(f"{match['prefix']}-{i:05}-of-{n_parts:05}.gguf") for i in range(1, n_parts + 1)]
    readers = (first, *(_open_one(part) for part in paths[1:]))
    _check_parts(paths, readers)
    return ModelFile(tuple(paths), readers)


def _check_parts(paths: list[Path], readers: tuple[gguf.GGUFReader, ...]) -> None:
    """Raises FormatError where a part is another one than its name says, or parts of several files
    came together."""
    names: dict[str, Path] = {}
    for i, (path, reader) in enumerate(zip(paths, readers)):
        for key, wanted in (("split.no", i), ("split.count", len(paths))):
            field = reader.get_field(key)
            if field is None or field.contents() != wanted:
                found = "nothing" if field is None else repr(field.contents())
                raise FormatError(f"{path}: is another part than its name says ({key} is {found}, not {wanted}); download it again")
        for tensor in reader.tensors:
            if tensor.name in names:
                raise FormatError(f"{path}: holds {tensor.name!r}, as {names[tensor.name].name} does; these parts do not belong together")
            names[tensor.name] = path
    total = readers[0].get_field("split.tensors.count")
    if total is not None and total.contents() != len(names):
        raise FormatError(f"{paths[0]}: says {total.contents()!r} tensors, the parts hold {len(names)}; these parts do not belong together")


def _count_parts(path: Path, first: gguf.GGUFReader) -> int:
    field = first.get_field("split.count")
    count = 0 if field is None else field.contents()
    if type(count) is not int:
        raise FormatError(f"{path}: its split.count is no whole number; download or convert it again")
    return count


def _open_one(path: Path) -> gguf.GGUFReader:
    gguf = import_gguf()
    if not path.is_file():
        raise FormatError(f"{path}: no such file")
    try:
        reader = gguf.GGUFReader(path, "r")
    except gguf.entropy.OldVersionError as error:
        raise FormatError(f"{path}: {error}") from error
    except Exception as error:  # the reader indexes into a memory map: a hostile file can raise nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FormatError(f"{path}: not a complete GGUF file ({reason}); download or convert it again") from error
    if reader.endianess == gguf.GGUFEndian.BIG and any(t.tensor_type.name in EntropyType.__members__ for t in reader.tensors):
        raise FormatError(f"{path}: big-endian files cannot hold entropy-coded tensors; convert the model on this machine")
    return reader
