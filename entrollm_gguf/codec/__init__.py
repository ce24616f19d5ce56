# SPDX-License-Identifier: MIT
"""Python binding of the C codec in ggml-base: integer codes to entropy-coded slabs and back, for EQ8 and EQ4.

The bits are specified in docs/format.md and known to ggml-entropy.c alone. What is added here: numpy in and out, threads over row groups,
3-D tensors (experts), and errors as exceptions. `encode` makes a payload, `Payload` is an open one.
"""

from __future__ import annotations

import functools

import numpy as np

from entrollm_gguf.codec.code import Code, CodePlan, CodeUsage, count_codes, entropy_bits, expected_size, plan_code
from entrollm_gguf.codec.encoder import Encoded, encode
from entrollm_gguf.codec.payload import Payload, SlabHeader, read_header
from entrollm_gguf.codec.shared import F16_OVERFLOW, GROUP_ROWS, HEADER_SIZE, MIN_COLS, SLAB_ALIGN, CodecError, EntropyType, largest_weights

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
    "code_parameters",
    "code_usage",
    "count_codes",
    "decode",
    "decode_plain",
    "encode",
    "entropy_bits",
    "expected_size",
    "largest_weights",
    "plan_code",
    "read_header",
    "scales_and_offsets",
    "to_lanes",
    "validate",
    "verify",
]


def validate(kind: EntropyType, payload: np.ndarray, shape: tuple[int, ...], name: str = "tensor") -> None:
    """Everything a decoder relies on (docs/format.md 9); reads no codes.

    Raises:
        FormatError: the payload is invalid.
    """
    Payload(kind, payload, shape, label=name)


def verify(
    kind: EntropyType, payload: np.ndarray, shape: tuple[int, ...], name: str = "", threads: int | None = None, *, label: str | None = None
) -> None:
    """`Payload.verify`. name is the tensor's in the GGUF, label what messages call it."""
    Payload(kind, payload, shape, name, label=label).verify(threads)


def decode(kind: EntropyType, payload: np.ndarray, shape: tuple[int, ...], name: str = "tensor", threads: int | None = None) -> np.ndarray:
    """`Payload.codes`. name is for messages, here and below."""
    return Payload(kind, payload, shape, label=name).codes(threads)


def decode_plain(
    kind: EntropyType, payload: np.ndarray, shape: tuple[int, ...], name: str = "tensor", threads: int | None = None
) -> tuple[str, np.ndarray]:
    """`Payload.plain`."""
    return Payload(kind, payload, shape, label=name).plain(threads)


def scales_and_offsets(
    kind: EntropyType, payload: np.ndarray, shape: tuple[int, ...], name: str = "tensor"
) -> tuple[np.ndarray, np.ndarray | None]:
    """`Payload.scales_and_offsets`."""
    return Payload(kind, payload, shape, label=name).scales_and_offsets()


def code_parameters(kind: EntropyType, payload: np.ndarray, shape: tuple[int, ...], name: str = "tensor") -> list[Code]:
    """`Payload.code_parameters`."""
    return Payload(kind, payload, shape, label=name).code_parameters()


def code_usage(
    kind: EntropyType, payload: np.ndarray, shape: tuple[int, ...], name: str = "tensor", threads: int | None = None
) -> CodeUsage:
    """How many weights of a tensor are direct, in the tail, and far."""
    opened = Payload(kind, payload, shape, label=name)
    used = (code.usage(counts) for code, counts in zip(opened.code_parameters(), opened.counts(threads)))
    return functools.reduce(CodeUsage.__add__, used)


def to_lanes(
    kind: EntropyType, payload: np.ndarray, shape: tuple[int, ...], name: str = "tensor", threads: int | None = None
) -> np.ndarray:
    """`Payload.to_lanes`."""
    return Payload(kind, payload, shape, label=name).to_lanes(threads)
