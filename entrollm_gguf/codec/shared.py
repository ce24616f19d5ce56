# SPDX-License-Identifier: MIT
"""Types, errors, threads and arrays that encoding and reading share."""

from __future__ import annotations

import enum
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from entrollm_gguf.codec import c
from entrollm_gguf.errors import FormatError

GROUP_ROWS = 16  # rows of a row group
SLAB_ALIGN = 256
HEADER_SIZE = 256
MIN_COLS = 32

# of the device layout
LANES = 32  # rows of a row group
MAX_TILE_COLS = 1024
MAX_LANE_WORDS = 255


class EntropyType(enum.IntEnum):
    """The entropy-coded tensor types, by their ggml type id (docs/format.md 4).

    >>> EntropyType.EQ8.code_range, EntropyType.EQ4.code_range
    ((-128, 127), (-8, 7))
    """

    EQ8 = 500
    EQ4 = 501
    EBF16 = 502

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code q. One of EBF16 is an exponent less 128."""
        return (-8, 7) if self is EntropyType.EQ4 else (-128, 127)

    @property
    def top(self) -> int:
        """Largest code. The smallest of a symmetric grid is its negative, and a grid with an offset
        has 2 * top + 1 steps."""
        return self.code_range[1]

    @property
    def is_quantized(self) -> bool:
        """Whether a weight is a code with a scale; if not, it is a bf16, bit by bit."""
        return self is not EntropyType.EBF16

    @property
    def rest_bits(self) -> int:
        """Bits of a weight that are stored beside its code: sign and mantissa of a bf16."""
        return 0 if self.is_quantized else 8


#: From here on, an f32 rounds to an infinite f16.
F16_OVERFLOW = 65520.0


def largest_weights(scales: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Largest magnitude that any code of EQ8 stands for (docs/format.md 6.1), f32.

    Args:
        scales: f16, shape (n_slabs, 1) or (n_slabs, n_rows).
        offsets: f32, the same or the other of these shapes.

    >>> largest_weights(np.array([[0.5]], np.float16), np.array([[1.0]], np.float32)).tolist()
    [[64.5]]
    """
    low, high = (scales.astype(np.float32) * np.float32(q) + offsets for q in EntropyType.EQ8.code_range)
    return np.maximum(np.abs(low), np.abs(high))


def shape_is_valid(shape: tuple[int, ...]) -> bool:
    """Whether a coded tensor may have this shape (docs/format.md 4).

    Args:
        shape: (n_rows, n_cols) or (n_slabs, n_rows, n_cols).

    >>> shape_is_valid((7, 96)), shape_is_valid((7, 100))
    (True, False)
    """
    n_slabs, n_rows, n_cols = (1, *shape)[-3:]
    return c.library().ggml_entropy_shape_is_valid(n_cols, n_rows, n_slabs)


class CodecError(ValueError):
    """The caller's arguments cannot be encoded: a shape, a range, a scale that is no finite f16."""


def check_argument(code: int) -> None:
    if code == c.NO_MEMORY:
        raise MemoryError(c.status(code))
    if code:
        raise CodecError(c.status(code))


def check_data(code: int, label: str) -> None:
    if code == c.NO_MEMORY:
        raise MemoryError(c.status(code))
    if code:
        raise FormatError(f"{label}: {c.status(code)}")


def n_groups_of(n_rows: int, rows: int = GROUP_ROWS) -> int:
    """Row groups of a matrix."""
    return -(-n_rows // rows)


def _ranges(n_groups: int, threads: int) -> list[tuple[int, int]]:
    """Cut row groups into a few ranges per thread, so that uneven rows even out."""
    n = max(1, min(n_groups, threads * 4)) if threads > 1 else 1
    edges = [n_groups * i // n for i in range(n + 1)]
    return list(itertools.pairwise(edges))


def run_groups(function: Callable[[int, int], int], n_groups: int, threads: int) -> int:
    """Call function(group0, group1) over all groups, on threads (ctypes releases the GIL). Returns
    the first status that is not 0."""
    ranges = _ranges(n_groups, threads)
    if len(ranges) == 1:
        return function(*ranges[0])
    with ThreadPoolExecutor(threads) as pool:
        return next((code for code in list(pool.map(lambda r: function(*r), ranges)) if code), 0)


def n_threads_of(threads: int | None) -> int:
    return threads if threads else os.cpu_count() or 1


def as_stack(codes: np.ndarray) -> np.ndarray:
    if codes.dtype != np.int8 or codes.ndim not in (2, 3):
        raise CodecError(f"codes must be int8 of 2 or 3 dimensions, not {codes.dtype} of {codes.ndim}")
    codes = np.ascontiguousarray(codes)
    return codes[None] if codes.ndim == 2 else codes


def per_slab(values: np.ndarray, dtype: type, n_slabs: int, n_rows: int, what: str) -> np.ndarray:
    """Bring scales or offsets to shape (n_slabs, 1 or n_rows)."""
    array = np.ascontiguousarray(values, dtype=dtype)
    if array.ndim < 2:
        array = array.reshape(1, -1)
    if array.shape[0] == 1 and n_slabs > 1:
        array = np.repeat(array, n_slabs, axis=0)
    if array.shape not in ((n_slabs, 1), (n_slabs, n_rows)):
        raise CodecError(f"{what} have shape {array.shape}, expected ({n_slabs}, 1) or ({n_slabs}, {n_rows})")
    return np.ascontiguousarray(array)


def seed(name: str, i_slab: int) -> int:
    return c.library().ggml_entropy_seed(name.encode(), i_slab)


def spec_of(
    kind: EntropyType, shape: tuple[int, int, int], scales: np.ndarray, offsets: np.ndarray | None, rests: np.ndarray | None = None
) -> c.Spec:
    """What C is told of a slab. It borrows scales, offsets and rests."""
    n_slabs, n_rows, n_cols = shape
    spec = c.Spec(kind, n_cols, n_rows, n_slabs, scales.ctypes.data, scales.size)
    if offsets is not None:
        spec.offsets, spec.n_offsets = offsets.ctypes.data, offsets.size
    if rests is not None:
        spec.rests = rests.ctypes.data
    return spec
