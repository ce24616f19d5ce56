# SPDX-License-Identifier: MIT
"""An entropy-coded file back to a plain GGUF that stock llama.cpp runs: its weights in the stock
types that hold them best."""

from __future__ import annotations

import functools
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from entrollm_gguf import codec
from entrollm_gguf.errors import ConversionError, FormatError
from entrollm_gguf.gguf_io.metadata import copy_metadata
from entrollm_gguf.gguf_io.output import StreamedTensor, atomic_output, check_output
from entrollm_gguf.gguf_io.patched import import_gguf
from entrollm_gguf.gguf_io.reader import ModelFile, TensorEntry, open_model
from entrollm_gguf.progress import Progress

_FILE_TYPES = {name: f"MOSTLY_{name}" for name in ("Q8_0", "F16", "Q4_0", "Q4_1", "BF16")}


@dataclass(frozen=True)
class DecodeReport:
    """What decoding made."""

    path: str
    file_bytes: int
    types: dict[str, int]  # stock type -> number of tensors that were decoded to it
    seconds: float


def decode_file(
    in_path: str | Path,
    out_path: str | Path,
    *,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> DecodeReport:
    """Write the plain GGUF of an entropy-coded one (docs/format.md 6.1). Tensors of stock types are
    copied.

    Raises:
        FormatError: an invalid input, or weights that the stock type does not hold.
        ConversionError: input and output are the same file, nothing to decode, a full disk.
        OutputExistsError: the output exists and `force` is not given.
        RuntimeMissingError: the patched runtime is not installed.

    >>> from entrollm_gguf import decode_file
    >>> decode_file("model.gguf", "stock.gguf").types
    {'Q8_0': 16}
    """
    started = time.monotonic()
    source, out = Path(in_path), Path(out_path)
    check_output(out, force)
    model = open_model(source)
    if any(out.resolve() == path.resolve() for path in model.paths):
        raise ConversionError(f"{out}: input and output are the same file")
    architecture = model.text("general.architecture")
    if architecture is None:
        raise FormatError(f"{source}: names no general.architecture, so that nothing can load it; download or convert it again")
    entries = list(model.tensors())
    plain_types = {e.name: _plain_type(model, e) for e in entries if e.kind is not None}
    if not plain_types:
        raise ConversionError(f"{source}: has no entropy-coded tensors; nothing to decode")

    gguf = import_gguf()
    with atomic_output(out, force) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture)
        copy_metadata(model, writer)
        most_common = Counter(plain_types.values()).most_common(1)[0][0]
        writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[most_common]])
        state = _Written(sum(e.n_bytes for e in entries), progress)
        for entry in entries:
            _declare(writer, model, entry, plain_types.get(entry.name), threads, state)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file(progress=False)
        writer.close()
        size = temporary.stat().st_size
    return DecodeReport(str(out), size, dict(Counter(plain_types.values())), time.monotonic() - started)


class _Written:
    """Progress of the writing, in bytes of the input."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.done = 0
        self._total = total
        self._progress = progress

    def add(self, entry: TensorEntry) -> None:
        self.done += entry.n_bytes
        if self._progress:
            self._progress(self.done, self._total, entry.name, "bytes")


def _plain_type(model: ModelFile, entry: TensorEntry) -> str:
    payload = codec.Payload(entry.kind, entry.data, entry.shape, entry.name, label=f"{model.path}: tensor {entry.name}")
    payload.check_plain()
    return payload.header.plain_type


def _declare(writer, model: ModelFile, entry: TensorEntry, plain: str | None, threads: int | None, state: _Written) -> None:
    """Tell the writer shape, type and size; the bytes are made when it writes them, so that one
    tensor is in memory at a time."""
    gguf = import_gguf()
    types = gguf.GGMLQuantizationType
    data = entry.data
    if plain is None:

        def copy(file) -> None:
            file.write(data)  # numpy's tofile would not say why it failed
            state.add(entry)

        tensor = StreamedTensor(data.shape, data.dtype, data.nbytes, copy)
        writer.add_tensor(entry.name, tensor, raw_dtype=entry.reader_tensor.tensor_type)
        return

    def decode(file, name: str) -> None:
        _, rows = codec.Payload(entry.kind, data, entry.shape, name).plain(threads)
        file.write(rows)
        state.add(entry)

    byte_shape = gguf.quant_shape_to_byte_shape(entry.shape, types[plain])
    n_bytes = functools.reduce(lambda a, b: a * b, byte_shape, 1)
    write = functools.partial(decode, name=f"{model.path}: tensor {entry.name}")
    # an F16 tensor is declared by its bytes as well: dtype uint8 makes the writer divide by the
    # type's size
    writer.add_tensor(entry.name, StreamedTensor(byte_shape, np.dtype(np.uint8), n_bytes, write), raw_dtype=types[plain])
