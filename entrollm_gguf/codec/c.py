# SPDX-License-Identifier: MIT
"""The C codec as ctypes sees it: the structures of ggml-entropy.h and ggml-entropy-lanes.h, and the
library that holds their functions.

`entrollm_gguf.codec` is the only user. A mirror's layout is held against docs/format.md by
tests/unit/test_codec_binding.py, and its size against the library that is loaded.
"""

from __future__ import annotations

import ctypes
import functools
import os

from entrollm_gguf.errors import RuntimeMissingError

MAX_CLASSES = 8  # of a code


class Code(ctypes.Structure):
    """struct ggml_entropy_code."""

    _fields_ = [
        ("raw_bits", ctypes.c_uint8),
        ("bin_bits", ctypes.c_uint8),
        ("tail", ctypes.c_uint8),
        ("base", ctypes.c_int8),
        ("class_base", ctypes.c_int8 * MAX_CLASSES),
        ("reserved", ctypes.c_uint8 * 4),
    ]


class Tail(ctypes.Structure):
    """struct ggml_entropy_tail."""

    _fields_ = [
        ("n_digits", ctypes.c_int),
        ("width", ctypes.c_int * 4),
        ("n_classes", ctypes.c_int),
        ("n_planes", ctypes.c_int),
    ]


class Header(ctypes.Structure):
    """struct ggml_entropy_header."""

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
        ("scale_mode", ctypes.c_uint8),
        ("offset_mode", ctypes.c_uint8),
        ("scale", ctypes.c_uint16),
        ("offset", ctypes.c_float),
        ("tile_cols", ctypes.c_uint32),
        ("device_size", ctypes.c_uint64),
        ("scales_at", ctypes.c_uint64),
        ("offsets_at", ctypes.c_uint64),
        ("index_at", ctypes.c_uint64),
        ("body_at", ctypes.c_uint64),
        ("body_size", ctypes.c_uint64),
        ("code", Code),
        ("rests_at", ctypes.c_uint64),
        ("reserved1", ctypes.c_uint8 * 136),
    ]


