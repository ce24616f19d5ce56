# SPDX-License-Identifier: MIT
"""Python binding of the C codec in ggml-base: integer codes to entropy-coded slabs and back, for
EQ8, EQ4 and EBF16.

The bits are specified in docs/format.md and known to ggml-entropy.c alone. This package adds numpy
arrays, threads over row groups, 3-D tensors (experts) and exceptions. `encode` makes a payload;
`Payload` opens one.
"""

from __future__ import annotations

import functools

import numpy as np

from entrollm_gguf.codec.code import Code, CodePlan, CodeUsage, count_codes, entropy_bits, expected_size, plan_code
from entrollm_gguf.codec.encoder import Encoded, encode
from entrollm_gguf.codec.lanes import check_tile_cols
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
    "check_tile_cols",
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

    >>> encoded = encode(EntropyType.EQ8, np.ones((16, 32), np.int8), np.ones(1, np.float16))
    >>> validate(EntropyType.EQ8, encoded.payload, (16, 32))  # says nothing of a sound payload
    >>> validate(EntropyType.EQ8, encoded.payload[:300], (16, 32), "blk.0.attn_q.weight")
    Traceback (most recent call last):
    entrollm_gguf.errors.FormatError: blk.0.attn_q.weight: the data is shorter than its header says
    """
    Payload(kind, payload, shape, label=name)


def verify(
    kind: EntropyType, payload: np.ndarray, shape: tuple[int, ...], name: str = "", threads: int | None = None, *, label: str | None = None
) -> None:
    """`Payload.verify`. name is the tensor's in the GGUF, label what messages call it.

    >>> codes = np.ones((16, 32), np.int8)
    >>> payload = encode(EntropyType.EQ8, codes, np.ones(1, np.float16), name="w").payload
    >>> verify(EntropyType.EQ8, payload, codes.shape, "w")
    >>> verify(EntropyType.EQ8, payload, codes.shape, "v")  # the hash takes in the name
    Traceback (most recent call last):
    entrollm_gguf.errors.FormatError: v: hash mismatch
    """
    Payload(kind, payload, shape, name, label=label).verify(threads)


def decode(kind: EntropyType, payload: np.ndarray, shape: tuple[int, ...], name: str = "tensor", threads: int | None = None) -> np.ndarray:
    """`Payload.codes`. name is used in messages only, as in the functions that follow.

    >>> codes = np.arange(-16, 16, dtype=np.int8).reshape(1, 32)
    >>> payload = encode(EntropyType.EQ8, codes, np.ones(1, np.float16)).payload
    >>> decode(EntropyType.EQ8, payload, codes.shape)[0, :5].tolist()
    [-16, -15, -14, -13, -12]
    """
    return Payload(kind, payload, shape, label=name).codes(threads)


def decode_plain(
    kind: EntropyType, payload: np.ndarray, shape: tuple[int, ...], name: str = "tensor", threads: int | None = None
) -> tuple[str, np.ndarray]:
    """`Payload.plain`.

    >>> codes = np.ones((16, 64), np.int8)
    >>> payload = encode(EntropyType.EQ4, codes, np.ones(1, np.float16)).payload
    >>> name, rows = decode_plain(EntropyType.EQ4, payload, codes.shape)
    >>> name, rows.shape  # a block of 32 weights takes 18 bytes
    ('Q4_0', (16, 36))
    """
    return Payload(kind, payload, shape, label=name).plain(threads)


def scales_and_offsets(
    kind: EntropyType, payload: np.ndarray, shape: tuple[int, ...], name: str = "tensor"
) -> tuple[np.ndarray, np.ndarray | None]:
    """`Payload.scales_and_offsets`.

    >>> codes, scales = np.zeros((2, 32), np.int8), np.array([0.5, 0.25], np.float16)
    >>> payload = encode(EntropyType.EQ8, codes, scales, np.array([-1.0], np.float32)).payload
    >>> [array.tolist() for array in scales_and_offsets(EntropyType.EQ8, payload, (2, 32))]
    [[[0.5, 0.25]], [[-1.0]]]
    """
    return Payload(kind, payload, shape, label=name).scales_and_offsets()


def code_parameters(kind: EntropyType, payload: np.ndarray, shape: tuple[int, ...], name: str = "tensor") -> list[Code]:
    """`Payload.code_parameters`.

    >>> codes = np.ones((16, 32), np.int8)
    >>> payload = encode(EntropyType.EQ8, codes, np.ones(1, np.float16)).payload
    >>> [code.raw_bits for code in code_parameters(EntropyType.EQ8, payload, codes.shape)]
    [1]
    """
    return Payload(kind, payload, shape, label=name).code_parameters()


def code_usage(
    kind: EntropyType, payload: np.ndarray, shape: tuple[int, ...], name: str = "tensor", threads: int | None = None
) -> CodeUsage:
    """How many weights of a tensor are direct, in the tail, and far.

    >>> codes = np.zeros((64, 128), np.int8)
    >>> codes[:, ::8] = 3
    >>> codes[0, 0] = 100
    >>> payload = encode(EntropyType.EQ8, codes, np.ones(1, np.float16)).payload
    >>> code_usage(EntropyType.EQ8, payload, codes.shape)
    CodeUsage(direct=7168, tail=1023, far=1)
    """
    opened = Payload(kind, payload, shape, label=name)
    used = (code.usage(counts) for code, counts in zip(opened.code_parameters(), opened.counts(threads)))
    return functools.reduce(CodeUsage.__add__, used)


def to_lanes(
    kind: EntropyType, payload: np.ndarray, shape: tuple[int, ...], name: str = "tensor", threads: int | None = None
) -> np.ndarray:
    """`Payload.to_lanes`.

    >>> codes = np.ones((64, 128), np.int8)
    >>> payload = encode(EntropyType.EQ8, codes, np.ones(1, np.float16)).payload
    >>> to_lanes(EntropyType.EQ8, payload, codes.shape).nbytes, payload.nbytes
    (2560, 1792)
    """
    return Payload(kind, payload, shape, label=name).to_lanes(threads)
