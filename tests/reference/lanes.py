# SPDX-License-Identifier: MIT
"""Slow, readable decoder of the device layout, written from section 8 of docs/format.md.

A host makes this layout, so a mistake in it is a bug, and raises AssertionError.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from .decoder import KIND_EQ8, Slab, align, ceil_div

LANES = 32


@dataclass
class LaneSlab:
    """A slab in the device layout: the header's fields and the sections."""

    data: bytes
    kind: int
    n_cols: int
    n_rows: int
    n_slabs: int
    tile_cols: int
    scale_mode: int
    offset_mode: int
    table: list[tuple[int, int]]  # 256 times (t, bias)
    scales: np.ndarray  # float16 (n_rows,)
    offsets: np.ndarray  # float32 (n_rows,)
    word_offsets: np.ndarray  # (n_tiles,)
    lane_words: np.ndarray  # (n_tiles, 32)
    bitstream: np.ndarray  # uint32 (bitstream_words,)
    gaps: list[tuple[int, int]]  # unused byte ranges between sections, and the slack

    @property
    def n_slices(self) -> int:
        return ceil_div(self.n_cols, self.tile_cols)

    def n_symbols(self, c: int) -> int:
        """Of a lane of column slice c."""
        n_columns = min(self.tile_cols, self.n_cols - c * self.tile_cols)
        return n_columns if self.kind == KIND_EQ8 else n_columns // 2


# 8.1; the names follow the table of the document
_HEADER = struct.Struct("<4sHBBQQIIIIIBBHfIQQQQQQQ")


def parse(data: bytes, plane: Slab) -> LaneSlab:
    """One slab.

    Args:
        data: device_size bytes.
        plane: the slab in the plane layout from which it was made.
    Raises:
        AssertionError: it is not what section 8 says.
    """
    (magic, version, kind, zero0, zero1, slab_size, n_cols, n_rows, n_slabs, tile_cols, n_tiles, scale_mode, offset_mode, scale, offset,
     zero2, table_at, scales_at, offsets_at, word_offsets_at, lane_words_at, bitstream_at, bitstream_words) = _HEADER.unpack_from(data)  # fmt: skip
    assert magic == bytes.fromhex("4551544c") and version == 1
    assert not (zero0 or zero1 or zero2 or any(data[112:256]))
    for name, value in (
        ("kind", kind), ("n_cols", n_cols), ("n_rows", n_rows), ("n_slabs", n_slabs), ("tile_cols", tile_cols), ("device_size", slab_size),
        ("scale_mode", scale_mode), ("offset_mode", offset_mode),
    ):  # fmt: skip
        assert value == getattr(plane, name), name
    assert data[46:52] == plane.data[38:44]  # scale and offset
    assert len(data) == slab_size
    assert n_tiles == ceil_div(n_rows, LANES) * ceil_div(n_cols, tile_cols)

    # 8: sections follow one another, each at a multiple of 256
    at, expected, gaps = 256, [], []
    for present, size in (
        (True, 512),
        (scale_mode == 1, 2 * n_rows),
        (offset_mode == 2, 4 * n_rows),
        (True, 4 * n_tiles),
        (True, 32 * n_tiles),
        (True, 4 * bitstream_words),
    ):
        expected.append(at if present else 0)
        if present:
            gaps.append((at + size, align(at + size, 256)))
            at = align(at + size, 256)
    assert [table_at, scales_at, offsets_at, word_offsets_at, lane_words_at, bitstream_at] == expected
    assert at + 256 <= slab_size
    gaps.append((at, slab_size))

    table = [(data[table_at + 2 * i], data[table_at + 2 * i + 1]) for i in range(256)]
    check_table(table)
    slab = LaneSlab(
        data, kind, n_cols, n_rows, n_slabs, tile_cols, scale_mode, offset_mode, table,
        np.frombuffer(data, "<f2", n_rows, scales_at) if scale_mode else np.full(n_rows, np.array([scale], np.uint16).view(np.float16)[0]),
        np.frombuffer(data, "<f4", n_rows, offsets_at) if offset_mode == 2 else np.full(n_rows, offset, np.float32),
        np.frombuffer(data, "<u4", n_tiles, word_offsets_at),
        np.frombuffer(data, np.uint8, n_tiles * LANES, lane_words_at).reshape(n_tiles, LANES),
        np.frombuffer(data, "<u4", bitstream_words, bitstream_at),
        gaps,
    )  # fmt: skip
    check_index(slab)
    return slab


