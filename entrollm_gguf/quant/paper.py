# SPDX-License-Identifier: MIT
"""EntroLLM's quantizer with its published rule (arXiv 2505.02380 v1): one scale per tensor,
symmetric unsigned if all weights have one sign, else asymmetric."""

from __future__ import annotations

import numpy as np

from entrollm_gguf.codec import EntropyType
from entrollm_gguf.quant.base import Quantized, value_range
from entrollm_gguf.quant.uniform import quantize_asymmetric, quantize_symmetric_unsigned


def quantize_paper(weights: np.ndarray, kind: EntropyType, threads: int | None = None) -> Quantized:
    """Quantize a tensor by the published sign rule `W_max * W_min >= 0`.

    Args:
        weights: f16 or f32, shape (n_rows, n_cols) or (n_slabs, n_rows, n_cols); one grid for the
            whole tensor.
        kind: EQ8 for uint8, EQ4 for uint4.
    Raises:
        NotFiniteError: a weight is NaN or infinite.
        QuantizeError: the range does not fit f16 scales, or the stock type that the grid decodes
            to.

    >>> quantized = quantize_paper(np.linspace(-1, 3, 32, dtype=np.float32)[None], EntropyType.EQ4)
    >>> quantized.scheme, quantized.codes[0, ::8].tolist()
    ('asymmetric', [-8, -4, 0, 4])
    >>> float(quantized.scales[0, 0] * quantized.codes[0, -1] + quantized.offsets[0, 0])  # was 3
    3.0029296875
    """
    low, high = value_range(weights, threads)
    grid = quantize_symmetric_unsigned if low * high >= 0 else quantize_asymmetric
    return grid(weights, kind, low, high, threads)
