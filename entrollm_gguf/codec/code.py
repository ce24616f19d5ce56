# SPDX-License-Identifier: MIT
"""How a code is made from counts, and what it looks like (docs/format.md 5.2 and 7)."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from entrollm_gguf.codec import c
from entrollm_gguf.codec.shared import (
    GROUP_ROWS,
    HEADER_SIZE,
    SLAB_ALIGN,
    CodecError,
    EntropyType,
    as_stack,
    check_argument,
    n_groups_of,
    n_threads_of,
    run_groups,
)


def count_codes(kind: EntropyType, codes: np.ndarray, threads: int | None = None) -> np.ndarray:
    """Histogram of the codes of a matrix, or of all matrices of a stack together.

    Args:
        kind: of the tensor; its range of codes is checked.
        codes: int8, shape (n_rows, n_cols) or (n_slabs, n_rows, n_cols).
    Returns:
        uint64, shape (256,); code q is counted at q + 128.
    Raises:
        CodecError: a code outside the range of the type, or an impossible shape.

    >>> counts = count_codes(EntropyType.EQ8, np.array([[0, 0, 3, -1] * 8], np.int8))
    >>> counts[[127, 128, 131]].tolist()
    [8, 16, 8]
    """
    stack = as_stack(codes)
    rows = stack.reshape(-1, stack.shape[-1])
    return histogram(c.library().ggml_entropy_count, kind, rows, GROUP_ROWS, n_threads_of(threads))


def histogram(count: Callable[..., int], kind: EntropyType, matrix: np.ndarray, rows_of_group: int, n_threads: int) -> np.ndarray:
    n_rows, n_cols = matrix.shape
    totals: list[np.ndarray] = []

    def part(group0: int, group1: int) -> int:
        counts = np.zeros(256, np.uint64)
        totals.append(counts)
        return count(kind, n_rows, n_cols, matrix.ctypes.data, group0, group1, counts.ctypes.data)

    check_argument(run_groups(part, n_groups_of(n_rows, rows_of_group), n_threads))
    return np.sum(totals, axis=0, dtype=np.uint64)


def entropy_bits(counts: np.ndarray) -> float:
    """Shannon entropy of a histogram times its sum: the bits an ideal memoryless coder needs.

    Args:
        counts: non-negative numbers, any shape.
    Returns:
        bits (0.0 for an empty histogram).

    >>> entropy_bits(np.array([2, 2, 4]))  # 1.5 bits for each of 8
    12.0
    """
    n = np.asarray(counts, dtype=np.float64).ravel()
    n = n[n > 0]
    return float(np.sum(n * np.log2(n.sum() / n))) if n.size else 0.0


@dataclass(frozen=True)
class CodeUsage:
    """How many weights take which part of a code."""

    direct: int  # raw bits alone
    tail: int  # raw bits and a tail that names a class
    far: int  # raw bits, a whole tail, and a byte


@dataclass(frozen=True)
class Code:
    """The code of one slab (docs/format.md 5.2): most weights take `raw_bits` bits, the others go
    on in a tail.

    >>> counts = np.zeros(256, np.uint64)
    >>> counts[[127, 128, 129, 131]] = 100, 800, 90, 10
    >>> code = plan_code(counts).code
    >>> code.raw_bits, code.direct, code.classes
    (1, (0, 0), ((1, 1), (-1, -1), (3, 3), (2, 2), (-2, -2), (-3, -3), (-4, -4), (-5, -5)))
    >>> code.lengths()[[128, 127, 131]].tolist()  # bits of the codes 0, -1 and 3
    [1, 3, 5]
    >>> code.usage(counts)
    CodeUsage(direct=800, tail=200, far=0)
    """

    raw_bits: int  # B, 1..8
    bin_bits: int  # k: a class is 2^k codes
    tail: int  # number of a tail shape; 0 for none
    base: int  # first code of the direct interval
    class_base: tuple[int, ...]  # first code of each class

    @property
    def n_direct(self) -> int:
        """Codes of the direct interval: those whose raw bits are all."""
        return 256 if self.raw_bits == 8 else (1 << self.raw_bits) - (1 << self.bin_bits)

    @property
    def direct(self) -> tuple[int, int]:
        """First and last code of the direct interval. Codes are taken modulo 256, so the last can
        be the smaller."""
        return self.base, _as_i8(self.base + self.n_direct - 1)

    @property
    def bin_width(self) -> int:
        """Codes of a class."""
        return 1 << self.bin_bits

    @property
    def classes(self) -> tuple[tuple[int, int], ...]:
        """First and last code of each class, modulo 256 as `direct`."""
        return tuple((base, _as_i8(base + self.bin_width - 1)) for base in self.class_base)

    @property
    def digits(self) -> tuple[int, ...]:
        """Widths in bits of the tail's digits, in the order in which they are read."""
        return _tail_digits(self.tail)

    @property
    def n_planes(self) -> int:
        """Bit planes of a whole tail."""
        return sum(self.digits)

    @property
    def class_bits(self) -> tuple[int, ...]:
        """Bits of the tail that names each class. A digit of w bits names 2^w - 1 of them, its last
        value says to go on."""
        bits: list[int] = []
        read = 0
        for width in self.digits:
            read += width
            bits += [read] * ((1 << width) - 1)
        return tuple(bits)

    def parts(self) -> np.ndarray:
        """Where an encoder puts each code: int64 (256,), index q + 128; -1 is direct, i >= 0 the
        class, `len(class_base)` far."""
        q = np.arange(-128, 128)
        parts = np.full(256, len(self.class_base))
        for i in reversed(range(len(self.class_base))):  # where classes overlap, the first counts
            parts[(q - self.class_base[i]) % 256 < self.bin_width] = i
        parts[(q - self.base) % 256 < self.n_direct] = -1
        return parts

    def lengths(self) -> np.ndarray:
        """Bits of each code: int64 (256,), index q + 128."""
        tails = [*self.class_bits, self.n_planes + 8, 0]  # the last one is for -1
        return self.raw_bits + np.array(tails)[self.parts()]

    def usage(self, counts: np.ndarray) -> CodeUsage:
        """What weights with this histogram of codes take.

        Args:
            counts: (256,), index q + 128.
        """
        parts, n_far = self.parts(), len(self.class_base)
        n_weights, far, direct = (int(counts[which].sum()) for which in (slice(None), parts == n_far, parts == -1))
        return CodeUsage(direct, n_weights - direct - far, far)


