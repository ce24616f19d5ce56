# SPDX-License-Identifier: MIT
"""The final bytes of one tensor, in an entropy-coded type or in a stock one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from entrollm_gguf.codec import EntropyType
from entrollm_gguf.convert.eligibility import can_be_q8_0
from entrollm_gguf.convert.encode import TensorRecord, Unquantizable, encode_tensor
from entrollm_gguf.convert.fold import Folding
from entrollm_gguf.convert.walk import Fate, Task
from entrollm_gguf.errors import ConversionError
from entrollm_gguf.gguf_io.patched import import_gguf
from entrollm_gguf.quant import Quantizer
from entrollm_gguf.quant.base import MAX_COARSE, map_chunks


@dataclass(frozen=True)
class Treatment:
    """What is done with a tensor if it can be entropy-coded."""

    kind: EntropyType
    quantizer: Quantizer
    workspace: int = 0  # memory that quantizing takes beside the weights, in f32 numbers
    exact: bool = False  # weights that cannot be coded stay as they are, to the bit


def code_tensor(
    task: Task, treatment: Treatment, folding: Folding, tile_cols: int | None, *, measure: bool = False
) -> tuple[np.ndarray, TensorRecord, int]:
    """Final bytes, record and ggml type of a tensor that is to be entropy-coded; in a stock type
    where its weights do not allow it.

    Args:
        task: its data is f16 or f32.
        folding: factors that are applied first.
        measure: tell the error in the record.
    Raises:
        ConversionError: NaN or infinite weights.
    """
    weights = folding.apply(task.name, task.data)
    try:
        payload, record = encode_tensor(
            task.name, weights, treatment.kind, treatment.quantizer, tile_cols=tile_cols, threads=task.threads, measure=measure
        )
    except Unquantizable as error:
        return keep(task.name, weights, str(error), task.threads, exact=treatment.exact)
    return payload, record, import_gguf().GGMLQuantizationType[record.type_name]


def leave_tensor(task: Task, folding: Folding, *, exact: bool = False) -> tuple[Any, TensorRecord, int]:
    """The same for a tensor that is not to be coded. One that is larger than memory stays what it
    is (gguf.LazyChunkedTensor).

    Args:
        exact: as for `keep`.
    Raises:
        ConversionError: NaN weights, or infinite ones where there may be none.
    """
    if task.decision.fate is Fate.IN_CHUNKS:
        return task.data, _chunked_record(task.name, task.data, task.raw_dtype), task.raw_dtype
    data = task.data
    if data.dtype in (np.float16, np.float32):
        data = folding.apply(task.name, data)
    if task.decision.fate is Fate.KEPT:
        return keep(task.name, data, task.decision.reason, task.threads, exact=exact)
    return _as_is(task.name, data, task.raw_dtype)


def _as_is(name: str, data: np.ndarray, raw_dtype: int | None) -> tuple[np.ndarray, TensorRecord, int]:
    """A tensor that upstream wrote in its final type."""
    gguf = import_gguf()
    types = gguf.GGMLQuantizationType
    ggml_type = raw_dtype if raw_dtype is not None else types[_NAMES_OF_DTYPES[data.dtype]]
    shape = tuple(data.shape)
    if data.dtype == np.uint8:
        shape = tuple(gguf.quant_shape_from_byte_shape(shape, ggml_type))
    elif data.dtype in (np.float32, np.float16):
        if np.isnan(data).any():
            raise ConversionError(f"tensor {name}: a weight is NaN; the checkpoint is damaged or its training diverged")
        # infinities are legal in masks and rope factors, but never where every activation passes
        if ("_norm" in name or name.endswith(".bias")) and np.isinf(data).any():
            raise ConversionError(f"tensor {name}: a weight is infinite; the checkpoint is damaged or its training diverged")
    data = np.ascontiguousarray(data)
    record = TensorRecord(name, types(ggml_type).name, shape, data.nbytes, "as llama.cpp writes it")
    return data.reshape(-1).view(np.uint8), record, ggml_type


_NAMES_OF_DTYPES = {
    np.dtype(np.float16): "F16",
    np.dtype(np.float32): "F32",
    np.dtype(np.float64): "F64",
    np.dtype(np.int8): "I8",
    np.dtype(np.int16): "I16",
    np.dtype(np.int32): "I32",
    np.dtype(np.int64): "I64",
}


def keep(name: str, data: np.ndarray, reason: str, threads: int | None = 1, *, exact: bool = False) -> tuple[np.ndarray, TensorRecord, int]:
    """A matrix that cannot be entropy-coded, in the smallest stock type that holds it: Q8_0 where
    llama-quantize would choose it, BF16 if that is exact, F16, else F32.

    Args:
        data: f16 or f32, any shape.
        reason: for the record.
        exact: no bit may be lost: BF16, F16 or F32.
    Returns:
        bytes (uint8), record and ggml type.
    Raises:
        ConversionError: NaN or infinite weights.
    """
    types = import_gguf().GGMLQuantizationType
    if not np.isfinite(data).all():
        raise ConversionError(f"tensor {name}: a weight is NaN or infinite; the checkpoint is damaged or its training diverged")
    shape = tuple(data.shape)
    rows = np.ascontiguousarray(data).reshape(math.prod(shape[:-1]), shape[-1])
    candidates = [(types.Q8_0, MAX_COARSE)] if can_be_q8_0(name, shape) and not exact else []
    candidates += [(types.BF16, 0), (types.F16, 0 if exact else MAX_COARSE)]
    if rows.size == 0:
        candidates = []
    for ggml_type, share in candidates:
        kept, n_lost = _as_type(rows, ggml_type, 0.0 if exact else _LOST_AT_MOST[ggml_type.name], threads)
        if n_lost <= share * len(rows):
            break
    else:
        ggml_type, kept, n_lost = types.F32, rows.astype(np.float32, copy=False), 0
    record = TensorRecord(name, ggml_type.name, shape, kept.nbytes, _kept_scheme(reason), coarse_rows=n_lost, kept=reason)
    return kept.reshape(-1).view(np.uint8), record, ggml_type


def _kept_scheme(reason: str) -> str:
    """What a file's metadata says of a matrix that is not coded."""
    return f"kept: {reason}"


