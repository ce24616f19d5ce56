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
ENTROPY_MAX_SLAB = 1 << 46  # as in the codec

# magic, version, kind, reserved, hash, slab_size, n_cols, n_rows, n_slabs, (60 bytes), bitstream_at, bitstream_words
_HEADER = struct.Struct("<4sHBBQQIII60xQQ")


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
    magic, version, kind, _, _, slab_size, n_cols, n_rows, n_slabs, bitstream_at, bitstream_words = _HEADER.unpack_from(raw)
    if magic != b"EQT1" or version != 1 or kind != GGML_ENTROPY_TYPES[ggml_type]:
        raise ValueError(f"Tensor {name!r}: no {ggml_type.name} data of format version 1")
    ne = [int(dim) for dim in dims] + [1] * (4 - len(dims))
    if [n_cols, n_rows, n_slabs, 1] != ne or min(ne) < 1:
        raise ValueError(f"Tensor {name!r}: its data is for the shape {[n_cols, n_rows, n_slabs]}, the file says {ne}")
    min_size = bitstream_at + 4 * bitstream_words + ENTROPY_ALIGN  # with the slack
    if (
        slab_size % ENTROPY_ALIGN != 0
        or not min_size <= slab_size <= ENTROPY_MAX_SLAB
        or (n_slabs == 1 and slab_size >= min_size + ENTROPY_ALIGN)
    ):
        raise ValueError(f"Tensor {name!r}: impossible slab size {slab_size}")
    n_bytes = slab_size * n_slabs
    if offset + n_bytes > len(data):
        raise ValueError(f"Tensor {name!r}: needs {n_bytes} bytes, the file ends after {len(data) - offset}")
    if next_offset is not None and next_offset != offset + n_bytes:
        raise ValueError(f"Tensor {name!r}: needs {n_bytes} bytes, the next tensor starts after {next_offset - offset}")
    return n_bytes
