# SPDX-License-Identifier: MIT
"""Python binding of the C codec in ggml-base: integer codes to entropy-coded slabs and back, for
EQ8, EQ4 and EBF16.

The bits are specified in docs/format.md and known to ggml-entropy.c alone. This package adds numpy
arrays, threads over row groups, 3-D tensors (experts) and exceptions. `encode` makes a payload;
`Payload` opens one.
"""

from __future__ import annotations

from entrollm_gguf.codec.code import Code, CodePlan, CodeUsage, count_codes, entropy_bits, expected_size, plan_code
from entrollm_gguf.codec.encoder import Encoded, encode
from entrollm_gguf.codec.lanes import check_tile_cols
from entrollm_gguf.codec.payload import Payload, SlabHeader, read_header
from entrollm_gguf.codec.shared import (
    F16_OVERFLOW,
    GROUP_ROWS,
    HEADER_SIZE,
    MIN_COLS,
    SLAB_ALIGN,
    CodecError,
    EntropyType,
    largest_weights,
    shape_is_valid,
)

__all__ = [
    "F16_OVERFLOW",
    "GROUP_ROWS",
    "HEADER_SIZE",
    "MIN_COLS",
    "SLAB_ALIGN",
    "Code",
    "CodePlan",
    "CodeUsage",
    "CodecError",
    "Encoded",
    "EntropyType",
    "Payload",
    "SlabHeader",
    "check_tile_cols",
    "count_codes",
    "encode",
    "entropy_bits",
    "expected_size",
    "largest_weights",
    "plan_code",
    "read_header",
    "shape_is_valid",
]