def _chunked_record(name: str, table: Any, ggml_type: int) -> TensorRecord:
    gguf = import_gguf()
    shape = tuple(gguf.quant_shape_from_byte_shape(table.shape, ggml_type)) if table.dtype == np.uint8 else tuple(table.shape)
    reason = "read in chunks"
    return TensorRecord(name, gguf.GGMLQuantizationType(ggml_type).name, shape, table.nbytes, _kept_scheme(reason), kept=reason)


# Share of its energy that a row may lose. Q8_0 rounds by half a step at most, and a step is 1/127
# of the block's largest weight. Where the rest of the block is nearly zero, 32 such errors are
# 32 / 4 / 127^2 of the energy; a tenth more is for rounding the scale. F16: as much as BF16 would,
# 2^-9 of each weight.
_LOST_AT_MOST = {"Q8_0": 32 / 4 / 127**2 * 1.1, "BF16": 0.0, "F16": 2.0**-18}


def _as_type(rows: np.ndarray, ggml_type: Any, allowed: float, threads: int | None) -> tuple[np.ndarray, int]:
    """Rows in a stock type, uint8 (n_rows, row bytes), and how many of them lose more than they
    should.

    Args:
        rows: f16 or f32, shape (n_rows, n_cols), finite.
        allowed: share of its energy that a row may lose.
    """
    gguf = import_gguf()
    # not gguf.quants.quantize, which `SourceModel.each_tensor` replaces for a while on another
    # thread
    quantize = {"Q8_0": gguf.quants.Q8_0.quantize, "BF16": gguf.quants.BF16.quantize, "F16": lambda x: x.astype(np.float16)}[ggml_type.name]

    def part(s: slice) -> tuple[np.ndarray, int]:
        x = rows[s].astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            quantized = quantize(x)
            error = gguf.dequantize(quantized, ggml_type) - x
            lost, energy = (np.einsum("ij,ij->i", one, one, dtype=np.float64) for one in (error, x))
        # no infinities may come in, not even for rows that nobody uses
        return quantized.view(np.uint8), int(np.count_nonzero(lost > allowed * energy)) if np.isfinite(lost).all() else len(rows)

    parts = map_chunks(part, len(rows), threads, rows.shape[1])
    return np.concatenate([part for part, _ in parts]), sum(n_lost for _, n_lost in parts)