def check_table(table: list[tuple[int, int]]) -> None:
    """8.2: the table can be cut into classes."""
    i = 0
    while i < 256:
        t, bias = table[i]
        for p in range(9):
            run = 1 << (8 - p)
            e = t - p
            if i % run or any(entry != (t, bias) for entry in table[i : i + run]) or not 0 <= e <= 8 or not 1 <= t <= 15:
                continue
            prefix = i >> (8 - p)
            base = (bias + (prefix << e)) % 256
            if base + (1 << e) <= 256:
                break
        else:
            raise AssertionError(f"table: entry {i}")
        i += run


def check_index(slab: LaneSlab) -> None:
    """8.3: tiles follow one another, and lanes are there if their rows are."""
    at = 0
    for tile, lanes in enumerate(slab.lane_words.astype(int)):
        first = tile // slab.n_slices * LANES
        exists = first + np.arange(LANES) < slab.n_rows
        assert (lanes[exists] > 0).all() and (lanes[~exists] == 0).all(), f"lanes of tile {tile}"
        assert slab.word_offsets[tile] == at, f"word offset of tile {tile}"
        at = align(at + int(lanes.sum()), 4)
    assert at == len(slab.bitstream), "bitstream_words"


def lane_stream(slab: LaneSlab, tile: int, lane: int) -> list[int]:
    """8.4: the words of a lane, gathered from the word rows."""
    lengths = slab.lane_words[tile].astype(int)
    at, words = int(slab.word_offsets[tile]), []
    for j in range(lengths[lane]):
        longer = lengths > j
        words.append(int(slab.bitstream[at + int(longer[:lane].sum())]))
        at += int(longer.sum())
    return words


def decode_lane(slab: LaneSlab, tile: int, lane: int, n_symbols: int) -> tuple[list[int], int, int, int]:
    """8.4: symbols, bits consumed, all bits as one number, number of bits."""
    words = lane_stream(slab, tile, lane)
    n_bits = 32 * len(words)
    bits = 0
    for word in words:
        bits = bits << 32 | word
    total = n_bits + 15 * n_symbols + 15  # zeros beyond the last word
    padded = bits << (total - n_bits)
    symbols, position = [], 0
    for _ in range(n_symbols):
        window = padded >> (total - position - 15) & 0x7FFF
        t, bias = slab.table[window >> 7]
        symbols.append(((window >> (15 - t)) + bias) % 256)
        position += t
    return symbols, position, bits, n_bits


def lane_symbols(slab: LaneSlab):
    """Every lane that exists: (row, slice, decode_lane's result)."""
    for row in range(slab.n_rows):
        for c in range(slab.n_slices):
            yield row, c, decode_lane(slab, row // LANES * slab.n_slices + c, row % LANES, slab.n_symbols(c))


def decode_codes(slab: LaneSlab) -> np.ndarray:
    """Codes q: int8, shape (n_rows, n_cols)."""
    codes = np.zeros((slab.n_rows, slab.n_cols), np.int8)
    for row, c, (symbols, *_) in lane_symbols(slab):
        u = np.array(symbols)
        # 8: the even column in the low half
        q = u - 128 if slab.kind == KIND_EQ8 else np.stack([(u & 15) - 8, (u >> 4) - 8], axis=1).reshape(-1)
        codes[row, c * slab.tile_cols : c * slab.tile_cols + len(q)] = q
    return codes


def verify(slab: LaneSlab) -> None:
    """Every lane holds exactly its codes, and unused bytes are zero.

    Raises:
        AssertionError: something else is there.
    """
    for start, end in slab.gaps:
        assert not any(slab.data[start:end]), f"bytes {start} to {end}"
    for row, c, (_, position, bits, n_bits) in lane_symbols(slab):
        assert ceil_div(position, 32) * 32 == n_bits, f"length of row {row}, slice {c}"
        assert bits & ((1 << (n_bits - position)) - 1) == 0, f"last bits of row {row}, slice {c}"
    for tile, lanes in enumerate(slab.lane_words.astype(int)):
        end = int(slab.word_offsets[tile]) + int(lanes.sum())
        assert not slab.bitstream[end : align(end, 4)].any(), f"words behind tile {tile}"


def parse_tensor(data: bytes, planes: list[Slab]) -> list[LaneSlab]:
    """All slabs of a tensor, which were made from the slabs in `planes`."""
    size = planes[0].device_size
    assert len(data) == size * len(planes)
    return [parse(data[i * size : (i + 1) * size], plane) for i, plane in enumerate(planes)]
