# SPDX-License-Identifier: MIT
"""Python binding of the C codec in ggml-base: integer codes to entropy-coded slabs and back, for EQ8 and EQ4.

The bits are specified in docs/format.md and known to ggml-entropy.c alone. What is added here: numpy in and out, threads over row groups,
3-D tensors (experts), and errors as exceptions. `encode` makes a payload, `Payload` is an open one.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from entrollm_gguf import codec_c as c
from entrollm_gguf.errors import FormatError

GROUP_ROWS = 16  # rows of a row group
SLAB_ALIGN = 256
HEADER_SIZE = 256
MIN_COLS = 32

# of the device layout
_LANES = 32  # rows of a row group
_MAX_TILE_COLS = 1024
_MAX_LANE_WORDS = 255


class EntropyType(enum.IntEnum):
    """The entropy-coded tensor types, by their ggml type id (docs/format.md 4)."""

    EQ8 = 500
    EQ4 = 501

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code q."""
        return (-128, 127) if self is EntropyType.EQ8 else (-8, 7)


#: From here on, an f32 rounds to an infinite f16.
F16_OVERFLOW = 65520.0


def largest_weights(scales: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Largest magnitude that any code of EQ8 stands for (docs/format.md 6.1), f32.

    Args:
        scales: f16, shape (n_slabs, 1) or (n_slabs, n_rows).
        offsets: f32, the same or the other of these shapes.
    """
    low, high = (scales.astype(np.float32) * np.float32(q) + offsets for q in EntropyType.EQ8.code_range)
    return np.maximum(np.abs(low), np.abs(high))


class CodecError(ValueError):
    """The caller's arguments cannot be encoded: a shape, a range, a scale that is no finite f16."""


_PLAIN_TYPES = {1: "F16", 2: "Q4_0", 3: "Q4_1", 8: "Q8_0"}
_PLAIN_ROW_SIZE: dict[str, Callable[[int], int]] = {
    "F16": lambda n: n * 2,
    "Q4_0": lambda n: n // 32 * 18,
    "Q4_1": lambda n: n // 32 * 20,
    "Q8_0": lambda n: n // 32 * 34,
}


def _check_argument(code: int) -> None:
    if code == c.NO_MEMORY:
        raise MemoryError(c.status(code))
    if code:
        raise CodecError(c.status(code))


def _check_data(code: int, label: str) -> None:
    if code == c.NO_MEMORY:
        raise MemoryError(c.status(code))
    if code:
        raise FormatError(f"{label}: {c.status(code)}")


def _groups(n_rows: int, rows: int = GROUP_ROWS) -> int:
    """Row groups of a matrix."""
    return -(-n_rows // rows)


def _ranges(n_groups: int, threads: int) -> list[tuple[int, int]]:
    """Cut row groups into a few ranges per thread, so that uneven rows even out."""
    n = max(1, min(n_groups, threads * 4)) if threads > 1 else 1
    edges = [n_groups * i // n for i in range(n + 1)]
    return list(itertools.pairwise(edges))


def _run(function: Callable[[int, int], int], n_groups: int, threads: int) -> int:
    """Call function(group0, group1) over all groups, on threads (ctypes releases the GIL). Returns the first status that is not 0."""
    ranges = _ranges(n_groups, threads)
    if len(ranges) == 1:
        return function(*ranges[0])
    with ThreadPoolExecutor(threads) as pool:
        return next((code for code in list(pool.map(lambda r: function(*r), ranges)) if code), 0)


def _threads(threads: int | None) -> int:
    return threads if threads else os.cpu_count() or 1


def _codes_3d(codes: np.ndarray) -> np.ndarray:
    if codes.dtype != np.int8 or codes.ndim not in (2, 3):
        raise CodecError(f"codes must be int8 of 2 or 3 dimensions, not {codes.dtype} of {codes.ndim}")
    codes = np.ascontiguousarray(codes)
    return codes[None] if codes.ndim == 2 else codes


def _per_slab(values: np.ndarray, dtype: type, n_slabs: int, n_rows: int, what: str) -> np.ndarray:
    """Bring scales or offsets to shape (n_slabs, 1 or n_rows)."""
    array = np.ascontiguousarray(values, dtype=dtype)
    if array.ndim < 2:
        array = array.reshape(1, -1)
    if array.shape[0] == 1 and n_slabs > 1:
        array = np.repeat(array, n_slabs, axis=0)
    if array.shape not in ((n_slabs, 1), (n_slabs, n_rows)):
        raise CodecError(f"{what} have shape {array.shape}, expected ({n_slabs}, 1) or ({n_slabs}, {n_rows})")
    return np.ascontiguousarray(array)


# ---- statistics and the code -------------------------------------------------------------------------------------------------------


def count_codes(kind: EntropyType, codes: np.ndarray, threads: int | None = None) -> np.ndarray:
    """Histogram of the codes of a matrix, or of all matrices of a stack together.

    Args:
        kind: EQ8 or EQ4.
        codes: int8, shape (n_rows, n_cols) or (n_slabs, n_rows, n_cols).
    Returns:
        uint64, shape (256,); code q is counted at q + 128.
    Raises:
        CodecError: a code outside the range of the type, or an impossible shape.
    """
    stack = _codes_3d(codes)
    rows = stack.reshape(-1, stack.shape[-1])
    return _histogram(c.library().ggml_entropy_count, kind, rows, GROUP_ROWS, _threads(threads))


def _histogram(count: Callable[..., int], kind: EntropyType, matrix: np.ndarray, rows_of_group: int, n_threads: int) -> np.ndarray:
    n_rows, n_cols = matrix.shape
    totals: list[np.ndarray] = []

    def part(group0: int, group1: int) -> int:
        counts = np.zeros(256, np.uint64)
        totals.append(counts)
        return count(kind, n_rows, n_cols, matrix.ctypes.data, group0, group1, counts.ctypes.data)

    _check_argument(_run(part, _groups(n_rows, rows_of_group), n_threads))
    return np.sum(totals, axis=0, dtype=np.uint64)


def entropy_bits(counts: np.ndarray) -> float:
    """Shannon entropy of a histogram times its sum: the bits an ideal memoryless coder needs.

    Args:
        counts: non-negative numbers, any shape.
    Returns:
        bits (0.0 for an empty histogram).
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

    def __add__(self, other: CodeUsage) -> CodeUsage:
        return CodeUsage(self.direct + other.direct, self.tail + other.tail, self.far + other.far)


@dataclass(frozen=True)
class Code:
    """The code of one slab (docs/format.md 5.2): most weights take `raw_bits` bits, the others go on in a tail."""

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
        """First and last code of the direct interval. Codes are taken modulo 256, so the last can be the smaller."""
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
        """Bits of the tail that names each class. A digit of w bits names 2^w - 1 of them, its last value says to go on."""
        bits: list[int] = []
        read = 0
        for width in self.digits:
            read += width
            bits += [read] * ((1 << width) - 1)
        return tuple(bits)

    def parts(self) -> np.ndarray:
        """Where an encoder puts each code: int64 (256,), index q + 128; -1 is direct, i >= 0 the class, `len(class_base)` far."""
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


def _code_of(struct: c.Code) -> Code:
    n_classes = sum((1 << width) - 1 for width in _tail_digits(struct.tail))
    return Code(struct.raw_bits, struct.bin_bits, struct.tail, struct.base, tuple(struct.class_base[:n_classes]))


def _struct_of(code: Code) -> c.Code:
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
    """
    counts = np.ascontiguousarray(counts, dtype=np.uint64)
    plan = c.Plan()
    _check_argument(c.library().ggml_entropy_plan_code(counts.ctypes.data, ctypes.byref(plan)))
    return CodePlan(_code_of(plan.code), np.array(plan.length, np.uint8), plan.n_bits, plan.n_tail, plan.n_far)


def expected_size(shape: tuple[int, ...], coded_bits: float, fill_bits: float) -> int:
    """Bytes in a file, to a few hundred, of a tensor whose codes take coded_bits, with a scale for each row and no offsets (docs/format.md 5).

    Args:
        shape: (n_rows, n_cols) or (n_slabs, n_rows, n_cols).
        fill_bits: of a weight in the rows that fill up the last row group: the raw bits of the code.
    """
    n_slabs = shape[0] if len(shape) == 3 else 1
    n_rows, n_cols = shape[-2:]
    n_groups = _groups(n_rows)
    index_at = HEADER_SIZE + _align(2 * n_rows, 64)
    body_at = index_at + _align(4 * n_groups, 64)
    # a group is padded to 8 bytes: 3.5 on average, and half a byte at the end of the tail's bits
    body = coded_bits / n_slabs / 8 + (n_groups * GROUP_ROWS - n_rows) * n_cols * fill_bits / 8 + 4 * n_groups
    return n_slabs * (_align(body_at + int(body), SLAB_ALIGN) + 256)  # the slack


def _align(n: int, to: int) -> int:
    return -(-n // to) * to


# ---- encoding ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoded:
    """A payload and what its making told."""

    payload: np.ndarray  # uint8 (n_slabs * slab_size,), as it stands in the GGUF
    entropy_bits: float  # of the codes, summed over slabs
    coded_bits: int  # of the codes alone: raw bits, tails and far bytes without padding and index
    tile_cols: int  # of the device layout


def encode(
    kind: EntropyType,
    codes: np.ndarray,
    scales: np.ndarray,
    offsets: np.ndarray | None = None,
    *,
    name: str = "",
    tile_cols: int | None = None,
    threads: int | None = None,
) -> Encoded:
    """Entropy-code a matrix, or a stack of matrices (experts), into the payload of one tensor.

    Args:
        kind: EQ8 (codes -128..127) or EQ4 (codes -8..7).
        codes: int8, shape (n_rows, n_cols) or (n_slabs, n_rows, n_cols); n_cols a multiple of 32.
        scales: f16, shape (1,) or (n_rows,), or the same per slab.
        offsets: f32 of the same shapes, or None.
        name: of the tensor in the GGUF; the hash takes it in.
        tile_cols: columns of a tile of the device layout, a multiple of 32 up to 1024; None for the default. It is halved until no
            lane exceeds 255 words.
        threads: None for all cores.
    Raises:
        CodecError: arguments that cannot be encoded.
        MemoryError: no memory for the payload.
    """
    lib = c.library()
    n_threads = _threads(threads)
    stack = _codes_3d(codes)
    n_slabs, n_rows, n_cols = stack.shape
    if np.asarray(scales).dtype != np.float16:
        raise CodecError("scales must be float16: round them before choosing codes")
    scales = _per_slab(scales, np.float16, n_slabs, n_rows, "scales")
    offsets = None if offsets is None else _per_slab(offsets, np.float32, n_slabs, n_rows, "offsets")

    histograms = [count_codes(kind, slab, n_threads) for slab in stack]
    plans = [plan_code(counts) for counts in histograms]
    structs = [_struct_of(plan.code) for plan in plans]
    extents = [_measure(kind, slab, code, n_threads) for slab, code in zip(stack, structs)]

    specs = [_spec(kind, stack.shape, scales[i], None if offsets is None else offsets[i]) for i in range(n_slabs)]
    _plan_lanes(stack, specs, tile_cols, n_threads)
    sizes = [lib.ggml_entropy_slab_size(ctypes.byref(s), ctypes.byref(code), e) for s, code, e in zip(specs, structs, extents)]
    slab_size = max(sizes)
    if 0 in sizes:
        raise CodecError(f"a matrix of {n_rows} x {n_cols} cannot be represented")

    payload = np.zeros(n_slabs * slab_size, np.uint8)
    for i, (slab_codes, spec, code, extent) in enumerate(zip(stack, specs, structs, extents)):
        slab, data = payload.ctypes.data + i * slab_size, slab_codes.ctypes.data
        _check_argument(lib.ggml_entropy_begin(ctypes.byref(spec), ctypes.byref(code), extent, slab, slab_size))
        encode_groups = functools.partial(lib.ggml_entropy_encode_groups, data)
        _check_argument(_run(lambda group0, group1: encode_groups(group0, group1, slab), _groups(n_rows), n_threads))
        _check_argument(lib.ggml_entropy_finish(slab, _seed(name, i)))
    coded_bits = sum(plan.n_bits for plan in plans)
    return Encoded(payload, sum(map(entropy_bits, histograms)), coded_bits, specs[0].tile_cols)


def _seed(name: str, i_slab: int) -> int:
    return c.library().ggml_entropy_seed(name.encode(), i_slab)


def _spec(kind: EntropyType, shape: tuple[int, int, int], scales: np.ndarray, offsets: np.ndarray | None) -> c.Spec:
    """What C is told of a slab. It borrows scales and offsets."""
    n_slabs, n_rows, n_cols = shape
    spec = c.Spec(kind, n_cols, n_rows, n_slabs, scales.ctypes.data, scales.size)
    if offsets is not None:
        spec.offsets, spec.n_offsets = offsets.ctypes.data, offsets.size
    return spec


def _measure(kind: EntropyType, codes: np.ndarray, code: c.Code, n_threads: int) -> ctypes.Array:
    """Extents of all row groups of a matrix."""
    n_rows, n_cols = codes.shape
    extents = (c.Extent * _groups(n_rows))()

    def part(group0: int, group1: int) -> int:
        return c.library().ggml_entropy_measure(
            kind, n_rows, n_cols, codes.ctypes.data, ctypes.byref(code), group0, group1, extents
        )  # fmt: skip

    _check_argument(_run(part, _groups(n_rows), n_threads))
    return extents


# ---- the device layout (docs/format.md 8) ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Lanes:
    """The code of a slab in the device layout, and the lengths of its lanes."""

    plan: c.LanesPlan
    words: np.ndarray  # uint8 (n_tiles, 32)
    longest: int  # words of the longest lane; above 255 `words` is wrong


def _lanes_plan(kind: EntropyType, codes: np.ndarray, n_threads: int) -> c.LanesPlan:
    counts = _histogram(c.library().ggml_entropy_lanes_count, kind, codes, _LANES, n_threads)
    plan = c.LanesPlan()
    _check_argument(c.library().ggml_entropy_lanes_plan_code(counts.ctypes.data, ctypes.byref(plan)))
    return plan


def _lanes_measure(kind: EntropyType, codes: np.ndarray, plan: c.LanesPlan, tile_cols: int, n_threads: int) -> _Lanes:
    n_rows, n_cols = codes.shape
    n_groups = _groups(n_rows, _LANES)
    words = np.zeros((n_groups * -(-n_cols // tile_cols), _LANES), np.uint8)
    longest: list[ctypes.c_int64] = []

    def part(group0: int, group1: int) -> int:
        most = ctypes.c_int64(0)
        longest.append(most)
        return c.library().ggml_entropy_lanes_measure(
            kind, n_rows, n_cols, codes.ctypes.data, ctypes.byref(plan), tile_cols, group0, group1, words.ctypes.data, ctypes.byref(most)
        )  # fmt: skip

    _check_argument(_run(part, n_groups, n_threads))
    return _Lanes(plan, words, max(most.value for most in longest))


def _plan_lanes(stack: np.ndarray, specs: list[c.Spec], tile_cols: int | None, n_threads: int) -> None:
    """Fill in tile_cols and device_size of all slabs: the widest tiles that keep each lane within 255 words, and the longest slab.

    Raises:
        CodecError: tile_cols is impossible.
    """
    lib = c.library()
    kind = EntropyType(specs[0].type)
    _, n_rows, n_cols = stack.shape
    width = lib.ggml_entropy_lanes_default_tile_cols(n_rows, n_cols) if tile_cols is None else tile_cols
    if width % MIN_COLS or not MIN_COLS <= width <= _MAX_TILE_COLS:
        raise CodecError(f"tile_cols {width}: must be a multiple of {MIN_COLS} from {MIN_COLS} to {_MAX_TILE_COLS}")
    plans = [_lanes_plan(kind, codes, n_threads) for codes in stack]
    while True:
        lanes = [_lanes_measure(kind, codes, plan, width, n_threads) for codes, plan in zip(stack, plans)]
        if max(one.longest for one in lanes) <= _MAX_LANE_WORDS:
            break
        # 512 codes of at most 15 bits are 240 words: this ends
        width = max(MIN_COLS, width // 2 // MIN_COLS * MIN_COLS)
    for spec in specs:
        spec.tile_cols = width
    sizes = [lib.ggml_entropy_lanes_size(ctypes.byref(spec), one.words.ctypes.data) for spec, one in zip(specs, lanes)]
    if 0 in sizes:
        raise CodecError(f"a matrix of {n_rows} x {n_cols} cannot be represented in the device layout")
    for spec in specs:
        spec.device_size = max(sizes)


# ---- reading -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SlabHeader:
    """What the header of a tensor's first slab says (docs/format.md 5.1)."""

    kind: EntropyType
    slab_size: int
    n_cols: int
    n_rows: int
    n_slabs: int
    tile_cols: int  # of the device layout
    device_size: int  # bytes of a slab in the device layout
    per_row_scales: bool
    offset_mode: int  # 0 none, 1 one, 2 per row
    plain_type: str  # stock GGUF type it decodes to
    code: Code  # of the first slab

    @property
    def n_bytes(self) -> int:
        """Size of the tensor's payload."""
        return self.slab_size * self.n_slabs

    @property
    def device_bytes(self) -> int:
        """Size of the tensor in the device layout."""
        return self.device_size * self.n_slabs


def _ne(shape: tuple[int, ...]) -> ctypes.Array:
    """numpy shape (rows, cols) or (slabs, rows, cols) as ggml's ne[4]."""
    ne = list(reversed(shape)) + [1] * (4 - len(shape))
    return (ctypes.c_int64 * 4)(*ne)


def _slab_header(kind: EntropyType, header: c.Header) -> SlabHeader:
    return SlabHeader(
        kind, header.slab_size, header.n_cols, header.n_rows, header.n_slabs, header.tile_cols, header.device_size,
        header.scale_mode == 1, header.offset_mode, _PLAIN_TYPES[c.library().ggml_entropy_plain_type(ctypes.byref(header))],
        _code_of(header.code),
    )  # fmt: skip


def read_header(kind: EntropyType, head: bytes | np.ndarray, shape: tuple[int, ...], name: str = "tensor") -> SlabHeader:
    """Check the first 256 bytes of a payload against the GGUF's type and shape.

    Args:
        head: at least 256 bytes.
        shape: (n_rows, n_cols) or (n_slabs, n_rows, n_cols).
        name: for the message.
    Raises:
        FormatError: the header is invalid or names another type or shape.
    """
    raw = bytes(head[:HEADER_SIZE])
    if len(raw) < HEADER_SIZE:
        raise FormatError(f"{name}: the data is shorter than a slab header")
    header = c.Header()
    _check_data(c.library().ggml_entropy_check_header(kind, _ne(shape), raw, ctypes.byref(header)), name)
    return _slab_header(kind, header)


class Payload:
    """The data of an entropy-coded tensor, validated once (docs/format.md 9), and all that can be read from it.

    It holds the memory for as long as it lives; memory that is not 8-byte aligned is copied.
    """

    def __init__(self, kind: EntropyType, data: np.ndarray, shape: tuple[int, ...], name: str = "", *, label: str | None = None) -> None:
        """Open and validate.

        Args:
            kind: EQ8 or EQ4.
            data: uint8, all slabs.
            shape: true shape, (n_rows, n_cols) or (n_slabs, n_rows, n_cols).
            name: of the tensor in the GGUF, which its hash takes in.
            label: what messages call it; its name by default.
        Raises:
            FormatError: the payload is invalid.
        """
        self.kind, self.shape, self.name = kind, tuple(shape), name
        self.label = label or name or "tensor"
        data = np.ascontiguousarray(data, dtype=np.uint8)
        self._data = data if data.ctypes.data % 8 == 0 else data.copy()
        self._check(c.library().ggml_entropy_validate(kind, _ne(self.shape), self._data.ctypes.data, self._data.size))
        self.header = read_header(kind, self._data, self.shape, self.label)
        self._views = [c.View() for _ in range(self.header.n_slabs)]
        for i, view in enumerate(self._views):
            self._check(c.library().ggml_entropy_open(self._slab(i), self.header.slab_size, ctypes.byref(view)))

    def check_plain(self) -> None:
        """That the stock type of `plain` holds every weight: an f16 ends at 65504.

        Raises:
            FormatError: it does not.
        """
        if self.header.plain_type != "F16":  # the others hold scale and offset themselves
            return
        largest = largest_weights(*self.scales_and_offsets()).max()
        if not largest < F16_OVERFLOW:
            raise FormatError(
                f"{self.label}: has weights up to {largest:.6g}, which would be infinite as F16; "
                "run it in fused mode (GGML_ENTROPY_MODE=fused), or convert the model again"
            )

    def verify(self, threads: int | None = None) -> None:
        """The hash, that every row group holds exactly its codes, that unused bytes are zero, and `check_plain`.

        Raises:
            FormatError: with what is wrong first.
        """
        lib = c.library()
        for i, view in enumerate(self._views):
            ref = ctypes.byref(view)
            self._check(lib.ggml_entropy_verify_hash(ref, self._slab(i), _seed(self.name, i)))
            self._check(lib.ggml_entropy_verify_padding(ref, self._slab(i)))
            self._check(_run(functools.partial(lib.ggml_entropy_verify_groups, ref), view.n_groups, _threads(threads)))
        self.check_plain()

    def codes(self, threads: int | None = None) -> np.ndarray:
        """The integer codes, int8 of the tensor's shape."""
        return self._decode_slabs(self._decode_codes, np.int8, self.header.n_cols, threads)

    def plain(self, threads: int | None = None) -> tuple[str, np.ndarray]:
        """Decode to the stock GGUF type that holds the tensor best (docs/format.md 6.1).

        Returns:
            the type's name (Q8_0, F16, Q4_0 or Q4_1) and its rows as uint8, shape (*shape[:-1], row bytes).
        Raises:
            FormatError: the type does not hold the weights.
        """
        self.check_plain()
        name = self.header.plain_type
        return name, self._decode_slabs(self._decode_plain, np.uint8, _PLAIN_ROW_SIZE[name](self.header.n_cols), threads)

    def scales_and_offsets(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Scales (f16) and offsets (f32, or None), shape (n_slabs, 1 or n_rows) each."""

        def array(pointer: int | None, one: np.ndarray) -> np.ndarray:
            if not pointer:
                return one.copy()
            return np.frombuffer(ctypes.string_at(pointer, self.header.n_rows * one.itemsize), one.dtype)

        scales = [array(view.scales, np.array([view.header.scale], np.uint16).view(np.float16)) for view in self._views]
        offsets = [array(view.offsets, np.array([view.header.offset], np.float32)) for view in self._views]
        return np.stack(scales), np.stack(offsets) if self.header.offset_mode != 0 else None

    def code_parameters(self) -> list[Code]:
        """The code of each slab."""
        return [_code_of(view.header.code) for view in self._views]

    def counts(self, threads: int | None = None) -> np.ndarray:
        """Histogram of the codes of each slab: uint64 (n_slabs, 256), index q + 128. One slab is decoded at a time."""
        # damaged data of EQ4 can decode to any code, so the range of EQ8 is right for both
        matrices = (self._matrix(i, threads) for i in range(len(self._views)))
        return np.stack([count_codes(EntropyType.EQ8, matrix, threads) for matrix in matrices])

    def to_lanes(self, threads: int | None = None) -> np.ndarray:
        """The device layout of all slabs, uint8 (n_slabs * device_size,).

        Raises:
            FormatError: the codes do not fit into device_size bytes, which happens to damaged data alone.
        """
        lib = c.library()
        n_threads = _threads(threads)
        size, stack = self.header.device_size, (self.header.n_slabs, self.header.n_rows, self.header.n_cols)
        lanes = np.zeros(self.header.device_bytes, np.uint8)
        scales, offsets = self.scales_and_offsets()
        for i in range(len(self._views)):
            codes = self._matrix(i, threads)
            spec = _spec(self.kind, stack, scales[i], None if offsets is None else offsets[i])
            spec.tile_cols, spec.device_size = self.header.tile_cols, size
            one = _lanes_measure(self.kind, codes, _lanes_plan(self.kind, codes, n_threads), spec.tile_cols, n_threads)
            words, plan = one.words.ctypes.data, ctypes.byref(one.plan)
            if one.longest > _MAX_LANE_WORDS or not 0 < lib.ggml_entropy_lanes_size(ctypes.byref(spec), words) <= size:
                raise FormatError(f"{self.label}: the codes do not fit into the device layout that the header promises")
            slab = lanes.ctypes.data + i * size
            self._check(lib.ggml_entropy_lanes_begin(ctypes.byref(spec), plan, words, slab, size))
            encode_groups = functools.partial(lib.ggml_entropy_lanes_encode_groups, plan, codes.ctypes.data)
            n_groups = _groups(self.header.n_rows, _LANES)
            self._check(_run(lambda group0, group1: encode_groups(group0, group1, slab), n_groups, n_threads))
        return lanes

    def _slab(self, i: int) -> int:
        return self._data.ctypes.data + i * self.header.slab_size

    def _check(self, code: int) -> None:
        _check_data(code, self.label)

    def _matrix(self, i: int, threads: int | None) -> np.ndarray:
        """Codes of slab i, int8 (n_rows, n_cols)."""
        codes = np.empty((self.header.n_rows, self.header.n_cols), np.int8)
        self._decode_slab(self._views[i], self._decode_codes, codes, threads)
        return codes

    def _decode_slabs(self, decode: Callable[..., int], dtype: type, row_size: int, threads: int | None) -> np.ndarray:
        out = np.empty((self.header.n_slabs, self.header.n_rows, row_size), dtype)
        for view, matrix in zip(self._views, out):
            self._decode_slab(view, decode, matrix, threads)
        return out.reshape(*self.shape[:-1], row_size)

    def _decode_slab(self, view: c.View, decode: Callable[..., int], out: np.ndarray, threads: int | None) -> None:
        """Run decode(view, group0, group1, address of row 16 * group0 of out) over all row groups."""
        # a mapped file may have changed between the header that `out` was made for and the one that says how much is decoded
        if (view.header.n_rows, view.header.n_cols) != (self.header.n_rows, self.header.n_cols):
            raise FormatError(f"{self.label}: the file was changed while it was read")
        ref, data, group_bytes = ctypes.byref(view), out.ctypes.data, GROUP_ROWS * out.strides[0]
        self._check(_run(lambda g0, g1: decode(ref, g0, g1, data + g0 * group_bytes), view.n_groups, _threads(threads)))

    def _decode_codes(self, view: object, group0: int, group1: int, out: int) -> int:
        return c.library().ggml_entropy_decode_groups(view, group0, group1, out)

    def _decode_plain(self, view: object, group0: int, group1: int, out: int) -> int:
        plain = next(number for number, name in _PLAIN_TYPES.items() if name == self.header.plain_type)
        return c.library().ggml_entropy_decode_groups_plain(view, group0, group1, plain, out)


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
