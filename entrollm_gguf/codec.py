# SPDX-License-Identifier: MIT
"""Python binding of the C codec in ggml-base: integer codes to entropy-coded slabs and back, for EQ8 and EQ4.

The bits are specified in docs/format.md and known to ggml-entropy.c alone. What is added here: numpy in and out, threads over row groups,
3-D tensors (experts), and errors as exceptions.
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

from entrollm_gguf.errors import FormatError

LANES = 32  # rows of a row group
SLAB_ALIGN = 256
HEADER_SIZE = 256
MAX_LANE_WORDS = 255
MIN_COLS = 32


class EntropyType(enum.IntEnum):
    """The entropy-coded tensor types, by their ggml type id (docs/format.md 4)."""

    EQ8 = 500
    EQ4 = 501

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code q."""
        return (-128, 127) if self is EntropyType.EQ8 else (-8, 7)

    @property
    def codes_per_symbol(self) -> int:
        """Weights that one coded byte stands for."""
        return 1 if self is EntropyType.EQ8 else 2


class CodecError(ValueError):
    """The caller's arguments cannot be encoded: a shape, a range, a scale that is no finite f16."""


class _Entry(ctypes.Structure):
    _fields_ = [("t", ctypes.c_uint8), ("bias", ctypes.c_uint8)]


class _Plan(ctypes.Structure):
    _fields_ = [
        ("table", _Entry * 256),
        ("code", ctypes.c_uint16 * 256),
        ("length", ctypes.c_uint8 * 256),
        ("n_bits", ctypes.c_uint64),
    ]


class _Header(ctypes.Structure):
    _fields_ = [
        ("magic", ctypes.c_uint8 * 4),
        ("version", ctypes.c_uint16),
        ("kind", ctypes.c_uint8),
        ("reserved0", ctypes.c_uint8),
        ("hash", ctypes.c_uint64),
        ("slab_size", ctypes.c_uint64),
        ("n_cols", ctypes.c_uint32),
        ("n_rows", ctypes.c_uint32),
        ("n_slabs", ctypes.c_uint32),
        ("tile_cols", ctypes.c_uint32),
        ("n_tiles", ctypes.c_uint32),
        ("scale_mode", ctypes.c_uint8),
        ("offset_mode", ctypes.c_uint8),
        ("scale", ctypes.c_uint16),
        ("offset", ctypes.c_float),
        ("reserved1", ctypes.c_uint32),
        ("table_at", ctypes.c_uint64),
        ("scales_at", ctypes.c_uint64),
        ("offsets_at", ctypes.c_uint64),
        ("word_offsets_at", ctypes.c_uint64),
        ("lane_words_at", ctypes.c_uint64),
        ("bitstream_at", ctypes.c_uint64),
        ("bitstream_words", ctypes.c_uint64),
        ("reserved2", ctypes.c_uint8 * 144),
    ]


