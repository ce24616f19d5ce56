# SPDX-License-Identifier: MIT
"""Per tensor and in total: type, shape, size, bits per weight, entropy of the codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from entrollm_gguf import codec
from entrollm_gguf.gguf_io.reader import ModelFile, TensorEntry, open_model

Progress = Callable[[int, int, str], None]  # bytes done, bytes in all, name of the tensor


@dataclass(frozen=True)
class TensorReport:
    """A line of the report. The last four fields are None for stock types."""

    name: str
    type: str
    shape: tuple[int, ...]  # numpy order: rows before columns
    n_bytes: int
    bits_per_weight: float
    entropy: float | None  # bits per weight of an ideal memoryless coder of the same symbols
    tile_cols: int | None
    scheme: str | None  # the quantizer's choice, from the metadata
    decodes_to: str | None


@dataclass(frozen=True)
class FileReport:
    """What `entrollm inspect` shows."""

    path: str
    recipe: str | None
    n_bytes: int  # whole file, all parts
    n_weights: int
    bits_per_weight: float  # whole file
    coded_n_weights: int
    coded_bits_per_weight: float | None  # entropy-coded tensors, container included
    coded_entropy: float | None
    tensors: tuple[TensorReport, ...]


def inspect_file(path: str | Path, *, threads: int | None = None, progress: Progress | None = None) -> FileReport:
    """Read a GGUF and measure its entropy-coded tensors; decodes every one of them.

    Raises:
        FormatError: not a GGUF, or an invalid payload.
        RuntimeMissingError: the patched runtime is not installed.
    """
    model = open_model(Path(path))
    schemes = dict(zip(model.field("entrollm.tensor.names") or [], model.field("entrollm.tensor.schemes") or []))
    entries = list(model.tensors())
    total = sum(e.n_bytes for e in entries)
    done = 0
    reports = []
    for entry in entries:
        reports.append(_inspect_tensor(model, entry, schemes.get(entry.name), threads))
        done += entry.n_bytes
        if progress:
            progress(done, total, entry.name)

    coded = [(e, r) for e, r in zip(entries, reports) if r.entropy is not None]
    n_weights = sum(e.n_elements for e in entries)
    n_coded = sum(e.n_elements for e, _ in coded)
    return FileReport(
        path=str(path),
        recipe=model.field("entrollm.recipe"),
        n_bytes=model.n_bytes,
        n_weights=n_weights,
        bits_per_weight=model.n_bytes * 8 / n_weights if n_weights else 0.0,
        coded_n_weights=n_coded,
        coded_bits_per_weight=sum(e.n_bytes for e, _ in coded) * 8 / n_coded if n_coded else None,
        coded_entropy=sum(e.n_elements * r.entropy for e, r in coded) / n_coded if n_coded else None,
        tensors=tuple(reports),
    )


def _inspect_tensor(model: ModelFile, entry: TensorEntry, scheme: str | None, threads: int | None) -> TensorReport:
    bits = entry.n_bytes * 8 / entry.n_elements if entry.n_elements else 0.0
    if entry.kind is None:
        return TensorReport(entry.name, entry.type_name, entry.shape, entry.n_bytes, bits, None, None, None, None)
    name = f"{model.path}: tensor {entry.name}"
    header = codec.read_header(entry.kind, entry.data, entry.shape, name)
    codes = codec.decode(entry.kind, entry.data, entry.shape, name, threads)
    slabs = codes if codes.ndim == 3 else codes[None]
    entropy = sum(codec.entropy_bits(codec.count_symbols(entry.kind, slab, threads)) for slab in slabs)
    return TensorReport(
        entry.name, entry.type_name, entry.shape, entry.n_bytes, bits, entropy / entry.n_elements, header.tile_cols, scheme,
        header.plain_type,
    )  # fmt: skip
