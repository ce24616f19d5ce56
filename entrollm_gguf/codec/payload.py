# SPDX-License-Identifier: MIT
"""Reading payloads: each is validated once, and then everything in it can be asked for."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from entrollm_gguf.codec import c
from entrollm_gguf.codec.code import Code, code_of, count_codes
from entrollm_gguf.codec.lanes import lanes_plan, measure_lanes
from entrollm_gguf.codec.shared import (
    GROUP_ROWS,
    HEADER_SIZE,
    LANES,
    MAX_LANE_WORDS,
    CodecError,
    EntropyType,
    check_data,
    largest_weights,
    n_groups_of,
    n_threads_of,
    run_groups,
    seed,
    spec_of,
)
from entrollm_gguf.errors import FormatError


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
        header.scale_mode == 1, header.offset_mode, c.type_name(c.library().ggml_entropy_plain_type(ctypes.byref(header))),
        code_of(header.code),
    )  # fmt: skip


def read_header(kind: EntropyType, head: bytes | np.ndarray, shape: tuple[int, ...], name: str = "tensor") -> SlabHeader:
    """Check the first 256 bytes of a payload against the GGUF's type and shape.

    Args:
        head: at least 256 bytes.
        shape: (n_rows, n_cols) or (n_slabs, n_rows, n_cols).
        name: for the message.
    Raises:
        FormatError: the header is invalid or names another type or shape.

    >>> from entrollm_gguf.codec import encode
    >>> codes = np.ones((3, 16, 64), np.int8)
    >>> payload = encode(EntropyType.EQ4, codes, np.ones(1, np.float16)).payload
    >>> header = read_header(EntropyType.EQ4, payload[:256], codes.shape)
    >>> header.n_slabs, header.n_bytes, header.plain_type
    (3, 2304, 'Q4_0')
    """
    raw = bytes(head[:HEADER_SIZE])
    if len(raw) < HEADER_SIZE:
        raise FormatError(f"{name}: the data is shorter than a slab header")
    header = c.Header()
    check_data(c.library().ggml_entropy_check_header(kind, _ne(shape), raw, ctypes.byref(header)), name)
    return _slab_header(kind, header)


class Payload:
    """The data of an entropy-coded tensor, validated once (docs/format.md 9), and all that can be
    read from it.

    It holds the memory for as long as it lives; memory that is not 8-byte aligned is copied.

    >>> from entrollm_gguf.codec import encode
    >>> codes = np.arange(-16, 16, dtype=np.int8).reshape(1, 32)
    >>> data = encode(EntropyType.EQ8, codes, np.array([0.5], np.float16), name="w").payload
    >>> payload = Payload(EntropyType.EQ8, data, codes.shape, "w")
    >>> payload.verify()
    >>> payload.codes()[0, :3].tolist(), payload.header.plain_type
    ([-16, -15, -14], 'Q8_0')
    """

    def __init__(self, kind: EntropyType, data: np.ndarray, shape: tuple[int, ...], name: str = "", *, label: str | None = None) -> None:
        """Open and validate: everything that a decoder relies on is checked; no codes are read.

        Args:
            kind: of the type that the GGUF names.
            data: uint8, all slabs.
            shape: true shape, (n_rows, n_cols) or (n_slabs, n_rows, n_cols).
            name: of the tensor in the GGUF, which its hash takes in.
            label: what messages call it; its name by default.
        Raises:
            FormatError: the payload is invalid.

        >>> from entrollm_gguf.codec import encode
        >>> codes = np.ones((16, 32), np.int8)
        >>> data = encode(EntropyType.EQ8, codes, np.ones(1, np.float16)).payload
        >>> Payload(EntropyType.EQ8, data[:300], (16, 32), "attn_q")
        Traceback (most recent call last):
        entrollm_gguf.errors.FormatError: attn_q: the data is shorter than its header says
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
        """Check that the stock type of `plain` holds every weight: an f16 ends at 65504.

        Raises:
            FormatError: it does not.
        """
        if self.header.plain_type != "F16":  # the others hold scale and offset themselves
            return
        if not all(c.library().ggml_entropy_fits_f16(ctypes.byref(view)) for view in self._views):
            largest = largest_weights(*self.scales_and_offsets()).max()
            raise FormatError(
                f"{self.label}: has weights up to {largest:.6g}, which would be infinite as F16; "
                "run it in fused mode (GGML_ENTROPY_MODE=fused), or convert the model again"
            )

    def verify(self, threads: int | None = None) -> None:
        """Check the hash, that every row group holds exactly its codes, that unused bytes are zero,
        and `check_plain`.

        Raises:
            FormatError: names the first thing that is wrong.

        >>> from entrollm_gguf.codec import encode
        >>> codes = np.ones((16, 32), np.int8)
        >>> data = encode(EntropyType.EQ8, codes, np.ones(1, np.float16), name="w").payload
        >>> Payload(EntropyType.EQ8, data, (16, 32), "w").verify()
        >>> Payload(EntropyType.EQ8, data, (16, 32), "v").verify()  # the hash takes in the name
        Traceback (most recent call last):
        entrollm_gguf.errors.FormatError: v: hash mismatch
        """
        lib = c.library()
        for i, view in enumerate(self._views):
            ref = ctypes.byref(view)
            self._check(lib.ggml_entropy_verify_hash(ref, self._slab(i), seed(self.name, i)))
            self._check(lib.ggml_entropy_verify_padding(ref, self._slab(i)))
            self._check(run_groups(functools.partial(lib.ggml_entropy_verify_groups, ref), view.n_groups, n_threads_of(threads)))
        self.check_plain()

    def codes(self, threads: int | None = None) -> np.ndarray:
        """The integer codes, int8 of the tensor's shape."""
        return self._decode_slabs(self._decode_codes, np.int8, self.header.n_cols, threads)

    def plain(self, threads: int | None = None) -> tuple[str, np.ndarray]:
        """Decode to the stock GGUF type that holds the tensor best (docs/format.md 6.1).

        Returns:
            the type's name (Q8_0, F16, Q4_0, Q4_1 or BF16) and its rows as uint8, shape
                (*shape[:-1], row bytes).
        Raises:
            FormatError: the type does not hold the weights.

        >>> from entrollm_gguf.codec import encode
        >>> codes = np.ones((16, 64), np.int8)
        >>> data = encode(EntropyType.EQ4, codes, np.ones(1, np.float16)).payload
        >>> name, rows = Payload(EntropyType.EQ4, data, (16, 64)).plain()
        >>> name, rows.shape  # a block of 32 weights takes 18 bytes
        ('Q4_0', (16, 36))
        """
        self.check_plain()
        stock = c.library().ggml_entropy_plain_type(ctypes.byref(self._views[0].header))
        decode = functools.partial(self._decode_plain, stock)
        return self.header.plain_type, self._decode_slabs(decode, np.uint8, c.row_size(stock, self.header.n_cols), threads)

    def rests(self) -> np.ndarray | None:
        """Sign and mantissa of each weight of EBF16, uint8 of the tensor's shape; None for other
        types."""
        if self.kind.is_quantized:
            return None
        n_weights = self.header.n_rows * self.header.n_cols
        slabs = [np.frombuffer((ctypes.c_uint8 * n_weights).from_address(view.rests), np.uint8).copy() for view in self._views]
        return np.concatenate(slabs).reshape(self.shape)

    def scales_and_offsets(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Scales (f16) and offsets (f32, or None), shape (n_slabs, 1 or n_rows) each.

        >>> from entrollm_gguf.codec import encode
        >>> codes, scales = np.zeros((2, 32), np.int8), np.array([0.5, 0.25], np.float16)
        >>> data = encode(EntropyType.EQ8, codes, scales, np.array([-1.0], np.float32)).payload
        >>> payload = Payload(EntropyType.EQ8, data, (2, 32))
        >>> [array.tolist() for array in payload.scales_and_offsets()]
        [[[0.5, 0.25]], [[-1.0]]]
        """

        def array(pointer: int | None, one: np.ndarray) -> np.ndarray:
            if not pointer:
                return one.copy()
            return np.frombuffer(ctypes.string_at(pointer, self.header.n_rows * one.itemsize), one.dtype)

        scales = [array(view.scales, np.array([view.header.scale], np.uint16).view(np.float16)) for view in self._views]
        offsets = [array(view.offsets, np.array([view.header.offset], np.float32)) for view in self._views]
        return np.stack(scales), np.stack(offsets) if self.header.offset_mode != 0 else None

    def code_parameters(self) -> list[Code]:
        """The code of each slab."""
        return [code_of(view.header.code) for view in self._views]

    def counts(self, threads: int | None = None) -> np.ndarray:
        """Histogram of the codes of each slab: uint64 (n_slabs, 256), index q + 128. One slab is
        decoded at a time."""
        # damaged data of EQ4 can decode to any code, so the range of EQ8 is right for all
        matrices = (self._matrix(i, threads) for i in range(len(self._views)))
        return np.stack([count_codes(EntropyType.EQ8, matrix, threads) for matrix in matrices])

    def to_lanes(self, threads: int | None = None) -> np.ndarray:
        """The device layout of all slabs, uint8 (n_slabs * device_size,).

        Raises:
            FormatError: the codes do not fit into device_size bytes, which happens with damaged
                data only.

        >>> from entrollm_gguf.codec import encode
        >>> codes = np.ones((64, 128), np.int8)
        >>> data = encode(EntropyType.EQ8, codes, np.ones(1, np.float16)).payload
        >>> Payload(EntropyType.EQ8, data, (64, 128)).to_lanes().nbytes, data.nbytes
        (2560, 1792)
        """
        if not self.kind.is_quantized:
            raise CodecError(f"{self.label}: {self.kind.name} has no device layout")
        lib = c.library()
        n_threads = n_threads_of(threads)
        size, stack = self.header.device_size, (self.header.n_slabs, self.header.n_rows, self.header.n_cols)
        lanes = np.zeros(self.header.device_bytes, np.uint8)
        scales, offsets = self.scales_and_offsets()
        for i in range(len(self._views)):
            codes = self._matrix(i, threads)
            spec = spec_of(self.kind, stack, scales[i], None if offsets is None else offsets[i])
            spec.tile_cols, spec.device_size = self.header.tile_cols, size
            one = measure_lanes(self.kind, codes, lanes_plan(self.kind, codes, n_threads), spec.tile_cols, n_threads)
            words, plan = one.words.ctypes.data, ctypes.byref(one.plan)
            if one.longest > MAX_LANE_WORDS or not 0 < lib.ggml_entropy_lanes_size(ctypes.byref(spec), words) <= size:
                raise FormatError(f"{self.label}: the codes do not fit into the device layout that the header promises")
            slab = lanes.ctypes.data + i * size
            self._check(lib.ggml_entropy_lanes_begin(ctypes.byref(spec), plan, words, slab, size))
            encode_groups = functools.partial(lib.ggml_entropy_lanes_encode_groups, plan, codes.ctypes.data)
            n_groups = n_groups_of(self.header.n_rows, LANES)
            self._check(run_groups(lambda group0, group1: encode_groups(group0, group1, slab), n_groups, n_threads))
        return lanes

    def _slab(self, i: int) -> int:
        return self._data.ctypes.data + i * self.header.slab_size

    def _check(self, code: int) -> None:
        check_data(code, self.label)

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
        """Run decode(view, group0, group1, address of row 16 * group0 of out) over all row
        groups."""
        # a mapped file may have changed between the header that `out` was made for and the one that
        # says how much is decoded
        if (view.header.n_rows, view.header.n_cols) != (self.header.n_rows, self.header.n_cols):
            raise FormatError(f"{self.label}: the file was changed while it was read")
        ref, data, group_bytes = ctypes.byref(view), out.ctypes.data, GROUP_ROWS * out.strides[0]
        self._check(run_groups(lambda g0, g1: decode(ref, g0, g1, data + g0 * group_bytes), view.n_groups, n_threads_of(threads)))

    @staticmethod
    def _decode_codes(view: object, group0: int, group1: int, out: int) -> int:
        return c.library().ggml_entropy_decode_groups(view, group0, group1, out)

    @staticmethod
    def _decode_plain(stock: int, view: object, group0: int, group1: int, out: int) -> int:
        return c.library().ggml_entropy_decode_groups_plain(view, group0, group1, stock, out)