class _View(ctypes.Structure):
    _fields_ = [
        ("header", ctypes.POINTER(_Header)),
        ("table", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("word_offsets", ctypes.c_void_p),
        ("lane_words", ctypes.c_void_p),
        ("bitstream", ctypes.c_void_p),
        ("n_groups", ctypes.c_int64),
        ("n_slices", ctypes.c_int64),
    ]


class _Spec(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("n_cols", ctypes.c_int64),
        ("n_rows", ctypes.c_int64),
        ("n_slabs", ctypes.c_int64),
        ("tile_cols", ctypes.c_int64),
        ("scales", ctypes.c_void_p),
        ("n_scales", ctypes.c_int64),
        ("offsets", ctypes.c_void_p),
        ("n_offsets", ctypes.c_int64),
    ]


_NO_MEMORY = 3
_PLAIN_TYPES = {1: "F16", 2: "Q4_0", 3: "Q4_1", 8: "Q8_0"}
_PLAIN_ROW_SIZE: dict[str, Callable[[int], int]] = {
    "F16": lambda n: n * 2,
    "Q4_0": lambda n: n // 32 * 18,
    "Q4_1": lambda n: n // 32 * 20,
    "Q8_0": lambda n: n // 32 * 34,
}


@functools.lru_cache(maxsize=1)
def _lib() -> ctypes.CDLL:
    """The library that holds the codec. ENTROLLM_CODEC_LIBRARY names another one (sanitizer builds).

    Raises:
        RuntimeMissingError: no patched runtime is installed.
    """
    path = os.environ.get("ENTROLLM_CODEC_LIBRARY")
    if not path:
        from entrollm_gguf import runtime

        path = str(runtime.library("ggml-base"))
    lib = ctypes.CDLL(path)
    ptr, i32, i64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    signatures = {
        "status_str": ([i32], ctypes.c_char_p),
        "check_header": ([i32, ptr, ptr, ptr], i32),
        "plain_type": ([ptr], i32),
        "open": ([ptr, ctypes.c_size_t, ptr], i32),
        "validate": ([i32, ptr, ptr, ctypes.c_size_t], i32),
        "verify_hash": ([ptr], i32),
        "verify_groups": ([ptr, i64, i64], i32),
        "verify_padding": ([ptr], i32),
        "decode_groups": ([ptr, i64, i64, ptr], i32),
        "decode_groups_plain": ([ptr, i64, i64, ptr], i32),
        "count": ([i32, i64, i64, ptr, i64, i64, ptr], i32),
        "plan_code": ([ptr, ptr], i32),
        "default_tile_cols": ([i64, i64], i64),
        "measure": ([i32, i64, i64, ptr, ptr, i64, i64, i64, ptr, ptr], i32),
        "slab_size": ([ptr, ptr], ctypes.c_size_t),
        "begin": ([ptr, ptr, ptr, ptr, ctypes.c_size_t], i32),
        "encode_groups": ([ptr, ptr, i64, i64, ptr], i32),
        "finish": ([ptr], i32),
    }
    for name, (argtypes, restype) in signatures.items():
        function = getattr(lib, "ggml_entropy_" + name)
        function.argtypes = argtypes
        function.restype = restype
    return lib


def _status(code: int) -> str:
    return _lib().ggml_entropy_status_str(code).decode()


def _check_argument(code: int) -> None:
    if code == _NO_MEMORY:
        raise MemoryError(_status(code))
    if code:
        raise CodecError(_status(code))


def _check_data(code: int, name: str) -> None:
    if code == _NO_MEMORY:
        raise MemoryError(_status(code))
    if code:
        raise FormatError(f"{name}: {_status(code)}")


def _ranges(n_groups: int, threads: int) -> list[tuple[int, int]]:
    """Cut row groups into a few ranges per thread, so that uneven rows even out."""
    n = min(n_groups, threads * 4) if threads > 1 else 1
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


def _codes_3d(kind: EntropyType, codes: np.ndarray) -> np.ndarray:
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


def count_symbols(kind: EntropyType, codes: np.ndarray, threads: int | None = None) -> np.ndarray:
    """Histogram of the coded bytes of a matrix.

    Args:
        kind: EQ8 or EQ4.
        codes: int8, shape (n_rows, n_cols).
    Returns:
        uint64, shape (256,).
    Raises:
        CodecError: a code outside the range of the type, or an impossible shape.
    """
    n_rows, n_cols = codes.shape
    lib = _lib()
    totals: list[np.ndarray] = []

    def part(group0: int, group1: int) -> int:
        counts = np.zeros(256, np.uint64)
        totals.append(counts)
        return lib.ggml_entropy_count(kind, n_rows, n_cols, codes.ctypes.data, group0, group1, counts.ctypes.data)

    codes = _codes_3d(kind, codes)[0]
    _check_argument(_run(part, -(-n_rows // LANES), _threads(threads)))
    return np.sum(totals, axis=0, dtype=np.uint64)


def entropy_bits(counts: np.ndarray) -> float:
    """Shannon entropy of a histogram times its sum: the bits an ideal memoryless coder needs.

    Args:
        counts: non-negative numbers, any shape.
    Returns:
        bits (0.0 for an empty histogram).
    """
    c = np.asarray(counts, dtype=np.float64).ravel()
    c = c[c > 0]
    return float(np.sum(c * np.log2(c.sum() / c))) if c.size else 0.0


@dataclass(frozen=True)
class CodePlan:
    """A code for given symbol counts (docs/format.md 7): what ggml_entropy_plan_code found."""

    lengths: np.ndarray  # uint8 (256,): bits of each symbol, 0 where it cannot be coded
    table: np.ndarray  # uint8 (256, 2): t and bias of the decode table
    n_bits: int  # coded size of the counted symbols
    _c: _Plan


def plan_code(counts: np.ndarray) -> CodePlan:
    """The optimal class partition for symbol counts.

    Args:
        counts: uint64, shape (256,), not all zero.
    Raises:
        CodecError: all counts are zero.
    """
    counts = np.ascontiguousarray(counts, dtype=np.uint64)
    plan = _Plan()
    _check_argument(_lib().ggml_entropy_plan_code(counts.ctypes.data, ctypes.byref(plan)))
    table = np.frombuffer(bytes(plan.table), np.uint8).reshape(256, 2)
    return CodePlan(np.array(plan.length, np.uint8), table, int(plan.n_bits), plan)


# ---- encoding ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoded:
    """A payload and what its making told."""

    payload: np.ndarray  # uint8 (n_slabs * slab_size,), as it stands in the GGUF
    entropy_bits: float  # of the codes (pairs for EQ4), summed over slabs
    coded_bits: int  # of the Huffman codes alone, without padding, tables and index
    tile_cols: int


def encode(
    kind: EntropyType,
    codes: np.ndarray,
    scales: np.ndarray,
    offsets: np.ndarray | None = None,
    *,
    tile_cols: int | None = None,
    threads: int | None = None,
) -> Encoded:
    """Entropy-code a matrix, or a stack of matrices (experts), into the payload of one tensor.

    Args:
        kind: EQ8 (codes -128..127) or EQ4 (codes -8..7).
        codes: int8, shape (n_rows, n_cols) or (n_slabs, n_rows, n_cols); n_cols a multiple of 32.
        scales: f16, shape (1,) or (n_rows,), or the same per slab.
        offsets: f32 of the same shapes, or None.
        tile_cols: columns of a tile, a multiple of 32 up to 1024; None for the default (docs/format.md 7). It is halved until no
            lane exceeds 255 words.
        threads: None for all cores.
    Raises:
        CodecError: arguments that cannot be encoded.
        MemoryError: no memory for the payload.
    """
    lib = _lib()
    n_threads = _threads(threads)
    stack = _codes_3d(kind, codes)
    n_slabs, n_rows, n_cols = stack.shape
    if np.asarray(scales).dtype != np.float16:
        raise CodecError("scales must be float16: round them before choosing codes")
    scales = _per_slab(scales, np.float16, n_slabs, n_rows, "scales")
    offsets = None if offsets is None else _per_slab(offsets, np.float32, n_slabs, n_rows, "offsets")

    histograms = [count_symbols(kind, slab, n_threads) for slab in stack]
    plans = [plan_code(counts) for counts in histograms]
    width = tile_cols or lib.ggml_entropy_default_tile_cols(n_rows, n_cols)
    lane_words, width = _measure(kind, stack, plans, width, n_threads)

    n_groups = -(-n_rows // LANES)
    specs = []
    for i in range(n_slabs):
        spec = _Spec(kind, n_cols, n_rows, n_slabs, width, scales[i].ctypes.data, scales.shape[1], None, 0)
        if offsets is not None:
            spec.offsets, spec.n_offsets = offsets[i].ctypes.data, offsets.shape[1]
        specs.append(spec)
    slab_size = max(lib.ggml_entropy_slab_size(ctypes.byref(s), w.ctypes.data) for s, w in zip(specs, lane_words))
    if slab_size == 0:
        raise CodecError(f"a matrix of {n_rows} x {n_cols} cannot be represented")

    payload = np.zeros(n_slabs * slab_size, np.uint8)
    for i in range(n_slabs):
        slab = payload.ctypes.data + i * slab_size
        plan, data = plans[i]._c, stack[i].ctypes.data
        _check_argument(lib.ggml_entropy_begin(ctypes.byref(specs[i]), ctypes.byref(plan), lane_words[i].ctypes.data, slab, slab_size))

        def part(group0: int, group1: int) -> int:
            return lib.ggml_entropy_encode_groups(ctypes.byref(plan), data, group0, group1, slab)

        _check_argument(_run(part, n_groups, n_threads))
        _check_argument(lib.ggml_entropy_finish(slab))
    return Encoded(payload, sum(map(entropy_bits, histograms)), sum(p.n_bits for p in plans), width)


def default_tile_cols(n_rows: int, n_cols: int) -> int:
    """Columns of a tile that `encode` takes for a matrix of this shape (docs/format.md 7)."""
    return _lib().ggml_entropy_default_tile_cols(n_rows, n_cols)


def _measure(kind: EntropyType, stack: np.ndarray, plans: list[CodePlan], width: int, n_threads: int) -> tuple[list[np.ndarray], int]:
    """Lane lengths of every slab at the widest tile_cols <= width that keeps each within 255 words."""
    lib = _lib()
    n_slabs, n_rows, n_cols = stack.shape
    n_groups = -(-n_rows // LANES)
    while True:
        n_tiles = n_groups * -(-n_cols // width)
        lane_words = [np.zeros((n_tiles, LANES), np.uint8) for _ in range(n_slabs)]
        longest: list[ctypes.c_int64] = []
        for slab, plan, words in zip(stack, plans, lane_words):

            def part(group0: int, group1: int) -> int:
                most = ctypes.c_int64(0)
                longest.append(most)
                return lib.ggml_entropy_measure(
                    kind, n_rows, n_cols, slab.ctypes.data, ctypes.byref(plan._c), width, group0, group1,
                    words.ctypes.data, ctypes.byref(most),
                )  # fmt: skip

            _check_argument(_run(part, n_groups, n_threads))
        if max(most.value for most in longest) <= MAX_LANE_WORDS:
            return lane_words, width
        # 512 codes of at most 15 bits are 240 words: this ends
        width = max(MIN_COLS, width // 2 // MIN_COLS * MIN_COLS)


# ---- reading -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SlabHeader:
    """What the header of a tensor's first slab says (docs/format.md 5.1)."""

    kind: EntropyType
    slab_size: int
    n_cols: int
    n_rows: int
    n_slabs: int
    tile_cols: int
    per_row_scales: bool
    offset_mode: int  # 0 none, 1 one, 2 per row
    plain_type: str  # stock GGUF type it decodes to

    @property
    def n_bytes(self) -> int:
        """Size of the tensor's payload."""
        return self.slab_size * self.n_slabs


def _ne(shape: tuple[int, ...]) -> ctypes.Array:
    """numpy shape (rows, cols) or (slabs, rows, cols) as ggml's ne[4]."""
    ne = list(reversed(shape)) + [1] * (4 - len(shape))
    return (ctypes.c_int64 * 4)(*ne)


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
    header = _Header()
    lib = _lib()
    _check_data(lib.ggml_entropy_check_header(kind, _ne(shape), raw, ctypes.byref(header)), name)
    return SlabHeader(
        kind, header.slab_size, header.n_cols, header.n_rows, header.n_slabs, header.tile_cols,
        header.scale_mode == 1, header.offset_mode, _PLAIN_TYPES[lib.ggml_entropy_plain_type(ctypes.byref(header))],
    )  # fmt: skip


def _aligned(payload: np.ndarray) -> np.ndarray:
    payload = np.ascontiguousarray(payload, dtype=np.uint8)
    return payload if payload.ctypes.data % 8 == 0 else payload.copy()


def validate(kind: EntropyType, payload: np.ndarray, shape: tuple[int, ...], name: str = "tensor") -> None:
    """Everything a decoder relies on (docs/format.md 9); does not read the bitstream.

    Raises:
        FormatError: the payload is invalid.
    """
    data = _aligned(payload)
    _check_data(_lib().ggml_entropy_validate(kind, _ne(shape), data.ctypes.data, data.size), name)


def _views(kind: EntropyType, payload: np.ndarray, shape: tuple[int, ...], name: str) -> tuple[np.ndarray, list[_View]]:
    """Validated views of all slabs, and the array that owns their memory."""
    data = _aligned(payload)
    validate(kind, data, shape, name)
    n_slabs = shape[0] if len(shape) == 3 else 1
    slab_size = data.size // n_slabs
    views = [_View() for _ in range(n_slabs)]
    for i, view in enumerate(views):
        _check_data(_lib().ggml_entropy_open(data.ctypes.data + i * slab_size, slab_size, ctypes.byref(view)), name)
    return data, views


def verify(kind: EntropyType, payload: np.ndarray, shape: tuple[int, ...], name: str = "tensor", threads: int | None = None) -> None:
    """validate, and in addition: hash, every lane holds exactly its codes, unused bytes are zero.

    Raises:
        FormatError: with what is wrong first.
    """
    lib = _lib()
    data, views = _views(kind, payload, shape, name)
    for view in views:
        ref = ctypes.byref(view)
        _check_data(lib.ggml_entropy_verify_hash(ref), name)
        _check_data(lib.ggml_entropy_verify_padding(ref), name)
        _check_data(_run(lambda g0, g1: lib.ggml_entropy_verify_groups(ref, g0, g1), view.n_groups, _threads(threads)), name)
    del data


def decode(kind: EntropyType, payload: np.ndarray, shape: tuple[int, ...], name: str = "tensor", threads: int | None = None) -> np.ndarray:
    """The integer codes.

    Returns:
        int8 of the given shape.
    Raises:
        FormatError: the payload is invalid.
    """
    lib = _lib()
    data, views = _views(kind, payload, shape, name)
    codes = np.empty(shape, np.int8)
    n_cols = shape[-1]
    matrices = codes if codes.ndim == 3 else codes[None]
    for view, matrix in zip(views, matrices):
        ref, out = ctypes.byref(view), matrix.ctypes.data

        def part(group0: int, group1: int) -> int:
            return lib.ggml_entropy_decode_groups(ref, group0, group1, out + group0 * LANES * n_cols)

        _check_data(_run(part, view.n_groups, _threads(threads)), name)
    del data
    return codes


def scales_and_offsets(
    kind: EntropyType, payload: np.ndarray, shape: tuple[int, ...], name: str = "tensor"
) -> tuple[np.ndarray, np.ndarray | None]:
    """Scales (f16) and offsets (f32, or None), shape (n_slabs, 1 or n_rows) each.

    Raises:
        FormatError: the payload is invalid.
    """
    data, views = _views(kind, payload, shape, name)
    n_rows = shape[-2]

    def array(pointer: int | None, one: np.ndarray, dtype: type) -> np.ndarray:
        if not pointer:
            return one.copy()
        n_bytes = n_rows * np.dtype(dtype).itemsize
        return np.frombuffer(ctypes.string_at(pointer, n_bytes), dtype)

    scales, offsets = [], []
    for view in views:
        header = view.header.contents
        scales.append(array(view.scales, np.array([header.scale], np.uint16).view(np.float16), np.float16))
        offsets.append(array(view.offsets, np.array([header.offset], np.float32), np.float32))
    has_offsets = views[0].header.contents.offset_mode != 0
    del data
    return np.stack(scales), np.stack(offsets) if has_offsets else None


def table(kind: EntropyType, payload: np.ndarray, shape: tuple[int, ...], name: str = "tensor") -> np.ndarray:
    """Decode tables: uint8, shape (n_slabs, 256, 2), the last axis t and bias (docs/format.md 5.2).

    Raises:
        FormatError: the payload is invalid.
    """
    data, views = _views(kind, payload, shape, name)
    tables = [np.frombuffer(ctypes.string_at(view.table, 512), np.uint8).reshape(256, 2) for view in views]
    del data
    return np.stack(tables)


def decode_plain(
    kind: EntropyType, payload: np.ndarray, shape: tuple[int, ...], name: str = "tensor", threads: int | None = None
) -> tuple[str, np.ndarray]:
    """Decode to the stock GGUF type that holds the tensor best (docs/format.md 6.1).

    Returns:
        the type's name (Q8_0, F16, Q4_0 or Q4_1) and its rows as uint8, shape (*shape[:-1], row bytes).
    Raises:
        FormatError: the payload is invalid.
    """
    lib = _lib()
    data, views = _views(kind, payload, shape, name)
    plain = _PLAIN_TYPES[lib.ggml_entropy_plain_type(views[0].header)]
    row_size = _PLAIN_ROW_SIZE[plain](shape[-1])
    rows = np.empty((*shape[:-1], row_size), np.uint8)
    matrices = rows if rows.ndim == 3 else rows[None]
    for view, matrix in zip(views, matrices):
        ref, out = ctypes.byref(view), matrix.ctypes.data

        def part(group0: int, group1: int) -> int:
            return lib.ggml_entropy_decode_groups_plain(ref, group0, group1, out + group0 * LANES * row_size)

        _check_data(_run(part, view.n_groups, _threads(threads)), name)
    del data
    return plain, rows
