# SPDX-License-Identifier: MIT
"""EntroLLM's later wording, "chosen by that layer's weight distribution", as a rule: of the
symmetric and the asymmetric grid, take the one that codes smaller."""

from __future__ import annotations

import numpy as np

from entrollm_gguf.codec import EntropyType, count_codes, plan_code
from entrollm_gguf.quant.base import Quantized, QuantizeError, value_range
from entrollm_gguf.quant.uniform import quantize_asymmetric, quantize_symmetric


def coded_bits(quantized: Quantized, kind: EntropyType, threads: int | None = None) -> int:
    """Coded size of the codes, without padding and index; one code per slab as in the file."""
    codes = quantized.codes if quantized.codes.ndim == 3 else quantized.codes[None]
    return sum(plan_code(count_codes(kind, slab, threads)).n_bits for slab in codes)


def quantize_mixed(weights: np.ndarray, kind: EntropyType, threads: int | None = None) -> Quantized:
    """Quantize a tensor with the grid that codes smaller, or the only one that holds it; symmetric
    on a tie, since it needs no offset.

    Args:
        weights: f16 or f32, shape (n_rows, n_cols) or (n_slabs, n_rows, n_cols), n_cols a multiple
            of 32.
    Raises:
        NotFiniteError: a weight is NaN or infinite.
        QuantizeError: neither grid holds the range; the message is that of the last.

    >>> weights = np.linspace(-1, 3, 32, dtype=np.float32)[None]  # symmetric codes end at -42
    >>> quantized = quantize_mixed(weights, EntropyType.EQ8)
    >>> quantized.scheme, int(quantized.codes.min()), int(quantized.codes.max())
    ('symmetric', -42, 127)
    """
    low, high = value_range(weights, threads)
    grids: list[Quantized] = []
    refusal = None
    for grid in (quantize_symmetric, quantize_asymmetric):
        try:
            grids.append(grid(weights, kind, low, high, threads))
        except QuantizeError as error:
            refusal = error
    if not grids:
        raise refusal
    return min(grids, key=lambda g: coded_bits(g, kind, threads)) if len(grids) > 1 else grids[0]
