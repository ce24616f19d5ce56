# SPDX-License-Identifier: MIT
"""The three min-max grids with one scale for a whole tensor: asymmetric, symmetric unsigned (both
EntroLLM's) and symmetric signed."""

from __future__ import annotations

import math

import numpy as np

from entrollm_gguf.codec import F16_OVERFLOW, EntropyType, largest_weights
from entrollm_gguf.quant.base import Quantized, QuantizeError, apply_grid, count_coarse, f16_not_above, f16_not_below


def _one(value: float, dtype: type) -> np.ndarray:
    return np.array([[value]], dtype=dtype)


def _exact_minimum(low: float, high: float, levels: int) -> float:
    """An f16 at most `low`, without bits thousands of times finer than the step: they would be lost
    in the f32 sum with half the range."""
    if high <= low:
        return float(f16_not_above(low))
    unit = 2.0 ** (math.floor(math.log2((high - low) / levels)) - 10)
    return float(f16_not_above(math.floor(low / unit) * unit))


def _exact_offset(minimum: float, scale: np.float16, half: int) -> tuple[np.float16, np.float32]:
    """A scale, at least the given one, and the f32 offset `minimum + half * scale` that gives the
    minimum back without rounding.

    Fails only where the minimum is thousands of times the range; fewer bits in the scale then make
    the sum fit an f32.
    """
    for n_dropped in range(11):
        unit = np.uint16(1 << n_dropped)
        bits = np.float16(scale).view(np.uint16)
        rounded = ((bits + unit - 1) // unit * unit).astype(np.uint16).view(np.float16)
        offset = np.float32(minimum + half * float(rounded))
        if np.isfinite(rounded) and np.float32(offset - np.float32(half) * np.float32(rounded)) == np.float32(minimum):
            return rounded, offset
    raise QuantizeError("the weights are too far from zero for their range")


def _check_offset_grid(kind: EntropyType, wanted: float, scale: np.ndarray, offset: np.ndarray) -> None:
    """Check that the stock type of a grid with offsets holds it: EQ8 decodes to F16, which ends at
    65504 and has steps of its own.

    Args:
        wanted: step of the grid before rounding; 0 if all weights are equal.
    Raises:
        QuantizeError: it does not.
    """
    largest = largest_weights(scale, offset)
    stored = np.abs(scale.astype(np.float64))
    if kind is EntropyType.EQ8:
        if not (largest < F16_OVERFLOW).all():
            raise QuantizeError(f"with an offset, weights up to {largest.max():.6g} need a type larger than F16")
        spacing = np.where(largest > 0, np.spacing(largest.astype(np.float16)), 0)  # zeros are exact
        stored = np.hypot(stored, spacing.astype(np.float64))
    # equal weights have no step, so they may be as coarse as an f16 with all its digits
    count_coarse(np.where(wanted > 0, wanted, largest * 2.0**-10), stored)


def quantize_asymmetric(weights: np.ndarray, kind: EntropyType, low: float, high: float, threads: int | None = None) -> Quantized:
    """`W_int = round((W - z) * s)` with z = min, 1/s = (max - min) / (2^b - 1) (EntroLLM, section
    on mixed quantization).

    Args:
        weights: f16 or f32, shape (n_rows, n_cols) or (n_slabs, n_rows, n_cols).
        low, high: the range of the weights.
    Raises:
        QuantizeError: the range does not fit f16 scales, or the stock type that the grid decodes
            to.
    """
    levels, half = 2 * kind.top + 1, kind.top + 1
    # Q4_1 stores the minimum as f16 (docs/format.md 6.1): round it first, and measure the step from
    # there
    minimum = _exact_minimum(low, high, levels) if kind is EntropyType.EQ4 else float(np.float32(low))
    scale = f16_not_below((high - minimum) / levels) if high > minimum else np.float16(0)
    if kind is EntropyType.EQ4:
        scale, offset = _exact_offset(minimum, scale, half)
    else:
        offset = np.float32(minimum + half * float(scale))
    scales, offsets = _one(scale, np.float16), _one(offset, np.float32)
    _check_offset_grid(kind, (high - low) / levels, scales, offsets)
    codes = apply_grid(weights, scale, minimum, 0, levels, half, threads)
    return Quantized(codes, scales, offsets, "asymmetric")


def quantize_symmetric_unsigned(weights: np.ndarray, kind: EntropyType, low: float, high: float, threads: int | None = None) -> Quantized:
    """`W_int = round(W * s)` with 1/s = max / (2^b - 1), for weights of one sign; all-negative
    weights take a negative scale.

    Raises:
        ValueError: the weights have both signs.
        QuantizeError: they do not fit f16 scales, or the stock type that the grid decodes to.
    """
    if low * high < 0:
        raise ValueError("a symmetric unsigned grid needs weights of one sign")
    levels, half = 2 * kind.top + 1, kind.top + 1
    extreme = max(abs(low), abs(high))
    size = f16_not_below(extreme / levels) if extreme > 0 else np.float16(0)
    scale = np.float16(-size) if high <= 0 else size
    scales, offsets = _one(scale, np.float16), _one(half * float(scale), np.float32)
    _check_offset_grid(kind, extreme / levels, scales, offsets)
    codes = apply_grid(weights, scale, 0.0, 0, levels, half, threads)
    return Quantized(codes, scales, offsets, "symmetric-unsigned")


def quantize_symmetric(weights: np.ndarray, kind: EntropyType, low: float, high: float, threads: int | None = None) -> Quantized:
    """Signed codes around zero: w = scale * q, |q| <= 2^(b-1) - 1, scale from the largest
    magnitude. No offset: exact as Q8_0 or Q4_0.

    Raises:
        QuantizeError: the range does not fit f16 scales, or the stock type that the grid decodes
            to.
    """
    top = kind.top
    extreme = max(abs(low), abs(high))
    scale = f16_not_below(extreme / top) if extreme > 0 else np.float16(0)
    count_coarse(_one(extreme / top, np.float64), _one(scale, np.float64))
    codes = apply_grid(weights, scale, 0.0, -top, top, 0, threads) if scale else np.zeros(weights.shape, np.int8)
    return Quantized(codes, _one(scale, np.float16), None, "symmetric")
