# SPDX-License-Identifier: MIT
"""What all quantizers share: their result, their errors, and the uniform grid applied in chunks.

A grid is `w = scale * u + minimum` with u in 0..2^bits - 1 (asymmetric), or `w = scale * q` with q
around zero (symmetric). Scales are rounded to f16 BEFORE codes are chosen, so that codes fit the
scale that is stored.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from entrollm_gguf.codec import EntropyType

# Weights per chunk: the temporaries of a chunk (two f32 arrays) stay in a core's L2 cache.
_CHUNK = 1 << 16

# This share of a matrix's rows may be too small for an f16 scale: tokens that training never
# touched have weights close to zero.
MAX_COARSE = 1 / 32


class QuantizeError(ValueError):
    """These weights cannot be quantized; the message says why, without the tensor's name."""


class NotFiniteError(QuantizeError):
    """A weight is NaN or infinite."""


@dataclass(frozen=True)
class Quantized:
    """Integer codes of one tensor with their grid, ready for `codec.encode`."""

    codes: np.ndarray  # int8, the shape of the weights
    scales: np.ndarray  # f16, shape (n_slabs, 1) or (n_slabs, n_rows)
    offsets: np.ndarray | None  # f32, same shapes, or None: w = scale * q + offset
    scheme: str  # what was chosen, as recorded in the file's metadata
    n_coarse: int = 0  # rows that `count_coarse` found
    kind: EntropyType | None = None  # set where the codes decide it; else it is what was asked for
    scale_error: float | None = None  # for codes and scales that were given: the largest relative error of rounding a scale to f16
    rests: np.ndarray | None = None  # uint8, for EBF16: sign and mantissa of each weight


Quantizer = Callable[[np.ndarray, EntropyType, int | None], Quantized]


def f16_not_below(x: np.ndarray | float) -> np.ndarray:
    """The smallest f16 >= x >= 0, element by element, so that a grid with this step still covers
    its range.

    Args:
        x: f32 or f64, any shape.
    Raises:
        QuantizeError: an element exceeds the largest f16.
    """
    with np.errstate(over="ignore"):
        value = np.asarray(x).astype(np.float16)
        value = np.where(value.astype(np.float64) < x, np.nextafter(value, np.float16(np.inf)), value)
    if not np.isfinite(value).all():
        raise QuantizeError("the weights are too large for an f16 scale")
    return value[()]


def f16_not_above(x: float) -> np.float16:
    """The largest f16 <= x.

    Raises:
        QuantizeError: x is below the smallest f16.
    """
    with np.errstate(over="ignore"):
        value = np.float16(x)
    if np.float64(value) > x:
        value = np.nextafter(value, np.float16(-np.inf))
    if not np.isfinite(value):
        raise QuantizeError("the weights are too large for an f16 minimum")
    return value


def count_coarse(wanted: np.ndarray, stored: np.ndarray) -> int:
    """Count rows for which rounding the step to f16 adds more error than the wanted step makes by
    itself.

    A step s makes a mean square error of s^2 / 12, so rounding costs more than that once the stored
    step is wider by the square root of 2.

    Args:
        wanted: steps before rounding, 0 for rows of zeros; any shape.
        stored: steps that the rounded numbers amount to, the same shape.
    Raises:
        QuantizeError: they are too many (`MAX_COARSE`) to be rows that nobody uses.
    """
    coarse = np.square(stored, dtype=np.float64) > 2 * np.square(wanted, dtype=np.float64)
    n = int(np.count_nonzero(coarse))
    if n > MAX_COARSE * coarse.size:
        raise QuantizeError(f"an f16 is too coarse for steps of {np.median(wanted[coarse]):.1e}")
    return n


def map_chunks(function: Callable[[slice], object], n: int, threads: int | None, n_weights: int = 1) -> list:
    """Results of function(slice) for slices of n items with n_weights weights each, in several
    threads if it pays."""
    step = max(1, _CHUNK // n_weights)
    slices = [slice(i, min(i + step, n)) for i in range(0, n, step)]
    n_threads = threads or os.cpu_count() or 1
    if n_threads == 1 or len(slices) < 8:
        return [function(s) for s in slices]
    with ThreadPoolExecutor(n_threads) as pool:  # numpy releases the GIL inside its loops
        return list(pool.map(function, slices, chunksize=8))


def value_range(weights: np.ndarray, threads: int | None = None) -> tuple[float, float]:
    """Smallest and largest weight.

    Args:
        weights: f16 or f32, any shape, not empty.
    Raises:
        NotFiniteError: a weight is NaN or infinite.
    """
    flat = weights.reshape(-1)
    with np.errstate(all="ignore"):
        parts = np.array(map_chunks(lambda s: (flat[s].min(), flat[s].max()), flat.size, threads), dtype=np.float64)
    low, high = float(parts[:, 0].min()), float(parts[:, 1].max())
    # min and max propagate NaN, and an infinity is one of them
    if not (np.isfinite(low) and np.isfinite(high)) or np.isnan(parts).any():
        raise NotFiniteError("a weight is NaN or infinite")
    return low, high


def apply_grid(
    weights: np.ndarray, scale: np.float16, minimum: float, lowest: int, highest: int, shift: int, threads: int | None = None
) -> np.ndarray:
    """Codes of a uniform grid: clip(round((w - minimum) / scale), lowest, highest) - shift, ties to
    even.

    Args:
        weights: f16 or f32, any shape.
        scale: step of the grid; 0 stands for a constant tensor and gives `lowest - shift`
            everywhere.
        shift: subtracted last, so that an unsigned grid fits int8.
    Returns:
        int8 of the shape of weights.
    """
    flat = weights.reshape(-1)
    codes = np.empty(flat.size, np.int8)
    if scale == 0:
        codes.fill(lowest - shift)
        return codes.reshape(weights.shape)
    step = np.float32(scale)
    base = np.float32(minimum)

    def part(s: slice) -> None:
        x = flat[s].astype(np.float32)
        if base != 0:
            x -= base
        x /= step
        np.rint(x, out=x)
        np.clip(x, lowest, highest, out=x)
        if shift:
            x -= shift
        codes[s] = x

    map_chunks(part, flat.size, threads)
    return codes.reshape(weights.shape)
