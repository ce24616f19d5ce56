# SPDX-License-Identifier: MIT
"""Per tensor and in total: type, shape, size, bits per weight, entropy of the codes, how their code
is built."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from entrollm_gguf import codec
from entrollm_gguf.codec import Payload
from entrollm_gguf.gguf_io.reader import ModelFile, TensorEntry, open_model
from entrollm_gguf.progress import Progress


@dataclass(frozen=True)
class TensorReport:
    """A line of the report. The fields from `entropy` on are None for stock types; for a stack they
    are means over its matrices."""

    name: str
    type: str
    shape: tuple[int, ...]  # numpy order: rows before columns
    n_bytes: int
    bits_per_weight: float
    entropy: float | None = None  # bits per weight of an ideal memoryless coder of the same codes, and those stored beside them
    raw_bits: float | None = None  # bits that every weight has; weights without a tail have no others
    tail_planes: float | None = None  # bits of the longest tail, which are bit planes in the file
    tail_percent: float | None = None  # weights that have a tail, far ones included
    far_percent: float | None = None  # weights that end in a byte of their own, since they lie far outside
    device_bytes: int | None = None  # in the layout that GPUs read
    tile_cols: int | None = None  # columns of a tile of that layout
    scheme: str | None = None  # the quantizer's choice, from the metadata
    decodes_to: str | None = None


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
    coded_bytes: int  # of the entropy-coded tensors in the file
    coded_device_bytes: int  # of the same in the layout that GPUs read
    tensors: tuple[TensorReport, ...]


def inspect_file(path: str | Path, *, threads: int | None = None, progress: Progress | None = None) -> FileReport:
    """Read a GGUF and measure its entropy-coded tensors; decodes every one of them.

    Raises:
        FormatError: not a GGUF, or an invalid payload.
        RuntimeMissingError: the patched runtime is not installed.

    >>> from entrollm_gguf import inspect_file
    >>> report = inspect_file("model.gguf")
    >>> report.recipe, report.n_weights, report.coded_n_weights
    ('EQ8-rows', 317664, 317184)
    >>> 7.5 < report.coded_bits_per_weight < 8
    True
    """
    model = open_model(Path(path))
    schemes = dict(zip(model.texts("entrollm.tensor.names"), model.texts("entrollm.tensor.schemes")))
    entries = list(model.tensors())
    total = sum(e.n_bytes for e in entries)
    done = 0
    reports = []
    for entry in entries:
        reports.append(_inspect_tensor(model, entry, schemes.get(entry.name), threads))
        done += entry.n_bytes
        if progress:
            progress(done, total, entry.name, "bytes")

    coded = [(e, r) for e, r in zip(entries, reports) if r.entropy is not None]
    n_weights = sum(e.n_elements for e in entries)
    n_coded = sum(e.n_elements for e, _ in coded)
    coded_bytes = sum(e.n_bytes for e, _ in coded)
    return FileReport(
        path=str(path),
        recipe=model.text("entrollm.recipe"),
        n_bytes=model.n_bytes,
        n_weights=n_weights,
        bits_per_weight=model.n_bytes * 8 / n_weights if n_weights else 0.0,
        coded_n_weights=n_coded,
        coded_bits_per_weight=coded_bytes * 8 / n_coded if n_coded else None,
        coded_entropy=sum(e.n_elements * r.entropy for e, r in coded) / n_coded if n_coded else None,
        coded_bytes=coded_bytes,
        coded_device_bytes=sum(r.device_bytes or 0 for _, r in coded),
        tensors=tuple(reports),
    )


def _inspect_tensor(model: ModelFile, entry: TensorEntry, scheme: str | None, threads: int | None) -> TensorReport:
    bits = entry.n_bytes * 8 / entry.n_elements if entry.n_elements else 0.0
    if entry.kind is None:
        return TensorReport(entry.name, entry.type_name, entry.shape, entry.n_bytes, bits)
    payload = Payload(entry.kind, entry.data, entry.shape, entry.name, label=f"{model.path}: tensor {entry.name}")
    header, of_slabs = payload.header, payload.code_parameters()
    counts = payload.counts(threads)
    used = [code.usage(one) for code, one in zip(of_slabs, counts)]
    far = sum(one.far for one in used)
    return TensorReport(
        entry.name,
        entry.type_name,
        entry.shape,
        entry.n_bytes,
        bits,
        entropy=sum(map(codec.entropy_bits, counts)) / entry.n_elements + entry.kind.rest_bits,
        raw_bits=sum(code.raw_bits for code in of_slabs) / len(of_slabs),
        tail_planes=sum(code.n_planes for code in of_slabs) / len(of_slabs),
        tail_percent=(sum(one.tail for one in used) + far) / entry.n_elements * 100,
        far_percent=far / entry.n_elements * 100,
        device_bytes=header.device_bytes,
        tile_cols=header.tile_cols,
        scheme=scheme,
        decodes_to=header.plain_type,
    )