class View(ctypes.Structure):
    """struct ggml_entropy_view."""

    _fields_ = [
        ("header", Header),
        ("scales", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("begin", ctypes.c_void_p),
        ("rests", ctypes.c_void_p),
        ("body", ctypes.c_void_p),
        ("n_groups", ctypes.c_int64),
        ("n_units", ctypes.c_int64),
        ("decode", ctypes.c_void_p),
    ]


class Plan(ctypes.Structure):
    """struct ggml_entropy_plan."""

    _fields_ = [
        ("code", Code),
        ("length", ctypes.c_uint8 * 256),
        ("n_bits", ctypes.c_uint64),
        ("n_tail", ctypes.c_uint64),
        ("n_far", ctypes.c_uint64),
    ]


class Extent(ctypes.Structure):
    """struct ggml_entropy_extent."""

    _fields_ = [("tail", ctypes.c_uint32), ("far", ctypes.c_uint32)]


class Spec(ctypes.Structure):
    """struct ggml_entropy_spec."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("n_cols", ctypes.c_int64),
        ("n_rows", ctypes.c_int64),
        ("n_slabs", ctypes.c_int64),
        ("scales", ctypes.c_void_p),
        ("n_scales", ctypes.c_int64),
        ("offsets", ctypes.c_void_p),
        ("n_offsets", ctypes.c_int64),
        ("tile_cols", ctypes.c_int64),
        ("device_size", ctypes.c_uint64),
        ("rests", ctypes.c_void_p),
    ]


class LanesHeader(ctypes.Structure):
    """struct ggml_entropy_lanes_header."""

    _fields_ = [
        ("magic", ctypes.c_uint8 * 4),
        ("version", ctypes.c_uint16),
        ("kind", ctypes.c_uint8),
        ("reserved0", ctypes.c_uint8),
        ("reserved1", ctypes.c_uint64),
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
        ("reserved2", ctypes.c_uint32),
        ("table_at", ctypes.c_uint64),
        ("scales_at", ctypes.c_uint64),
        ("offsets_at", ctypes.c_uint64),
        ("word_offsets_at", ctypes.c_uint64),
        ("lane_words_at", ctypes.c_uint64),
        ("bitstream_at", ctypes.c_uint64),
        ("bitstream_words", ctypes.c_uint64),
        ("reserved3", ctypes.c_uint8 * 144),
    ]


class LanesPlan(ctypes.Structure):
    """struct ggml_entropy_lanes_plan."""

    _fields_ = [
        ("table", ctypes.c_uint8 * 2 * 256),
        ("code", ctypes.c_uint16 * 256),
        ("length", ctypes.c_uint8 * 256),
        ("n_bits", ctypes.c_uint64),
    ]


# name without "ggml_entropy_" -> mirror
_MIRRORS: dict[str, type[ctypes.Structure]] = {
    "code": Code,
    "tail": Tail,
    "header": Header,
    "view": View,
    "plan": Plan,
    "extent": Extent,
    "spec": Spec,
    "lanes_header": LanesHeader,
    "lanes_plan": LanesPlan,
}

NO_MEMORY = 3  # enum ggml_entropy_status; the other values are told apart by their text alone

_ptr, _i32, _i64, _u64, _size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_uint64, ctypes.c_size_t

# name without "ggml_entropy_" -> argument types, result
_FUNCTIONS = {
    "size_of": ([ctypes.c_char_p], _size),
    "shape_is_valid": ([_i64, _i64, _i64], ctypes.c_bool),
    "status_str": ([_i32], ctypes.c_char_p),
    "tail_of": ([_i32], ctypes.POINTER(Tail)),
    "check_header": ([_i32, _ptr, _ptr, _ptr], _i32),
    "plain_type": ([_ptr], _i32),
    "fits_f16": ([_ptr], ctypes.c_bool),
    "validate": ([_i32, _ptr, _ptr, _size], _i32),
    "open": ([_ptr, _size, _ptr], _i32),
    "seed": ([ctypes.c_char_p, _i64], _u64),
    "verify_hash": ([_ptr, _ptr, _u64], _i32),
    "verify_groups": ([_ptr, _i64, _i64], _i32),
    "verify_padding": ([_ptr, _ptr], _i32),
    "decode_groups": ([_ptr, _i64, _i64, _ptr], _i32),
    "decode_groups_plain": ([_ptr, _i64, _i64, _i32, _ptr], _i32),
    "count": ([_i32, _i64, _i64, _ptr, _i64, _i64, _ptr], _i32),
    "plan_code": ([_ptr, _ptr], _i32),
    "measure": ([_i32, _i64, _i64, _ptr, _ptr, _i64, _i64, _ptr], _i32),
    "slab_size": ([_ptr, _ptr, _ptr], _size),
    "begin": ([_ptr, _ptr, _ptr, _ptr, _size], _i32),
    "encode_groups": ([_ptr, _i64, _i64, _ptr], _i32),
    "finish": ([_ptr, _u64], _i32),
    "lanes_default_tile_cols": ([_i64, _i64], _i64),
    "lanes_count": ([_i32, _i64, _i64, _ptr, _i64, _i64, _ptr], _i32),
    "lanes_plan_code": ([_ptr, _ptr], _i32),
    "lanes_measure": ([_i32, _i64, _i64, _ptr, _ptr, _i64, _i64, _i64, _ptr, _ptr], _i32),
    "lanes_size": ([_ptr, _ptr], _size),
    "lanes_begin": ([_ptr, _ptr, _ptr, _ptr, _size], _i32),
    "lanes_encode_groups": ([_ptr, _ptr, _i64, _i64, _ptr], _i32),
}


@functools.lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The library that holds the codec. ENTROLLM_CODEC_LIBRARY names another one (sanitizer
    builds).

    Raises:
        RuntimeMissingError: no patched runtime is installed, or one of another version of this
            package.
    """
    path = os.environ.get("ENTROLLM_CODEC_LIBRARY")
    if not path:
        from entrollm_gguf import runtime

        path = str(runtime.library("ggml-base"))
    lib = ctypes.CDLL(path)
    other = RuntimeMissingError(f"{path}: belongs to another version of this package; run `entrollm runtime build`")
    for name, (argtypes, restype) in _FUNCTIONS.items():
        try:
            function = getattr(lib, "ggml_entropy_" + name)
        except AttributeError as error:
            raise other from error
        function.argtypes = argtypes
        function.restype = restype
    lib.ggml_type_name.argtypes, lib.ggml_type_name.restype = [_i32], ctypes.c_char_p
    lib.ggml_row_size.argtypes, lib.ggml_row_size.restype = [_i32, _i64], _size
    if any(lib.ggml_entropy_size_of(name.encode()) != ctypes.sizeof(mirror) for name, mirror in _MIRRORS.items()):
        raise other
    return lib


def type_name(stock: int) -> str:
    """Name of a ggml type as the gguf package spells it, e.g. Q8_0."""
    return library().ggml_type_name(stock).decode().upper()


def row_size(stock: int, n_cols: int) -> int:
    """Bytes of a row of a ggml type."""
    return library().ggml_row_size(stock, n_cols)


def status(code: int) -> str:
    """What a status says, one clause in English."""
    return library().ggml_entropy_status_str(code).decode()
