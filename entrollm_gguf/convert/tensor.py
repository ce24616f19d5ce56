# SPDX-License-Identifier: MIT
"""The final bytes of one tensor, in an entropy-coded type or in a stock one."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np

from entrollm_gguf.codec import EntropyType
from entrollm_gguf.convert.eligibility import reason_to_keep
from entrollm_gguf.convert.encode import TensorRecord, Unquantizable, encode_tensor
from entrollm_gguf.errors import ConversionError
from entrollm_gguf.gguf_io.patched import import_gguf
from entrollm_gguf.quant import Quantizer
from entrollm_gguf.quant.fold import Folding

# Weights in flight: 4 bytes each as floats, and about as much again in temporaries. Larger tensors are encoded alone, by all threads.
MAX_WEIGHTS_IN_FLIGHT = 32_000_000


@dataclass(frozen=True)
class Treatment:
    """What is done with a tensor if it can be entropy-coded."""

    kind: EntropyType
    quantizer: Quantizer
    workspace: int = 0  # memory that quantizing takes beside the weights, in f32 numbers


def finish_tensor(
    name: str,
    data: Any,
    raw_dtype: int | None,
    treatment: Treatment,
    threads: int,
    tile_cols: int | None,
    stop: threading.Event,
    folding: Folding,
) -> tuple[np.ndarray, TensorRecord, int]:
    """Final bytes, record and ggml type of one tensor.

    Args:
        data: as the converter class hands it over, with the type it would have (`SourceModel.each_tensor`).
        folding: factors that are applied first.
    Raises:
        InterruptedError: stop is set.
        ConversionError: NaN or infinite weights.
    """
    if stop.is_set():
        raise InterruptedError
    if data.dtype in (np.float16, np.float32):
        data = folding.apply(name, data)
    gguf = import_gguf()
    types = gguf.GGMLQuantizationType
    if raw_dtype != types.BF16 or data.dtype == np.uint8:
        return _as_is(name, data, raw_dtype)
    reason = reason_to_keep(name, tuple(data.shape))
    if reason is None:
        try:
            payload, record = encode_tensor(name, data, treatment.kind, treatment.quantizer, tile_cols=tile_cols, threads=threads)
            return payload, record, types[record.type_name]
        except Unquantizable as error:
            reason = str(error)
    return _keep(name, data, reason)


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
        # infinities are legal in masks and rope factors, never where every activation passes
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


def _keep(name: str, data: np.ndarray, reason: str) -> tuple[np.ndarray, TensorRecord, int]:
    """A matrix that cannot be entropy-coded, in the smallest stock float type that holds it: BF16 if exact, else F16 if in range, else F32."""
    types = import_gguf().GGMLQuantizationType
    if not np.isfinite(data).all():
        raise ConversionError(f"tensor {name}: a weight is NaN or infinite; the checkpoint is damaged or its training diverged")
    wide = np.ascontiguousarray(data, dtype=np.float32)
    bits = wide.view(np.uint32)
    if not (bits & 0xFFFF).any():
        kept, ggml_type = (bits >> 16).astype(np.uint16), types.BF16
    elif np.abs(wide).max() <= np.finfo(np.float16).max:
        kept, ggml_type = wide.astype(np.float16), types.F16
    else:
        kept, ggml_type = wide, types.F32
    record = TensorRecord(name, ggml_type.name, tuple(data.shape), kept.nbytes, f"kept: {reason}")
    return kept.reshape(-1).view(np.uint8), record, ggml_type
