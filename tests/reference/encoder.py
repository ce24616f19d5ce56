# SPDX-License-Identifier: MIT
"""Simple encoder written from docs/format.md, independent of the codec: for cross tests, and to make damaged files from. Its codes are valid, not optimal."""

from __future__ import annotations

import heapq
import itertools
import struct
from collections import Counter

import numpy as np
import xxhash

from .decoder import _HEADER, KIND_EQ8, align, ceil_div

Class = tuple[int, int, int]  # base, e, p (5.2)


def to_symbols(codes: np.ndarray, kind: int) -> np.ndarray:
    """4: codes (n_rows, n_cols) to coded bytes."""
    q = codes.astype(int)
    return q + 128 if kind == KIND_EQ8 else (q[:, 0::2] + 8) | (q[:, 1::2] + 8) << 4


def default_classes(symbols: np.ndarray) -> list[Class]:
    """Huffman over single symbols, the rare ones through the escape; prefix lengths evened out to at most 8 bits."""
    counts = Counter(symbols.reshape(-1).tolist())
    if len(counts) == 1:
        return [(min(next(iter(counts)), 254), 1, 0)]  # 7: one-symbol tensors
    common = counts.most_common(60)
    escaped = sum(counts.values()) - sum(n for _, n in common)
    weights = dict(common)
    if escaped:
        weights[-1] = escaped  # stands for the escape
    lengths = huffman_lengths(weights)
    limit = {key: 7 if key == -1 else 8 for key in lengths}
    if any(lengths[key] > limit[key] for key in lengths):
        # too skewed for the limits: all prefixes of nearly equal length
        n = len(lengths)
        short = (1 << (n - 1).bit_length()) - n  # this many may be one bit shorter
        order = sorted(lengths, key=lambda key: (key != -1, -weights[key]))
        longest = (n - 1).bit_length()
        lengths = {key: longest - (i < short) for i, key in enumerate(order)}
    return [(0, 8, p) if key == -1 else (key, 0, p) for key, p in lengths.items()]


def huffman_lengths(weights: dict[int, int]) -> dict[int, int]:
    tie = itertools.count()
    heap = [(w, next(tie), {key: 0}) for key, w in weights.items()]
    heapq.heapify(heap)
    while len(heap) > 1:
        (wa, _, a), (wb, _, b) = heapq.heappop(heap), heapq.heappop(heap)
        heapq.heappush(heap, (wa + wb, next(tie), {key: p + 1 for key, p in (a | b).items()}))
    return heap[0][2]


def expand(classes: list[Class]) -> tuple[list[tuple[int, int]], dict[int, tuple[int, int]]]:
    """5.2: the table, and per symbol (code, t): the shortest one, the first class on a tie (7)."""
    table: list[tuple[int, int]] = []
    codes: dict[int, tuple[int, int]] = {}
    for base, e, p in sorted(classes, key=lambda c: (c[2], c[0], c[1])):
        run, t = 1 << (8 - p), p + e
        prefix = len(table) // run
        table += [(t, (base - (prefix << e)) % 256)] * run
        for u in range(base, base + (1 << e)):
            if u not in codes or t < codes[u][1]:
                codes[u] = (prefix << e | (u - base), t)
    assert len(table) == 256, "the classes are not complete"
    return table, codes


def encode_slab(
    codes: np.ndarray,
    kind: int,
    scales: np.ndarray,
    offsets: np.ndarray | None,
    tile_cols: int,
    classes: list[Class] | None = None,
    n_slabs: int = 1,
    slab_size: int | None = None,
) -> bytes:
    """One slab.

    Args:
        codes: int8 (n_rows, n_cols).
        scales: float16 (1,) or (n_rows,).
        offsets: float32 of the same shapes, or None.
        slab_size: for n_slabs > 1, a larger size than needed.
    """
    n_rows, n_cols = codes.shape
    symbols = to_symbols(codes, kind)
    table, book = expand(classes or default_classes(symbols))
    per_symbol = n_cols // symbols.shape[1]
    while True:
        tiles = [
            tile_lanes(symbols[g : g + 32, c : c + tile_cols // per_symbol], book)
            for g in range(0, n_rows, 32)
            for c in range(0, symbols.shape[1], tile_cols // per_symbol)
        ]
        if max(len(lane) for tile in tiles for lane in tile) <= 255:
            break
        tile_cols = max(32, tile_cols // 2 // 32 * 32)

    bitstream, word_offsets, lane_words = [], [], []
    for tile in tiles:
        word_offsets.append(len(bitstream))
        lane_words += [len(lane) for lane in tile] + [0] * (32 - len(tile))
        for j in range(max(map(len, tile))):  # 5.7: word rows
            bitstream += [lane[j] for lane in tile if j < len(lane)]
        bitstream += [0] * (-len(bitstream) % 4)

    scale_mode = int(len(scales) > 1)
    offset_mode = 0 if offsets is None else 1 if len(offsets) == 1 else 2
    sections = [
        bytes(itertools.chain.from_iterable(table)),
        scales.astype("<f2").tobytes() if scale_mode else None,
        offsets.astype("<f4").tobytes() if offsets is not None and offset_mode == 2 else None,
        struct.pack(f"<{len(word_offsets)}I", *word_offsets),
        bytes(lane_words),
        struct.pack(f"<{len(bitstream)}I", *bitstream),
    ]
    body, places = b"", []
    for section in sections:
        places.append(0 if section is None else 256 + len(body))
        if section is not None:
            body += section + bytes(-len(section) % 256)
    size = slab_size or 256 + len(body) + 256
    n_tiles = ceil_div(n_rows, 32) * ceil_div(n_cols, tile_cols)
    header = _HEADER.pack(
        b"EQT1", 1, kind, 0, 0, size, n_cols, n_rows, n_slabs, tile_cols, n_tiles, scale_mode, offset_mode,
        0 if scale_mode else int(scales.astype("<f2").view("<u2")[0]), float(offsets[0]) if offset_mode == 1 else 0.0, 0, *places, len(bitstream),
    )  # fmt: skip
    slab = bytearray(header.ljust(256, b"\0") + body)
    assert align(len(slab), 256) == len(slab)
    slab += bytes(size - len(slab))
    return rehash(bytes(slab))


def tile_lanes(symbols: np.ndarray, book: dict[int, tuple[int, int]]) -> list[list[int]]:
    """Words of every lane of a tile."""
    lanes = []
    for row in symbols:
        bits = "".join(format(book[u][0], f"0{book[u][1]}b") for u in row.tolist())
        bits += "0" * (-len(bits) % 32)
        lanes.append([int(bits[i : i + 32], 2) for i in range(0, len(bits), 32)])
    return lanes


def rehash(slab: bytes) -> bytes:
    """The slab with the right hash (5.1)."""
    return slab[:8] + struct.pack("<Q", xxhash.xxh64_intdigest(slab[16:], seed=0)) + slab[16:]
