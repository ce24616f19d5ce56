# SPDX-License-Identifier: MIT
"""Codes that a checkpoint already has: weights that are integers times one scale for each row (int8
and int4 checkpoints by channel) are taken apart again.

The checkpoint's format is not asked for, since the weights show enough. In a row of w = s * q the
smallest magnitude is a small multiple of s, and all others are integer multiples of s; a row of
other weights has no chance to look like that. A common factor of a row's codes goes into the scale.
"""

from __future__ import annotations

import numpy as np

from entrollm_gguf.codec import EntropyType
from entrollm_gguf.quant.base import NotFiniteError, Quantized, map_chunks
from entrollm_gguf.quant.rows import quantize_rows

_FACTORS = range(1, 9)  # the smallest magnitude of a row, in scales
# distance from an integer; codes times scales are rounded to f32, so that quotients are off by
# 2^-22 of a code at most
_TOLERANCE = 1e-3


def quantize_kept(weights: np.ndarray, kind: EntropyType, threads: int | None = None) -> Quantized:
    """The codes and scales that the weights are made of, in four bits if they fit. Other weights
    are quantized by `quantize_rows`.

    Scales that are no f16 are rounded to one, by 2^-11 of them at most: `Quantized.scale_error`
    tells by how much.

    Args:
        weights: f16 or f32, shape (n_rows, n_cols) or (n_slabs, n_rows, n_cols), n_cols a multiple
            of 32.
        kind: for weights without codes.
    Raises:
        NotFiniteError: a weight is NaN or infinite.
        QuantizeError: as `quantize_rows`.

    >>> weights = np.float32(0.125) * np.array([[1, -2, 7, 0] * 8], np.float32)
    >>> quantized = quantize_kept(weights, EntropyType.EQ8)
    >>> quantized.kind.name, quantized.codes[0, :4].tolist(), quantized.scales.item()
    ('EQ4', [1, -2, 7, 0], 0.125)
    """
    found = find_codes(weights, threads)
    if found is None:
        return quantize_rows(weights, kind, threads)
    codes, exact = found
    with np.errstate(over="ignore"):
        scales = exact.astype(np.float16)
    used = exact > 0
    error = float(np.abs(scales[used] / exact[used] - 1).max()) if used.any() else 0.0
    if not error <= 2.0**-11:  # subnormal or infinite
        return quantize_rows(weights, kind, threads)
    lowest, highest = EntropyType.EQ4.code_range
    four_bits = lowest <= int(codes.min()) and int(codes.max()) <= highest
    n_slabs = weights.shape[0] if weights.ndim == 3 else 1
    return Quantized(
        codes.reshape(weights.shape),
        scales.reshape(n_slabs, -1),
        None,
        "as-in-checkpoint",
        kind=EntropyType.EQ4 if four_bits else EntropyType.EQ8,
        scale_error=error,
    )


def find_codes(weights: np.ndarray, threads: int | None = None) -> tuple[np.ndarray, np.ndarray] | None:
    """Codes int8 (n_rows, n_cols) and scales f64 (n_rows,), or None if some row is no multiple of
    integers from -128 to 127. A row of zeros has scale 0.

    Args:
        weights: as for `quantize_kept`; slabs count as rows.
    Raises:
        NotFiniteError: a weight is NaN or infinite.
    """
    flat = weights.reshape(-1, weights.shape[-1])
    if _codes_of_rows(flat[:4]) is None:  # a quick look first, since most models have none
        return None
    codes = np.empty(flat.shape, np.int8)
    scales = np.empty(len(flat), np.float64)

    def part(s: slice) -> bool:
        found = _codes_of_rows(flat[s])
        if found is None:
            return False
        codes[s], scales[s] = found
        return True

    return (codes, scales) if all(map_chunks(part, len(flat), threads, flat.shape[1])) else None


def _codes_of_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    x = rows.astype(np.float32)
    if not np.isfinite(x).all():
        raise NotFiniteError("a weight is NaN or infinite")
    magnitudes = np.abs(x)
    smallest = np.where(magnitudes > 0, magnitudes, np.inf).min(axis=1).astype(np.float64)
    codes = np.zeros(x.shape, np.int8)
    lowest, highest = EntropyType.EQ8.code_range
    todo = np.flatnonzero(np.isfinite(smallest))
    for factor in _FACTORS:
        if not todo.size:
            break
        quotients = x[todo] * (factor / smallest[todo])[:, None]
        nearest = np.rint(quotients)
        with np.errstate(invalid="ignore"):
            fits = (np.abs(quotients - nearest) < _TOLERANCE).all(axis=1)
        fits &= (nearest.min(axis=1) >= lowest) & (nearest.max(axis=1) <= highest)
        codes[todo[fits]] = nearest[fits].astype(np.int8)
        todo = todo[~fits]
    if todo.size:
        return None
    largest = magnitudes.argmax(axis=1)[:, None]  # where rounding to f32 weighs least
    at_largest = np.take_along_axis(codes, largest, 1)[:, 0].astype(np.float64)
    values = np.take_along_axis(x, largest, 1)[:, 0].astype(np.float64)
    return codes, np.divide(values, at_largest, out=np.zeros(len(x)), where=at_largest != 0)
