# SPDX-License-Identifier: MIT
"""Beyond the paper: a step chosen by rate instead of by range. Each row is quantized with a step
that is a multiple of its own root mean square, so that one code serves all rows. A weight that is
rare costs more bits, but only where it occurs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from entrollm_gguf.codec import EntropyType
from entrollm_gguf.quant.base import NotFiniteError, Quantized, QuantizeError, count_coarse, map_chunks
from entrollm_gguf.quant.feedback import fitted_scales, round_with_feedback

_SMALLEST_NORMAL, _SMALLEST, _LARGEST = np.float32(2.0**-14), np.float32(2.0**-24), np.float32(65504)  # of f16


def quantize_step(
    weights: np.ndarray,
    kind: EntropyType,
    threads: int | None = None,
    *,
    step: float,
    row_factors: np.ndarray | None = None,
    hessian: Callable[[int], np.ndarray] | None = None,
) -> Quantized:
    """w ~ scale[row] * q with q = round(w / (step * factor of the row * rms of the row)).

    A row whose largest weight lies beyond the last code gets a wider step. The scale that is stored
    is the one that fits the codes best (least squares), which makes up for what rounding to the
    middle of an interval loses at low rates.

    Args:
        weights: f16 or f32, shape (n_rows, n_cols) or (n_slabs, n_rows, n_cols), n_cols a multiple
            of 32.
        step: in units of the row's root mean square, above 0.
        row_factors: f32 (n_slabs, n_rows); None for 1.
        hessian: of a slab, f32 (n_cols, n_cols); rounds with error feedback (`quant.feedback`).
            None rounds to nearest.
    Raises:
        NotFiniteError: a weight is NaN or infinite.
        QuantizeError: see `check_peaks`.

    >>> weights = np.random.default_rng(0).standard_normal((8, 64), np.float32)
    >>> fine, coarse = (quantize_step(weights, EntropyType.EQ8, step=step) for step in (0.1, 0.5))
    >>> fine.codes[0, :4].tolist(), coarse.codes[0, :4].tolist(), coarse.scheme
    ([12, -15, -4, -8], [2, -3, -1, -2], 'step-0.5000')
    """
    top = kind.top
    n_cols = weights.shape[-1]
    flat = weights.reshape(-1, n_cols)
    n_slabs = weights.shape[0] if weights.ndim == 3 else 1
    factors = np.ones(len(flat), np.float32) if row_factors is None else row_factors.reshape(-1)
    codes = np.empty(flat.shape, np.int8)
    fitted = np.empty(len(flat))
    peaks, widths = np.empty(len(flat), np.float32), np.empty(len(flat), np.float32)

    def nearest(s: slice) -> None:
        x = flat[s].astype(np.float32)
        peaks[s] = peak = row_peaks(x)
        widths[s] = width = row_steps(x, peak, step, top, factors[s])
        q = np.rint(x / np.where(width > 0, width, 1)[:, None])
        np.clip(q, -top, top, out=q)
        codes[s] = q
        energy = np.einsum("ij,ij->i", q, q, dtype=np.float64)
        fitted[s] = np.einsum("ij,ij->i", q, x, dtype=np.float64) / np.where(energy > 0, energy, np.inf)

    def with_feedback(s: slice, h: np.ndarray) -> None:
        x = flat[s].astype(np.float32)
        peaks[s] = peak = row_peaks(x)
        widths[s] = width = row_steps(x, peak, step, top, factors[s])
        codes[s] = round_with_feedback(x, np.where(width > 0, width, 1), h, top)
        fitted[s] = fitted_scales(x, codes[s], h)

    if hessian is None:
        map_chunks(nearest, len(flat), threads, n_cols)
    else:
        n_rows = len(flat) // n_slabs
        for slab in range(n_slabs):
            s, h = slice(slab * n_rows, (slab + 1) * n_rows), hessian(slab)
            if np.diagonal(h).max() > 0:
                with_feedback(s, h)
            else:  # an expert that no token reached
                nearest(s)
    n_coarse = check_peaks(peaks, top)
    # below the normal numbers f16 has few digits: there the step itself is a number that f16 holds,
    # and serves as the scale
    scales = np.where(widths < _SMALLEST_NORMAL, widths, fitted)
    with np.errstate(over="ignore"):
        scales = scales.astype(np.float16)
    if not np.isfinite(scales).all():
        raise QuantizeError("the weights are too large for an f16 scale")
    scheme = step_scheme(step, rows=row_factors is not None, feedback=hessian is not None)
    return Quantized(codes.reshape(weights.shape), scales.reshape(n_slabs, -1), None, scheme, n_coarse)


def step_scheme(step: float, *, rows: bool = False, feedback: bool = False) -> str:
    """What a file's metadata says of a tensor quantized by `quantize_step`."""
    return f"step-{step:.4f}" + ("-rows" if rows else "") + ("-feedback" if feedback else "")


def row_steps(x: np.ndarray, peaks: np.ndarray, step: float, top: int, factors: np.ndarray | float = 1.0) -> np.ndarray:
    """Step of each row of x f32 (n_rows, n_cols), f32: step * factor * rms, or wider so that the
    largest weight is code `top`; where f16 has few digits, the next number that it holds.

    Args:
        peaks: from `row_peaks`.
    """
    return _f16_steps(np.maximum(np.float32(step) * factors * row_rms(x), peaks / np.float32(top)).astype(np.float32))


def _f16_steps(width: np.ndarray) -> np.ndarray:
    return np.where(width < _SMALLEST_NORMAL, np.ceil(width / _SMALLEST) * _SMALLEST, width)


def check_peaks(peaks: np.ndarray, top: int) -> int:
    """Check whether f16 scales serve these rows. The answer is the same for all steps, since it
    depends on the finest that a row can have: its largest weight divided by the last code.

    Args:
        peaks: from `row_peaks`, of all rows.
    Returns:
        how many rows are too small; they are few enough to be left so (`count_coarse`).
    Raises:
        QuantizeError: a scale can overflow, or too many rows are too small for one.
    """
    if peaks.max() > _LARGEST:  # a scale is at most the largest weight, and comes close at the coarsest steps
        raise QuantizeError(f"weights up to {peaks.max():.6g} are too large for an f16 scale")
    finest = peaks / np.float32(top)
    return count_coarse(finest, _f16_steps(finest))


def row_peaks(x: np.ndarray) -> np.ndarray:
    """Largest magnitude in each row of x f32 (n_rows, n_cols), f32.

    Raises:
        NotFiniteError: a weight is NaN or infinite.
    """
    peaks = np.abs(x).max(axis=1)
    if not np.isfinite(peaks).all():
        raise NotFiniteError("a weight is NaN or infinite")
    return peaks


def row_rms(x: np.ndarray) -> np.ndarray:
    """Root mean square of each row of x f32 (n_rows, n_cols), f32."""
    return np.sqrt(np.einsum("ij,ij->i", x, x, dtype=np.float64) / x.shape[1]).astype(np.float32)
