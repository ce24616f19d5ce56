# SPDX-License-Identifier: MIT
"""No quantization at all: bf16 weights taken apart for EBF16 (docs/format.md 5.8).

Of a bf16's 16 bits, the 8 of the exponent hold about 2.6 bits of information in trained weights;
sign and mantissa hold nearly all of theirs (DFloat11, arXiv 2504.11651).
"""

from __future__ import annotations

import numpy as np

from entrollm_gguf.codec import EntropyType
from entrollm_gguf.quant.base import NotFiniteError, Quantized, QuantizeError, map_chunks


def quantize_lossless(weights: np.ndarray, kind: EntropyType, threads: int | None = None) -> Quantized:
    """Exponents as codes, sign and mantissa beside them.

    Args:
        weights: f16 or f32, shape (n_rows, n_cols) or (n_slabs, n_rows, n_cols), all bf16 numbers.
        kind: not looked at; the result is EBF16.
    Raises:
        NotFiniteError: a weight is NaN or infinite.
        QuantizeError: a weight is no bf16 number.

    >>> quantized = quantize_lossless(np.array([[1.0, -1.5] * 16], np.float32), EntropyType.EBF16)
    >>> quantized.codes[0, :2].tolist(), [f"{rest:08b}" for rest in quantized.rests[0, :2]]
    ([-1, -1], ['00000000', '11000000'])
    """
    flat = weights.reshape(-1)
    codes = np.empty(flat.size, np.int8)
    rests = np.empty(flat.size, np.uint8)

    def part(s: slice) -> bool:
        bits = flat[s].astype(np.float32).view(np.uint32)
        if (bits & 0x7F800000 == 0x7F800000).any():
            raise NotFiniteError("a weight is NaN or infinite")
        codes[s] = ((bits >> 23 & 0xFF) ^ 0x80).astype(np.uint8).view(np.int8)
        rests[s] = bits >> 24 & 0x80 | bits >> 16 & 0x7F
        return not (bits & 0xFFFF).any()

    if not all(map_chunks(part, flat.size, threads)):
        raise QuantizeError("its weights are no bf16 numbers")
    shape = weights.shape
    n_slabs = shape[0] if len(shape) == 3 else 1
    scales = np.zeros((n_slabs, 1), np.float16)
    return Quantized(codes.reshape(shape), scales, None, "lossless", kind=EntropyType.EBF16, rests=rests.reshape(shape))