def _as_i8(number: int) -> int:
    return (number + 128) % 256 - 128


@functools.lru_cache
def _tail_digits(number: int) -> tuple[int, ...]:
    shape = c.library().ggml_entropy_tail_of(number)
    if not shape:
        raise CodecError(f"there is no tail shape {number}")
    return tuple(shape.contents.width[: shape.contents.n_digits])


def code_of(struct: c.Code) -> Code:
    n_classes = sum((1 << width) - 1 for width in _tail_digits(struct.tail))
    return Code(struct.raw_bits, struct.bin_bits, struct.tail, struct.base, tuple(struct.class_base[:n_classes]))


def struct_of(code: Code) -> c.Code:
    return c.Code(code.raw_bits, code.bin_bits, code.tail, code.base, (ctypes.c_int8 * c.MAX_CLASSES)(*code.class_base))


@dataclass(frozen=True)
class CodePlan:
    """A code for given counts (docs/format.md 7): what ggml_entropy_plan_code found."""

    code: Code
    lengths: np.ndarray  # uint8 (256,): bits of each code, index q + 128
    n_bits: int  # of the counted codes
    n_tail: int  # of them, those that have a tail, far ones included
    n_far: int  # of them, those that stand as a byte


def plan_code(counts: np.ndarray) -> CodePlan:
    """The best code for a histogram.

    Args:
        counts: uint64, shape (256,), not all zero; index q + 128.
    Raises:
        CodecError: all counts are zero.

    >>> counts = np.zeros(256, np.uint64)
    >>> counts[[127, 128, 129]] = 100, 800, 100
    >>> plan = plan_code(counts)
    >>> plan.n_bits, plan.n_tail, plan.lengths[[127, 128, 129]].tolist()
    (1300, 200, [3, 1, 2])
    """
    counts = np.ascontiguousarray(counts, dtype=np.uint64)
    plan = c.Plan()
    check_argument(c.library().ggml_entropy_plan_code(counts.ctypes.data, ctypes.byref(plan)))
    return CodePlan(code_of(plan.code), np.array(plan.length, np.uint8), plan.n_bits, plan.n_tail, plan.n_far)


def expected_size(shape: tuple[int, ...], coded_bits: float, fill_bits: float) -> int:
    """Size of a tensor in the file, right to a few hundred bytes, if its codes take coded_bits. It
    has a scale for each row and no offsets (docs/format.md 5).

    Args:
        shape: (n_rows, n_cols) or (n_slabs, n_rows, n_cols).
        fill_bits: of a weight in the rows that fill up the last row group: the raw bits of the
            code.

    >>> expected_size((64, 128), coded_bits=64 * 128 * 4.5, fill_bits=4)
    5376
    """
    n_slabs = shape[0] if len(shape) == 3 else 1
    n_rows, n_cols = shape[-2:]
    n_groups = n_groups_of(n_rows)
    index_at = HEADER_SIZE + align(2 * n_rows, 64)
    body_at = index_at + align(4 * n_groups, 64)
    # a group is padded to 8 bytes: 3.5 on average, and half a byte at the end of the tail's bits
    body = coded_bits / n_slabs / 8 + (n_groups * GROUP_ROWS - n_rows) * n_cols * fill_bits / 8 + 4 * n_groups
    return n_slabs * (align(body_at + int(body), SLAB_ALIGN) + 256)  # the slack


def align(n: int, to: int) -> int:
    return -(-n // to) * to
