# SPDX-License-Identifier: MIT
"""Entropy-coded tensors (EQ8, EQ4, EBF16) in a GGUF: their size, and their weights as floats.

For every other type the size follows from type and shape. Here it stands in the header of the first
slab, the first 256 bytes of the tensor's data: slab_size (u64 at byte 16) times the number of slabs
(u32 at byte 32). The header of a hostile file may say anything, so what is needed to trust those
two numbers is checked here: that it is a header at all, that it names the type and the shape of the
tensor info, that the bytes are in the file, and that the next tensor starts where this one ends.
The rest of the format is the codec's business: what decodes is the C code of ggml-base, which the
llama_cpp package of the same build brings along.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .constants import GGMLQuantizationType, GGUFEndian


class OldVersionError(ValueError):
    """A tensor of a format version that is no longer read. The file is whole."""


# type -> kind, the number in the header
GGML_ENTROPY_TYPES: dict[GGMLQuantizationType, int] = {
    GGMLQuantizationType.EQ8: 1,
    GGMLQuantizationType.EQ4: 2,
    GGMLQuantizationType.EBF16: 3,
}

ENTROPY_ALIGN = 256  # of slabs, and the largest general.alignment
ENTROPY_HEADER_SIZE = 256
ENTROPY_SLACK = 256  # zero bytes behind the body
ENTROPY_MAX_SLAB = 1 << 46  # as in the codec
ENTROPY_MAX_BODY = (1 << 35) - 8
ENTROPY_GROUP_ROWS = 16

_OLD_MAGIC = b"EQT1"
_MAGIC = b"EQTP"
_VERSION = 2
# magic, version, kind, (9 bytes), slab_size, n_cols, n_rows, n_slabs, (44 bytes), body_at,
# body_size, raw_bits
_HEADER = struct.Struct("<4sHB9xQIII44xQQB")

_VIEW_SIZE = 1024  # room for struct ggml_entropy_view
_GGML_TYPE_F32 = 0


def entropy_check_file(name: str, alignment: int, endianess: GGUFEndian) -> None:
    """Raise ValueError if a file with this alignment and byte order cannot hold entropy-coded
    tensors."""
    if alignment > ENTROPY_ALIGN:
        raise ValueError(f"Tensor {name!r}: entropy-coded tensors need general.alignment <= {ENTROPY_ALIGN}, not {alignment}")
    if endianess != GGUFEndian.LITTLE:
        raise ValueError(f"Tensor {name!r}: entropy-coded tensors exist in little-endian files only")


def entropy_n_bytes(
    name: str,
    ggml_type: GGMLQuantizationType,
    dims: Sequence[int],
    data: npt.NDArray[Any],
    offset: int,
    next_offset: int | None,
) -> int:
    """Bytes of a tensor. dims in file order (columns first); offset and next_offset (None: last
    tensor) are positions in data, the file."""
    raw = np.asarray(data[offset : offset + ENTROPY_HEADER_SIZE]).tobytes()
    if len(raw) < ENTROPY_HEADER_SIZE:
        raise ValueError(f"Tensor {name!r}: the file ends before its data")
    magic, version, kind, slab_size, n_cols, n_rows, n_slabs, body_at, body_size, raw_bits = _HEADER.unpack_from(raw)
    if magic == _OLD_MAGIC:
        raise OldVersionError(f"Tensor {name!r}: format version 1, which is no longer read: convert the model again")
    if magic != _MAGIC or version != _VERSION or kind != GGML_ENTROPY_TYPES[ggml_type]:
        raise ValueError(f"Tensor {name!r}: no {ggml_type.name} data of format version {_VERSION}")
    ne = [int(dim) for dim in dims] + [1] * (4 - len(dims))
    if [n_cols, n_rows, n_slabs, 1] != ne or min(ne) < 1:
        raise ValueError(f"Tensor {name!r}: its data is for the shape {[n_cols, n_rows, n_slabs]}, the file says {ne}")
    # a body holds the raw bits of all its weights, so that a small file cannot claim a huge matrix
    min_body = -(-n_rows // ENTROPY_GROUP_ROWS) * n_cols * 2 * raw_bits
    min_size = -(-(body_at + body_size) // ENTROPY_ALIGN) * ENTROPY_ALIGN + ENTROPY_SLACK
    if (
        slab_size % ENTROPY_ALIGN != 0
        or not 1 <= raw_bits <= 8
        or not min_body <= body_size <= ENTROPY_MAX_BODY
        or not min_size <= slab_size <= ENTROPY_MAX_SLAB
        or (n_slabs == 1 and slab_size != min_size)
    ):
        raise ValueError(f"Tensor {name!r}: impossible slab size {slab_size}")
    n_bytes = slab_size * n_slabs
    if offset + n_bytes > len(data):
        raise ValueError(f"Tensor {name!r}: needs {n_bytes} bytes, the file ends after {len(data) - offset}")
    if next_offset is not None and next_offset != offset + n_bytes:
        raise ValueError(f"Tensor {name!r}: needs {n_bytes} bytes, the next tensor starts after {next_offset - offset}")
    return n_bytes


def entropy_dequantize(data: npt.NDArray[Any], ggml_type: GGMLQuantizationType) -> npt.NDArray[np.float32]:
    """Weights of a tensor, from its whole payload. Shape (n_rows, n_cols), or (n_slabs, n_rows,
    n_cols) for several slabs."""
    lib = _codec()
    payload = np.ascontiguousarray(data, dtype=np.uint8).reshape(-1)
    if payload.ctypes.data % 8 != 0:
        payload = payload.copy()
    if payload.size < ENTROPY_HEADER_SIZE:
        raise ValueError(f"{ggml_type.name} data of {payload.size} bytes: shorter than its header")
    _, _, _, slab_size, n_cols, n_rows, n_slabs, _, _, _ = _HEADER.unpack_from(payload)

    def check(status: int) -> None:
        if status != 0:
            raise ValueError(f"{ggml_type.name} data: {lib.ggml_entropy_status_str(status).decode()}")

    ne = (ctypes.c_int64 * 4)(n_cols, n_rows, n_slabs, 1)
    check(lib.ggml_entropy_validate(int(ggml_type), ne, ctypes.c_void_p(payload.ctypes.data), ctypes.c_size_t(payload.size)))
    weights = np.empty((n_slabs, n_rows, n_cols), np.float32)
    view = (ctypes.c_uint64 * (_VIEW_SIZE // 8))()
    n_groups = ctypes.c_int64(-(-n_rows // ENTROPY_GROUP_ROWS))
    for i in range(n_slabs):
        check(lib.ggml_entropy_open(ctypes.c_void_p(payload.ctypes.data + i * slab_size), ctypes.c_size_t(slab_size), view))
        rows = ctypes.c_void_p(weights[i].ctypes.data)
        check(lib.ggml_entropy_decode_groups_plain(view, ctypes.c_int64(0), n_groups, _GGML_TYPE_F32, rows))
    return weights if n_slabs > 1 else weights[0]


@functools.lru_cache(maxsize=1)
def _codec() -> ctypes.CDLL:
    name = {"darwin": "libggml-base.dylib", "win32": "ggml-base.dll"}.get(sys.platform, "libggml-base.so")
    spec = importlib.util.find_spec("llama_cpp")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / "lib" / name).is_file():
            lib = ctypes.CDLL(str(path))
            if hasattr(lib, "ggml_entropy_decode_groups_plain"):
                lib.ggml_entropy_status_str.restype = ctypes.c_char_p
                return lib
    raise RuntimeError(
        "entropy-coded types are decoded by the patched llama-cpp-python, which is not installed: run `entrollm runtime build`"
    )
