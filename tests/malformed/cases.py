# SPDX-License-Identifier: MIT
"""Damaged payloads by name, at least one per rule of docs/format.md. Free of pytest and of any decoder: several tests run them."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from reference.encoder import encode_slab, rehash

Built = tuple[bytes, int, tuple[int, int, int, int]]  # payload, kind, ne


@dataclass(frozen=True)
class Case:
    """A payload and what is to happen to it."""

    name: str
    rule: str  # of reference.decoder.Rejected
    verdict: str  # "reject" at load; "accept" at load and reject in verify
    build: Callable[[], Built]


ROWS, COLS = 35, 64


def _codes(kind: int) -> np.ndarray:
    top = 8 if kind == 2 else 100
    return np.clip(np.random.default_rng(kind).normal(0, top / 4, (ROWS, COLS)), -top, top - 1).astype(np.int8)


def _slab(kind: int = 1, rows: bool = False, offset: int = 0) -> bytearray:
    scales = np.full(ROWS if rows else 1, 0.5, np.float16)
    offsets = None if offset == 0 else np.full(1 if offset == 1 else ROWS, 4.0, np.float32)
    return bytearray(encode_slab(_codes(kind), kind, scales, offsets, 32))


def _experts() -> bytearray:
    slabs = [encode_slab(_codes(1) // d, 1, np.float16([1]), None, 32, n_slabs=3) for d in (1, 2, 30)]
    size = max(map(len, slabs))
    return bytearray(b"".join(encode_slab(_codes(1) // d, 1, np.float16([1]), None, 32, n_slabs=3, slab_size=size) for d in (1, 2, 30)))


CASES: list[Case] = []


def _add(
    name: str, rule: str, change: Callable[[bytearray], bytearray | None], verdict: str = "reject", keep_hash: bool = False, **slab
) -> None:
    def build() -> Built:
        data = _slab(**slab)
        changed = change(data)
        result = bytes(data if changed is None else changed)
        if not keep_hash and len(result) >= 16:
            result = rehash(result)
        return result, slab.get("kind", 1), (COLS, ROWS, 1, 1)

    CASES.append(Case(name, rule, verdict, build))


def _put(form: str, at: int, value) -> Callable[[bytearray], None]:
    return lambda data: struct.pack_into("<" + form, data, at, value)


def _section(data: bytearray, field: int) -> int:
    return struct.unpack_from("<Q", data, field)[0]


def _put_in(field: int, form: str, index: int, value) -> Callable[[bytearray], None]:
    return lambda data: struct.pack_into("<" + form, data, _section(data, field) + index, value)


TABLE, SCALES, OFFSETS, WORD_OFFSETS, LANE_WORDS, BITSTREAM, N_WORDS = 56, 64, 72, 80, 88, 96, 104

# 5.1 header
_add("empty", "truncated", lambda d: bytearray())
_add("half-a-header", "truncated", lambda d: d[:128])
_add("header-only", "truncated", lambda d: d[:256])
_add("last-byte-missing", "truncated", lambda d: d[:-1])
_add("magic", "bad-magic", _put("B", 0, 0x46))
_add("big-endian-magic", "bad-magic", lambda d: d.__setitem__(slice(0, 4), b"1TQE"))
_add("version-0", "bad-version", _put("H", 4, 0))
_add("version-2", "bad-version", _put("H", 4, 2))
_add("kind-0", "bad-kind", _put("B", 6, 0))
_add("kind-of-the-other-type", "bad-kind", _put("B", 6, 2))
_add("kind-reserved-ebf16", "bad-kind", _put("B", 6, 3))
_add("reserved-byte-7", "bad-reserved", _put("B", 7, 1))
_add("reserved-word-52", "bad-reserved", _put("I", 52, 1))
_add("reserved-tail-first", "bad-reserved", _put("B", 112, 1))
_add("reserved-tail-last", "bad-reserved", _put("B", 255, 1))
for delta in (-1, 1, -256, 256, 1 << 40):
    _add(f"slab-size{delta:+}", "bad-layout", lambda d, delta=delta: _put("Q", 16, len(d) + delta)(d))
_add("slab-size-0", "bad-layout", _put("Q", 16, 0))
_add("slab-size-max", "bad-layout", _put("Q", 16, 2**64 - 256))
_add("n-cols", "bad-shape", _put("I", 24, COLS + 32))
_add("n-cols-odd", "bad-shape", _put("I", 24, 33))
_add("n-cols-0", "bad-shape", _put("I", 24, 0))
_add("n-rows", "bad-shape", _put("I", 28, ROWS - 1))
_add("n-rows-0", "bad-shape", _put("I", 28, 0))
_add("n-rows-max", "bad-shape", _put("I", 28, 2**32 - 1))
_add("n-slabs-0", "bad-shape", _put("I", 32, 0))
_add("n-slabs-2", "bad-shape", _put("I", 32, 2))
_add("tile-cols-0", "bad-shape", _put("I", 36, 0))
_add("tile-cols-48", "bad-shape", _put("I", 36, 48))
_add("tile-cols-2048", "bad-shape", _put("I", 36, 2048))
_add("tile-cols-64", "bad-shape", _put("I", 36, 64))  # would need fewer tiles
_add("n-tiles", "bad-shape", _put("I", 40, 5))
_add("scale-mode-2", "bad-mode", _put("B", 44, 2))
_add("offset-mode-3", "bad-mode", _put("B", 45, 3))
_add("scale-infinite", "bad-scale", _put("H", 46, 0x7C00))
_add("scale-nan", "bad-scale", _put("H", 46, 0x7E01))
_add("scale-in-header-and-rows", "bad-scale", _put("H", 46, 0x3800), rows=True)
_add("offset-without-mode", "bad-scale", _put("f", 48, 1.0))
_add("offset-negative-zero-without-mode", "bad-scale", _put("f", 48, -0.0))
_add("offset-nan", "bad-scale", _put("f", 48, float("nan")), offset=1)
_add("offset-infinite", "bad-scale", _put("f", 48, float("inf")), offset=1)
for name, field in (
    ("table", TABLE), ("word-offsets", WORD_OFFSETS), ("lane-words", LANE_WORDS), ("bitstream", BITSTREAM),
):  # fmt: skip
    _add(f"{name}-at-0", "bad-layout", _put("Q", field, 0))
    _add(f"{name}-at-later", "bad-layout", lambda d, field=field: _put("Q", field, _section(d, field) + 256)(d))
    _add(f"{name}-at-far", "bad-layout", _put("Q", field, 2**63))
_add("scales-at-without-mode", "bad-layout", _put("Q", SCALES, 768))
_add("offsets-at-without-mode", "bad-layout", _put("Q", OFFSETS, 768))
_add("bitstream-words-too-many", "bad-layout", _put("Q", N_WORDS, 1 << 20))
_add("bitstream-words-4g", "bad-layout", _put("Q", N_WORDS, 1 << 32))
_add("bitstream-words-overflow", "bad-layout", _put("Q", N_WORDS, 2**62))

# 5.2 table
_add("table-t-0", "bad-table", _put_in(TABLE, "B", 0, 0))
_add("table-t-16", "bad-table", _put_in(TABLE, "B", 510, 16))
_add("table-t-255", "bad-table", _put_in(TABLE, "B", 100, 255))
_add("table-one-entry-of-a-run", "bad-table", lambda d: d.__setitem__(slice(256, 768), bytes([1, 0] * 5 + [1, 9] + [1, 0] * 250)))
_add("table-interval-beyond-255", "bad-table", lambda d: d.__setitem__(slice(256, 768), bytes([15, 200]) * 256))
_add("table-all-zero", "bad-table", lambda d: d.__setitem__(slice(256, 768), bytes(512)))

# 5.3, 5.4, 6.1 scales and offsets
_add("row-scale-infinite", "bad-scale", _put_in(SCALES, "H", 2 * (ROWS - 1), 0xFC00), rows=True)
_add("row-offset-nan", "bad-scale", _put_in(OFFSETS, "I", 4 * (ROWS - 1), 0x7FC00000), offset=2)
_add("q4-minimum-is-no-f16", "bad-scale", _put("f", 48, 5.0001), kind=2, offset=1)
_add("q4-row-minimum-is-no-f16", "bad-scale", _put_in(OFFSETS, "f", 4 * 3, 1.0001), kind=2, offset=2)
_add("q4-minimum-too-large", "bad-scale", _put("f", 48, 1e6), kind=2, offset=1)

# 5.5, 5.6 index
_add("first-word-offset", "bad-index", _put_in(WORD_OFFSETS, "I", 0, 4))
_add("word-offset-too-small", "bad-index", _put_in(WORD_OFFSETS, "I", 4, 0))
_add("word-offset-max", "bad-index", _put_in(WORD_OFFSETS, "I", 12, 2**32 - 1))
_add("lane-of-a-missing-row", "bad-index", _put_in(LANE_WORDS, "B", 2 * 32 + 31, 1))
_add("lane-empty", "bad-index", _put_in(LANE_WORDS, "B", 0, 0))
_add("lane-too-long", "bad-index", _put_in(LANE_WORDS, "B", 0, 255))
_add("last-lane-longer", "bad-index", lambda d: _put_in(LANE_WORDS, "B", 3 * 32, d[_section(d, LANE_WORDS) + 3 * 32] + 4)(d))


def _claim_many_codes(d: bytearray) -> bytearray:
    """One word a lane for 1024 codes, all sections consistent."""
    whole = bytearray(encode_slab(np.zeros((1, 1024), np.int8), 1, np.float16([1]), None, 1024))
    _put_in(LANE_WORDS, "B", 0, 1)(whole)
    _put("Q", N_WORDS, 4)(whole)
    start = _section(whole, BITSTREAM)
    _put("Q", 16, start + 512)(whole)
    return whole[: start + 512]


CASES.append(
    Case("lane-shorter-than-its-codes", "bad-index", "reject", lambda: (rehash(bytes(_claim_many_codes(bytearray()))), 1, (1024, 1, 1, 1)))
)

# 9: accepted by a loader, found by verify
_add("hash", "bad-hash", _put("Q", 8, 12345), verdict="accept", keep_hash=True)
_add("bitstream-inverted", "bad-stream", lambda d: _invert(d), verdict="accept")
_add("bitstream-zero", "bad-stream", lambda d: _fill(d, 0), verdict="accept")
_add("bitstream-ones", "bad-stream", lambda d: _fill(d, 255), verdict="accept")
_add("slack-not-zero", "bad-reserved", lambda d: d.__setitem__(-1, 1), verdict="accept")
_add("gap-not-zero", "bad-reserved", _put_in(WORD_OFFSETS, "B", 200, 1), verdict="accept")


def _stream(d: bytearray) -> slice:
    start = _section(d, BITSTREAM)
    return slice(start, start + 4 * _section(d, N_WORDS))


def _invert(d: bytearray) -> None:
    d[_stream(d)] = bytes(255 - b for b in d[_stream(d)])


def _fill(d: bytearray, value: int) -> None:
    d[_stream(d)] = bytes([value]) * (4 * _section(d, N_WORDS))


# 4: experts
def _add_experts(name: str, rule: str, change: Callable[[bytearray, int], bytearray | None]) -> None:
    def build() -> Built:
        data = _experts()
        changed = change(data, len(data) // 3)
        return bytes(data if changed is None else changed), 1, (COLS, ROWS, 3, 1)

    CASES.append(Case(name, rule, "reject", build))


_add_experts("experts-last-slab-missing", "truncated", lambda d, size: d[: 2 * size])
_add_experts("experts-half-a-slab-missing", "truncated", lambda d, size: d[: 2 * size + 256])
_add_experts("experts-bytes-behind", "bad-layout", lambda d, size: d + bytes(256))
_add_experts("experts-second-magic", "bad-magic", lambda d, size: _put("B", size, 0)(d))
_add_experts("experts-second-size", "bad-layout", lambda d, size: _put("Q", size + 16, size + 256)(d))
_add_experts("experts-third-table", "bad-table", lambda d, size: _put("B", 2 * size + 256, 0)(d))
_add_experts("experts-second-scale", "bad-scale", lambda d, size: _put("H", size + 46, 0x7C00)(d))


def _other_tile_cols(d: bytearray, size: int) -> None:
    d[size : 2 * size] = encode_slab(_codes(1) // 30, 1, np.float16([1]), None, 64, n_slabs=3, slab_size=size)


def _other_mode(d: bytearray, size: int) -> None:
    d[size : 2 * size] = encode_slab(_codes(1) // 30, 1, np.float16([1]), np.float32([1]), 32, n_slabs=3, slab_size=size)


_add_experts("experts-second-tile-cols", "bad-shape", _other_tile_cols)
_add_experts("experts-second-offset-mode", "bad-mode", _other_mode)
