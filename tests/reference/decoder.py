# SPDX-License-Identifier: MIT
"""Slow, readable decoder written from docs/format.md: the oracle of all tests. It shares no code with the codec; section numbers are the document's."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import xxhash

KIND_EQ8, KIND_EQ4 = 1, 2


class Rejected(Exception):
    """The document says that a reader rejects this; `rule` names why."""

    def __init__(self, rule: str, detail: str = "") -> None:
        super().__init__(f"{rule}: {detail}" if detail else rule)
        self.rule = rule


def require(condition: bool, rule: str, detail: str = "") -> None:
    if not condition:
        raise Rejected(rule, detail)


def align(x: int, a: int) -> int:
    return (x + a - 1) // a * a


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclass
class Slab:
    """A validated slab (5): the header's fields and the sections."""

    data: bytes  # all slab_size bytes
    kind: int
    n_cols: int
    n_rows: int
    n_slabs: int
    tile_cols: int
    scale_mode: int
    offset_mode: int
    hash: int
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


# ---- 5 Slab: validation ----

# 5.1; the names follow the table of the document
_HEADER = struct.Struct("<4sHBBQQIIIIIBBHfIQQQQQQQ")


def parse_slab(data: bytes, kind: int, n_cols: int, n_rows: int, n_slabs: int) -> Slab:
    """Validate one slab against the GGUF's type and shape.

    Args:
        data: the slab; more bytes may follow only where n_slabs > 1.
    Raises:
        Rejected: naming the rule.
    """
    require(len(data) >= 256, "truncated", "no header")
    (magic, version, h_kind, reserved0, digest, slab_size, h_cols, h_rows, h_slabs, tile_cols, n_tiles, scale_mode, offset_mode, scale_bits,
     offset, reserved1, table_at, scales_at, offsets_at, word_offsets_at, lane_words_at, bitstream_at, bitstream_words) = _HEADER.unpack_from(data)  # fmt: skip
    require(magic == bytes.fromhex("45515431"), "bad-magic")
    require(version == 1, "bad-version")
    require(h_kind in (KIND_EQ8, KIND_EQ4) and h_kind == kind, "bad-kind")
    require(reserved0 == 0 and reserved1 == 0 and not any(data[112:256]), "bad-reserved")
    require((h_cols, h_rows, h_slabs) == (n_cols, n_rows, n_slabs), "bad-shape")
    require(n_cols % 32 == 0 and 32 <= n_cols <= 1 << 24 and 1 <= n_rows < 1 << 31 and 1 <= n_slabs <= 1 << 16, "bad-shape")
    require(tile_cols % 32 == 0 and 32 <= tile_cols <= 1024, "bad-shape", "tile_cols")
    require(n_tiles == ceil_div(n_rows, 32) * ceil_div(n_cols, tile_cols), "bad-shape", "n_tiles")
    require(scale_mode in (0, 1) and offset_mode in (0, 1, 2), "bad-mode")
    scale = np.array([scale_bits], np.uint16).view(np.float16)[0]
    require(np.isfinite(scale) if scale_mode == 0 else scale_bits == 0, "bad-scale")
    require(np.isfinite(offset) if offset_mode == 1 else data[48:52] == bytes(4), "bad-scale")

    # sections follow one another, each at a multiple of 256
    at = 256
    expected, ends = {}, []
    for name, present, size in (
        ("table", True, 512),
        ("scales", scale_mode == 1, 2 * n_rows),
        ("offsets", offset_mode == 2, 4 * n_rows),
        ("word_offsets", True, 4 * n_tiles),
        ("lane_words", True, 32 * n_tiles),
        ("bitstream", True, 4 * bitstream_words),
    ):
        expected[name] = at if present else 0
        if present:
            ends.append((at + size, align(at + size, 256)))
            at = align(at + size, 256)
    found = (table_at, scales_at, offsets_at, word_offsets_at, lane_words_at, bitstream_at)
    require(found == tuple(expected.values()), "bad-layout", "section offsets")
    require(bitstream_words < 1 << 32, "bad-layout", "bitstream_words")
    least = at + 256  # 5.8
    require(slab_size % 256 == 0 and slab_size >= least and (n_slabs > 1 or slab_size == least), "bad-layout", "slab_size")
    require(len(data) >= slab_size, "truncated")
    data = data[:slab_size]
    ends[-1] = (ends[-1][0], slab_size)

    raw_table = data[table_at : table_at + 512]
    table = [(raw_table[2 * i], raw_table[2 * i + 1]) for i in range(256)]
    check_table(table)

    def section(at: int, dtype: str, count: int) -> np.ndarray:
        return np.frombuffer(data, dtype, count, at)

    scales = section(scales_at, "<f2", n_rows) if scale_mode == 1 else np.full(n_rows, scale)
    offsets = section(offsets_at, "<f4", n_rows) if offset_mode == 2 else np.full(n_rows, offset, np.float32)
    require(bool(np.isfinite(scales).all() and np.isfinite(offsets).all()), "bad-scale")
    if kind == KIND_EQ4 and offset_mode:  # 6.1
        minima = minimum(scales, offsets)
        with np.errstate(over="ignore"):
            half = minima.astype(np.float16)
        require(bool(np.isfinite(half).all() and (half.astype(np.float32) == minima).all()), "bad-scale", "minimum is no f16")

    word_offsets = section(word_offsets_at, "<u4", n_tiles)
    lane_words = section(lane_words_at, "<u1", n_tiles * 32).reshape(n_tiles, 32)
    t_min = min(t for t, _ in table)
    widths = [min(tile_cols, n_cols - c) // kind for c in range(0, n_cols, tile_cols)]  # kind happens to be columns per symbol
    check_index(word_offsets, lane_words, n_rows, [ceil_div(codes * t_min, 32) for codes in widths], bitstream_words)
    bitstream = section(bitstream_at, "<u4", bitstream_words)
    return Slab(
        data, kind, n_cols, n_rows, n_slabs, tile_cols, scale_mode, offset_mode, digest, table, scales, offsets, word_offsets, lane_words,
        bitstream, ends,
    )  # fmt: skip


def check_table(table: list[tuple[int, int]]) -> None:
    """5.2: the table can be cut into classes."""
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
            raise Rejected("bad-table", f"entry {i}")
        i += run


def check_index(word_offsets: np.ndarray, lane_words: np.ndarray, n_rows: int, shortest: list[int], bitstream_words: int) -> None:
    """5.5 and 5.6; `shortest` is the least length of a lane per column slice."""
    at = 0
    for tile, lanes in enumerate(lane_words):
        group, c = divmod(tile, len(shortest))
        for lane, length in enumerate(lanes):
            exists = group * 32 + lane < n_rows
            require(length >= shortest[c] if exists else length == 0, "bad-index", f"lane {lane} of tile {tile}")
        require(word_offsets[tile] == at, "bad-index", f"word offset of tile {tile}")
        at = align(at + int(lanes.astype(int).sum()), 4)
    require(at == bitstream_words, "bad-index", "bitstream_words")


def parse_tensor(data: bytes, kind: int, ne: tuple[int, int, int, int]) -> list[Slab]:
    """4: ne2 slabs of equal size, modes and tile_cols.

    Raises:
        Rejected: naming the rule.
    """
    n_cols, n_rows, n_slabs, ne3 = ne
    require(ne3 == 1, "bad-shape")
    require(len(data) >= 256, "truncated")
    first = parse_slab(data, kind, n_cols, n_rows, n_slabs)
    size = len(first.data)
    require(len(data) >= size * n_slabs, "truncated")
    require(len(data) == size * n_slabs, "bad-layout", "bytes behind the last slab")
    slabs = [first]
    for i in range(1, n_slabs):
        slab = parse_slab(data[i * size :], kind, n_cols, n_rows, n_slabs)
        require(slab.tile_cols == first.tile_cols, "bad-shape", "tile_cols differ")
        require((slab.scale_mode, slab.offset_mode) == (first.scale_mode, first.offset_mode), "bad-mode", "modes differ")
        require(len(slab.data) == size, "bad-layout", "slab sizes differ")
        slabs.append(slab)
    return slabs


# ---- 6 Decoding ----


def lane_stream(slab: Slab, tile: int, lane: int) -> list[int]:
    """6, step 2: the words of a lane, gathered from the word rows."""
    lengths = slab.lane_words[tile].astype(int)
    words = []
    for j in range(lengths[lane]):
        before = sum(int((lengths > k).sum()) for k in range(j))
        words.append(int(slab.bitstream[int(slab.word_offsets[tile]) + before + int((lengths[:lane] > j).sum())]))
    return words


def decode_lane(slab: Slab, tile: int, lane: int, n_symbols: int) -> tuple[list[int], int, int, int]:
    """6, step 3: symbols, bits consumed, all bits as one number, number of bits."""
    words = lane_stream(slab, tile, lane)
    n_bits = 32 * len(words)
    bits = 0
    for word in words:
        bits = bits << 32 | word
    padded = bits << 15 * n_symbols  # zeros beyond the last word
    total = n_bits + 15 * n_symbols
    symbols, position = [], 0
    for _ in range(n_symbols):
        window = padded >> (total - position - 15) & 0x7FFF if total - position >= 15 else 0
        t, bias = slab.table[window >> 7]
        symbols.append(((window >> (15 - t)) + bias) % 256)
        position += t
    return symbols, position, bits, n_bits


def lane_symbols(slab: Slab):
    """Every lane that exists: (row, slice, decode_lane's result)."""
    for row in range(slab.n_rows):
        for c in range(slab.n_slices):
            tile = row // 32 * slab.n_slices + c
            columns = min(slab.tile_cols, slab.n_cols - c * slab.tile_cols)
            n_symbols = columns if slab.kind == KIND_EQ8 else columns // 2
            yield row, c, decode_lane(slab, tile, row % 32, n_symbols)


def decode_codes(slab: Slab) -> np.ndarray:
    """Codes q: int8, shape (n_rows, n_cols)."""
    codes = np.zeros((slab.n_rows, slab.n_cols), np.int8)
    for row, c, (symbols, *_) in lane_symbols(slab):
        u = np.array(symbols)
        # 4: the even column in the low half
        q = u - 128 if slab.kind == KIND_EQ8 else np.stack([(u & 15) - 8, (u >> 4) - 8], axis=1).reshape(-1)
        codes[row, c * slab.tile_cols : c * slab.tile_cols + len(q)] = q
    return codes


def decode_weights(slab: Slab) -> np.ndarray:
    """6, step 5: float32, shape (n_rows, n_cols)."""
    return slab.scales.astype(np.float32)[:, None] * decode_codes(slab).astype(np.float32) + slab.offsets[:, None]


def minimum(scales: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """6.1: m of Q4_1, in f32."""
    return offsets - np.float32(8) * scales.astype(np.float32)


def decode_plain(slab: Slab) -> tuple[str, bytes]:
    """6.1: name of the stock type and its rows in ggml's block layout."""
    codes = decode_codes(slab)
    blocks = codes.reshape(slab.n_rows, -1, 32)
    if slab.kind == KIND_EQ8 and slab.offset_mode:
        return "F16", decode_weights(slab).astype("<f2").tobytes()
    out = bytearray()
    for row in range(slab.n_rows):
        head = slab.scales[row].astype("<f2").tobytes()
        if slab.offset_mode:
            head += minimum(slab.scales, slab.offsets)[row].astype("<f2").tobytes()
        for block in blocks[row]:
            if slab.kind == KIND_EQ8:
                out += head + block.tobytes()
            else:
                nibbles = (block.astype(int) + 8).astype(np.uint8)
                out += head + (nibbles[:16] | nibbles[16:] << 4).astype(np.uint8).tobytes()
    return {KIND_EQ8: "Q8_0"}.get(slab.kind, "Q4_1" if slab.offset_mode else "Q4_0"), bytes(out)


# ---- 9 Trust: what verify adds ----


def verify(slab: Slab) -> None:
    """Hash, exact lanes, zero padding.

    Raises:
        Rejected: bad-hash, bad-reserved or bad-stream.
    """
    require(xxhash.xxh64_intdigest(slab.data[16:], seed=0) == slab.hash, "bad-hash")
    for start, end in slab.gaps:
        require(not any(slab.data[start:end]), "bad-reserved", "padding between sections")
    for _, _, (_, position, bits, n_bits) in lane_symbols(slab):
        require(ceil_div(position, 32) * 32 == n_bits, "bad-stream", "length of a lane")
        require(bits & ((1 << (n_bits - position)) - 1) == 0, "bad-stream", "padding bits of a lane")
    for tile, lanes in enumerate(slab.lane_words):
        end = int(slab.word_offsets[tile]) + int(lanes.astype(int).sum())
        require(not slab.bitstream[end : align(end, 4)].any(), "bad-stream", "words between tiles")
