# SPDX-License-Identifier: MIT
"""Size of entropy-coded tensors (EQ8, EQ4) in a GGUF.

For every other type the size follows from type and shape. Here it stands in the header of the first slab, the first 256 bytes of the
tensor's data: slab_size (u64 at byte 16) times the number of slabs (u32 at byte 32). The header of a hostile file may say anything, so
what is needed to trust those two numbers is checked here: that it is a header at all, that it names the type and the shape of the
tensor info, that the bytes are in the file, and that the next tensor starts where this one ends. The rest of the format is the
codec's business; nothing here decodes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .constants import GGMLQuantizationType, GGUFEndian

# type -> kind, the number in the header
GGML_ENTROPY_TYPES: dict[GGMLQuantizationType, int] = {
    GGMLQuantizationType.EQ8: 1,
    GGMLQuantizationType.EQ4: 2,
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
# magic, version, kind, (9 bytes), slab_size, n_cols, n_rows, n_slabs, (44 bytes), body_at, body_size, raw_bits
_HEADER = struct.Struct("<4sHB9xQIII44xQQB")


def entropy_check_file(name: str, alignment: int, endianess: GGUFEndian) -> None:
    """Raise ValueError if a file with this alignment and byte order cannot hold entropy-coded tensors."""
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
    """Bytes of a tensor. dims in file order (columns first); offset and next_offset (None: last tensor) are positions in data, the file."""
    raw = np.asarray(data[offset : offset + ENTROPY_HEADER_SIZE]).tobytes()
    if len(raw) < ENTROPY_HEADER_SIZE:
        raise ValueError(f"Tensor {name!r}: the file ends before its data")
    magic, version, kind, slab_size, n_cols, n_rows, n_slabs, body_at, body_size, raw_bits = _HEADER.unpack_from(raw)
    if magic == _OLD_MAGIC:
        raise ValueError(f"Tensor {name!r}: format version 1, which is no longer read: convert the model again")
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
