# SPDX-License-Identifier: MIT
"""What a matrix costs at any step, after one look at it. The look gives histograms of its weights
in units of their row's root mean square (times the row's factor, where it has one)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from entrollm_gguf import codec
from entrollm_gguf.codec import EntropyType
from entrollm_gguf.quant.step import check_peaks, row_peaks, row_rms

# A step is rarely below 0.03 rms, which is eight bins; counts between bin edges are interpolated.
_BINS_PER_RMS = 256
# A row's largest weight can widen its step, so rows are sorted into classes by it. Class i has the
# rows whose largest weight is below _PEAKS[i] rms; its histogram covers -_RANGES[i] .. _RANGES[i]
# rms, and the last bins count what lies beyond.
_PEAKS = np.array([3.5, 4, 4.5, 5, 6, 7, 8.5, 10.5, 13, 17, 24, 40, np.inf])
_RANGES = np.minimum(np.ceil(_PEAKS), 40).astype(np.int64)


@dataclass(frozen=True)
class RowClass:
    """Rows whose largest weights are about the same, in rms."""

    cumulated: np.ndarray  # f64 (bins + 1,): weights below each edge of the bins, which cover -reach to reach
    reach: int  # in rms
    peak: float  # mean of the rows' largest weight, in rms

    def width(self, step: float, top: int) -> float:
        """The step of these rows: the largest weight can widen it."""
        return max(step, self.peak / top)

    def code_counts(self, step: float, top: int) -> np.ndarray:
        """Expected counts of the codes -top..top, f64."""
        n_bins = len(self.cumulated) - 1
        edges = (np.arange(-top, top) + 0.5) * self.width(step, top)  # between codes
        at = np.clip((edges + self.reach) * _BINS_PER_RMS, 0, n_bins)
        left = np.minimum(at.astype(np.int64), n_bins - 1)
        below = self.cumulated[left] + (at - left) * (self.cumulated[left + 1] - self.cumulated[left])
        return np.diff(below, prepend=0.0, append=self.cumulated[-1])


@dataclass(frozen=True)
class Profile:
    """Histograms of one matrix, or of a stack of them."""

    shape: tuple[int, ...]  # numpy order
    classes: tuple[RowClass, ...]

    @property
    def n_weights(self) -> int:
        """Number of weights."""
        return int(np.prod(self.shape, dtype=np.int64))

    def code_counts(self, step: float) -> np.ndarray:
        """Expected counts of the codes of EQ8, u64 (256,), index q + 128, if `quantize_step` runs
        with this step."""
        top = EntropyType.EQ8.top
        counts = np.zeros(256)
        counts[128 - top : 128 + top + 1] = sum(one.code_counts(step, top) for one in self.classes)
        return np.rint(counts).astype(np.uint64)

    def entropy_bits(self, step: float) -> float:
        """Entropy of the codes: what an ideal coder would need."""
        return codec.entropy_bits(self.code_counts(step))

    def coded_bits(self, step: float) -> int:
        """Expected size of the codes."""
        return codec.plan_code(self.code_counts(step)).n_bits

    def n_bytes(self, step: float) -> int:
        """Expected size in the file."""
        plan = codec.plan_code(self.code_counts(step))
        return codec.expected_size(self.shape, plan.n_bits, plan.code.raw_bits)

    def least_bytes(self, step: float) -> int:
        """The same if codes took no more than their entropy. No code has to be planned for it,
        which is what takes time."""
        bits = self.entropy_bits(step)
        return codec.expected_size(self.shape, bits, bits / self.n_weights)


def profile(weights: np.ndarray, row_factors: np.ndarray | None = None) -> Profile:
    """Look at a matrix, or a stack of them.

    Args:
        weights: f16 or f32, shape (n_rows, n_cols) or (n_slabs, n_rows, n_cols).
        row_factors: as `quantize_step` will get them, f32 (n_slabs, n_rows).
    Raises:
        NotFiniteError: a weight is NaN or infinite.
        QuantizeError: `quantize_step` refuses these weights, whatever the step.

    >>> weights = np.random.default_rng(0).standard_normal((64, 256), np.float32)
    >>> found = profile(weights)
    >>> [found.n_bytes(step) for step in (0.1, 0.2, 0.4)]
    [12032, 9984, 7936]
    """
    n_cols = weights.shape[-1]
    flat = weights.reshape(-1, n_cols)
    factors = None if row_factors is None else row_factors.reshape(-1)
    largest = np.empty(len(flat), np.float32)
    counts = [np.zeros(2 * reach * _BINS_PER_RMS) for reach in _RANGES]
    peaks, rows = np.zeros(len(_PEAKS)), np.zeros(len(_PEAKS))
    at_once = max(1, (1 << 18) // n_cols)  # temporaries stay in the cache
    for begin in range(0, len(flat), at_once):
        s = slice(begin, begin + at_once)
        x = flat[s].astype(np.float32)
        largest[s] = peak = row_peaks(x)
        unit = row_rms(x) * (1 if factors is None else factors[s])
        scale = np.where(unit > 0, unit, 1).astype(np.float32)
        x *= (_BINS_PER_RMS / scale)[:, None]
        peak = peak / scale
        of_row = np.searchsorted(_PEAKS, peak, side="right")
        for i in np.unique(of_row):
            n_bins = len(counts[i])
            bins = np.clip(x[of_row == i] + np.float32(n_bins // 2), 0, n_bins - 1).astype(np.int32)
            counts[i] += np.bincount(bins.reshape(-1), minlength=n_bins)
            peaks[i] += peak[of_row == i].sum()
            rows[i] += np.count_nonzero(of_row == i)
    check_peaks(largest, EntropyType.EQ8.top)
    cumulated = [np.concatenate([[0.0], np.cumsum(one)]) for one in counts]
    classes = (RowClass(cumulated[i], int(_RANGES[i]), float(peaks[i] / rows[i])) for i in np.flatnonzero(rows))
    return Profile(tuple(weights.shape), tuple(classes))
