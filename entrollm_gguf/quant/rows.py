# SPDX-License-Identifier: MIT
"""Beyond the paper: signed codes around zero with a scale for each row, exact as Q8_0 or Q4_0;
symmetric grids need no offset."""

from __future__ import annotations

import numpy as np

from entrollm_gguf.codec import EntropyType
from entrollm_gguf.quant.base import NotFiniteError, Quantized, count_coarse, f16_not_below, map_chunks


def quantize_rows(weights: np.ndarray, kind: EntropyType, threads: int | None = None) -> Quantized:
    """w = scale[row] * q, |q| <= 2^(b-1) - 1, the scale from the row's largest magnitude, rounded
    up to an f16.

    Args:
        weights: f16 or f32, shape (n_rows, n_cols) or (n_slabs, n_rows, n_cols), n_cols a multiple
            of 32.
    Raises:
        NotFiniteError: a weight is NaN or infinite.
        QuantizeError: a row is too large for an f16 scale, or too many are too small for one.

    >>> weights = np.array([[0.5, -0.25, 0.125, 0] * 8, [7, 0, 0, 1] * 8], np.float32)
    >>> quantized = quantize_rows(weights, EntropyType.EQ4)
    >>> quantized.codes[:, :4].tolist(), quantized.scales.tolist()
    ([[7, -3, 2, 0], [7, 0, 0, 1]], [[0.07147216796875, 1.0]])
    """
    top = kind.top
    n_cols = weights.shape[-1]
    flat = weights.reshape(-1, n_cols)
    codes = np.empty(flat.shape, np.int8)
    wanted = np.empty(len(flat), np.float32)
    scales = np.empty(len(flat), np.float16)

    def part(s: slice) -> None:
        x = flat[s].astype(np.float32)
        largest = np.abs(x).max(axis=1) / np.float32(top)
        if not np.isfinite(largest).all():
            raise NotFiniteError("a weight is NaN or infinite")
        wanted[s] = largest
        scales[s] = scale = f16_not_below(largest)
        # a row of zeros has scale 0 and codes 0
        x /= np.where(scale > 0, scale, 1).astype(np.float32)[:, None]
        np.rint(x, out=x)
        codes[s] = np.clip(x, -top, top, out=x)

    map_chunks(part, len(flat), threads, n_cols)
    n_coarse = count_coarse(wanted, scales)
    n_slabs = weights.shape[0] if weights.ndim == 3 else 1
    return Quantized(codes.reshape(weights.shape), scales.reshape(n_slabs, -1), None, "symmetric-rows", n_coarse)
