# SPDX-License-Identifier: MIT
"""One tensor: quantize, entropy-code, decode again and compare. No files and no llama.cpp here."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from entrollm_gguf import codec
from entrollm_gguf.errors import ConversionError
from entrollm_gguf.quant.base import NotFiniteError, Quantized, QuantizeError, Quantizer, map_chunks


@dataclass(frozen=True)
class TensorRecord:
    """What became of one tensor; a line of the report, and of the file's metadata."""

    name: str
    type_name: str  # "EQ8", "F32", ...
    shape: tuple[int, ...]  # numpy order
    n_bytes: int
    scheme: str  # as the file's metadata tells it: the grid that was chosen, or why there is none
    entropy_bits: float | None = None  # of the codes and with what is stored beside them, whole tensor; None for stock types
    coded_bits: int | None = None  # of the codes alone
    coarse_rows: int = 0  # rows that are too small for an f16 scale, so that their weights are all but lost
    scale_error: float | None = None  # of a checkpoint's own codes: the largest relative rounding of their scales
    added_error: float | None = None  # where weights were quantized before: what this loses besides, as a share of their energy
    kept: str | None = None  # why a matrix that llama.cpp would quantize stays in a stock type

    @property
    def n_elements(self) -> int:
        """Number of weights."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def bits_per_weight(self) -> float:
        """Bits in the file per weight, container included."""
        return self.n_bytes * 8 / self.n_elements


class Unquantizable(Exception):
    """The tensor has to stay in a stock type; the message says why."""


def encode_tensor(
    name: str,
    weights: np.ndarray,
    kind: codec.EntropyType,
    quantizer: Quantizer,
    *,
    tile_cols: int | None = None,
    threads: int | None = None,
    measure: bool = False,
) -> tuple[np.ndarray, TensorRecord]:
    """Make the payload of one tensor and check that it decodes to the codes that went in.

    Args:
        name: in the GGUF; the payload verifies under this name alone.
        weights: f16 or f32, shape (n_rows, n_cols) or (n_slabs, n_rows, n_cols).
        quantizer: function(weights, kind, threads).
        tile_cols: of the device layout; None for the default.
        measure: tell the error in the record.
    Returns:
        payload (uint8) and its record.
    Raises:
        ConversionError: NaN or infinite weights, or a payload that does not decode to its codes.
        Unquantizable: finite weights that no f16 scale serves, or that do not fit the stock type to
            which they would decode.
    """
    try:
        quantized = quantizer(weights, kind, threads)
    except NotFiniteError as error:
        raise ConversionError(f"tensor {name}: {error}; the checkpoint is damaged or its training diverged") from error
    except QuantizeError as error:
        raise Unquantizable(str(error)) from error
    kind = quantized.kind or kind
    encoded = codec.encode(
        kind, quantized.codes, quantized.scales, quantized.offsets, rests=quantized.rests,
        name=name, tile_cols=tile_cols, threads=threads,
    )  # fmt: skip
    payload = codec.Payload(kind, encoded.payload, weights.shape, name, label=f"tensor {name}")
    if not np.array_equal(payload.codes(threads), quantized.codes) or not np.array_equal(payload.rests(), quantized.rests):
        raise ConversionError(f"tensor {name}: decodes to other codes than were encoded; this is a bug, please report it")
    entropy_bits = encoded.entropy_bits + weights.size * kind.rest_bits
    record = TensorRecord(
        name, kind.name, tuple(weights.shape), encoded.payload.size, quantized.scheme, entropy_bits, encoded.coded_bits,
        quantized.n_coarse, quantized.scale_error, _error(weights, quantized) if measure else None,
    )  # fmt: skip
    return encoded.payload, record


def _error(weights: np.ndarray, quantized: Quantized) -> float:
    """Energy of the difference to what the codes stand for, by that of the weights."""
    if quantized.rests is not None:
        return 0.0  # lossless
    rows, codes = (one.reshape(-1, weights.shape[-1]) for one in (weights, quantized.codes))
    n_rows = weights.shape[-2]
    scales, offsets = (
        np.zeros(len(rows), np.float32) if one is None else np.broadcast_to(one.astype(np.float32), (one.shape[0], n_rows)).reshape(-1)
        for one in (quantized.scales, quantized.offsets)
    )

    def part(s: slice) -> tuple[float, float]:
        w = rows[s].astype(np.float32)
        lost = scales[s, None] * codes[s].astype(np.float32) + offsets[s, None] - w
        return float(np.square(lost, dtype=np.float64).sum()), float(np.square(w, dtype=np.float64).sum())

    lost, energy = np.array(map_chunks(part, len(rows), 1, weights.shape[-1])).sum(axis=0)
    return float(lost / energy) if energy else 0.0
