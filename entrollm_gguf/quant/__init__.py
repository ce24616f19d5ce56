# SPDX-License-Identifier: MIT
"""Quantizers: float matrices to integer codes with coarse scales. One file per quantizer;
`QUANTIZERS` names them."""

from entrollm_gguf.quant.base import NotFiniteError, Quantized, QuantizeError, Quantizer
from entrollm_gguf.quant.kept import quantize_kept
from entrollm_gguf.quant.lossless import quantize_lossless
from entrollm_gguf.quant.mixed import quantize_mixed
from entrollm_gguf.quant.paper import quantize_paper
from entrollm_gguf.quant.profile import Profile, profile
from entrollm_gguf.quant.rows import quantize_rows
from entrollm_gguf.quant.step import quantize_step

#: name -> function(weights, kind, threads) -> Quantized
QUANTIZERS: dict[str, Quantizer] = {
    "paper": quantize_paper,
    "mixed": quantize_mixed,
    "rows": quantize_rows,
    "kept": quantize_kept,
    "lossless": quantize_lossless,
}

__all__ = [
    "QUANTIZERS",
    "NotFiniteError",
    "Profile",
    "QuantizeError",
    "Quantized",
    "Quantizer",
    "profile",
    "quantize_kept",
    "quantize_lossless",
    "quantize_mixed",
    "quantize_paper",
    "quantize_rows",
    "quantize_step",
]
