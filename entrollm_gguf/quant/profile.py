# SPDX-License-Identifier: MIT
"""What a matrix costs at any step, from one look at it: histograms of its weights in units of their row's root mean square (times the row's factor, where it has one)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from entrollm_gguf import codec
from entrollm_gguf.codec import EntropyType
from entrollm_gguf.quant.base import NotFiniteError, n_bits
from entrollm_gguf.quant.step import row_rms

# A step is rarely below 0.03 rms: eight bins, and counts between bin edges are interpolated.
_BINS_PER_RMS = 256
_RANGE = 40  # rms to each side; what lies beyond is counted in the last bins
# Rows are told apart by their largest weight in rms, since it widens their step.
_PEAKS = np.array([5, 6, 7, 8.5, 10.5, 13, 17, 24, 40, np.inf])


@dataclass(frozen=True)
class Profile:
    """Histograms of one matrix, or of a stack of them."""

    shape: tuple[int, ...]  # numpy order
    counts: np.ndarray  # f64 (classes, bins)
    peaks: np.ndarray  # f64 (classes,): mean of the rows' largest weight, in rms

    @property
    def n_weights(self) -> int:
        """Number of weights."""
        return int(np.prod(self.shape, dtype=np.int64))

    def symbol_counts(self, step: float, kind: EntropyType = EntropyType.EQ8) -> np.ndarray:
        """Expected counts of the symbols, u64 (256,), if `quantize_step` runs with this step (EQ8)."""
        top = (1 << (n_bits(kind) - 1)) - 1
        below = np.concatenate([np.zeros((len(self.counts), 1)), np.cumsum(self.counts, axis=1)], axis=1)
        edges = np.linspace(-_RANGE, _RANGE, below.shape[1])
        total = np.zeros(2 * top + 1)
        for cumulated, peak in zip(below, self.peaks, strict=True):
            if cumulated[-1] == 0:
                continue
            width = max(step, peak / top)
            between = np.interp((np.arange(-top, top) + 0.5) * width, edges, cumulated)
            total += np.diff(np.concatenate([[0.0], between, cumulated[-1:]]))
        counts = np.zeros(256, np.uint64)
        counts[128 - top : 128 + top + 1] = np.rint(total)
        return counts

    def coded_bits(self, step: float) -> int:
        """Expected size of the Huffman codes."""
        return codec.plan_code(self.symbol_counts(step)).n_bits

    def n_bytes(self, step: float, tile_cols: int | None = None) -> int:
        """Expected size in the file: codes, padding of the lanes to whole words, index, scales, table (docs/format.md 5)."""
        n_slabs = self.shape[0] if len(self.shape) == 3 else 1
        n_rows, n_cols = self.shape[-2:]
        n_slices = -(-n_cols // (tile_cols or codec.default_tile_cols(n_rows, n_cols)))
        n_tiles = n_slabs * -(-n_rows // 32) * n_slices
        lanes = n_slabs * n_rows * n_slices
        return int(self.coded_bits(step) / 8 + lanes * 2 + n_tiles * (6 + 4 + 32) + n_slabs * (n_rows * 2 + 256 + 512 + 256 + 5 * 128))


def profile(weights: np.ndarray, row_factors: np.ndarray | None = None) -> Profile:
    """Look at a matrix, or a stack of them.

    Args:
        weights: f16 or f32, shape (n_rows, n_cols) or (n_slabs, n_rows, n_cols).
        row_factors: as `quantize_step` will get them, f32 (n_slabs, n_rows).
    Raises:
        NotFiniteError: a weight is NaN or infinite.
    """
    n_cols = weights.shape[-1]
    flat = weights.reshape(-1, n_cols)
    n_bins = 2 * _RANGE * _BINS_PER_RMS
    factors = None if row_factors is None else row_factors.reshape(-1)

    def part(s: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        x = flat[s].astype(np.float32)
        peak = np.abs(x).max(axis=1)
        if not np.isfinite(peak).all():
            raise NotFiniteError("a weight is NaN or infinite")
        unit = row_rms(x) * (1 if factors is None else factors[s])
        scale = np.where(unit > 0, unit, 1).astype(np.float32)
        x /= scale[:, None]
        peak = peak / scale
        bins = np.clip((x + np.float32(_RANGE)) * np.float32(_BINS_PER_RMS), 0, n_bins - 1).astype(np.int64)
        classes = np.searchsorted(_PEAKS, peak, side="right")
        bins += (classes * n_bins)[:, None]
        counts = np.bincount(bins.reshape(-1), minlength=len(_PEAKS) * n_bins)
        return counts, np.bincount(classes, peak, len(_PEAKS)), np.bincount(classes, minlength=len(_PEAKS))

    counts = np.zeros(len(_PEAKS) * n_bins)
    peaks, rows = np.zeros(len(_PEAKS)), np.zeros(len(_PEAKS))
    step = max(1, (1 << 20) // n_cols)  # a million weights at a time
    for begin in range(0, len(flat), step):
        for total, one in zip((counts, peaks, rows), part(slice(begin, begin + step)), strict=True):
            total += one
    return Profile(tuple(weights.shape), counts.reshape(len(_PEAKS), n_bins), peaks / np.maximum(rows, 1))
