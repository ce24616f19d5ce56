# SPDX-License-Identifier: MIT
"""Damaged payloads by name, at least one per rule of docs/format.md. Free of pytest and of any
decoder: several tests run them."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from reference.encoder import encode_slab, encode_tensor, make_code, rehash

Built = tuple[bytes, int, tuple[int, int, int, int]]  # payload, kind, ne


@dataclass(frozen=True)
class Case:
    """A payload and what is to happen to it."""

    name: str
    rule: str  # of reference.decoder.Rejected
    verdict: str  # "reject" at load; "accept" at load and reject in verify
    build: Callable[[], Built]


NAME = "blk.0.ffn_up.weight"  # of every case's tensor

# three row groups, the last one with 3 rows, of 16 units; codes that use direct codes, classes, and
# the far stream
ROWS, COLS = 35, 64
CODE = {1: make_code(5, 3, 1, -12), 2: make_code(2, 0, 2, -1), 3: make_code(5, 3, 1, -12)}
RAW_SIZE = {1: 16 * 8 * 5, 2: 16 * 8 * 2}


def _codes(kind: int) -> np.ndarray:
    top = 8 if kind == 2 else 100
    return np.clip(np.random.default_rng(kind).normal(0, top / 4, (ROWS, COLS)), -top, top - 1).astype(np.int8)


def _slab(kind: int = 1, rows: bool = False, offset: int = 0, codes: np.ndarray | None = None, **keywords) -> bytearray:
    scales = np.full(ROWS if rows else 1, 0 if kind == 3 else 0.5, np.float16)
    offsets = None if offset == 0 else np.full(1 if offset == 1 else ROWS, 4.0, np.float32)
    codes = _codes(kind) if codes is None else codes
    if kind == 3:
        keywords["rests"] = np.random.default_rng(3).integers(0, 256, codes.shape, np.uint8)
    return bytearray(encode_slab(codes, kind, scales, offsets, name=NAME, **{"code": CODE[kind], "device_size": 4096, **keywords}))


CASES: list[Case] = []


def _add(
    name: str, rule: str, change: Callable[[bytearray], bytearray | None], verdict: str = "reject", keep_hash: bool = False, **slab
) -> None:
    def build() -> Built:
        data = _slab(**slab)
        changed = change(data)
        result = bytes(data if changed is None else changed)
        if not keep_hash and len(result) >= 16:
            result = rehash(result, NAME)
        return result, slab.get("kind", 1), (COLS, ROWS, 1, 1)

    CASES.append(Case(name, rule, verdict, build))


def _put(form: str, at: int, value) -> Callable[[bytearray], None]:
    return lambda data: struct.pack_into("<" + form, data, at, value)


def _field(data: bytearray, at: int) -> int:
    return struct.unpack_from("<Q", data, at)[0]


def _put_in(field: int, form: str, index: int, value) -> Callable[[bytearray], None]:
    return lambda data: struct.pack_into("<" + form, data, _field(data, field) + index, value)


SLAB_SIZE, DEVICE_SIZE, SCALES, OFFSETS, INDEX, BODY, BODY_SIZE, PARAMETERS, RESTS = 16, 48, 56, 64, 72, 80, 88, 96, 112

# 5.1 header
_add("empty", "truncated", lambda d: bytearray())
_add("half-a-header", "truncated", lambda d: d[:128])
_add("header-only", "truncated", lambda d: d[:256])
_add("last-byte-missing", "truncated", lambda d: d[:-1])
_add("version-1", "old-version", lambda d: d.__setitem__(slice(0, 6), b"EQT1\1\0"))
_add("magic", "bad-magic", _put("B", 0, 0x46))
_add("magic-of-the-device-layout", "bad-magic", _put("B", 3, 0x4C))
_add("big-endian-magic", "bad-magic", lambda d: d.__setitem__(slice(0, 4), b"PTQE"))
_add("version-0", "bad-version", _put("H", 4, 0))
_add("version-1-behind-the-magic-of-2", "bad-version", _put("H", 4, 1))
_add("version-3", "bad-version", _put("H", 4, 3))
_add("kind-0", "bad-kind", _put("B", 6, 0))
_add("kind-of-the-other-type", "bad-kind", _put("B", 6, 2))
_add("kind-of-ebf16", "bad-kind", _put("B", 6, 3))
_add("kind-4", "bad-kind", _put("B", 6, 4))
_add("ebf16-kind-of-eq8", "bad-kind", _put("B", 6, 1), kind=3)
_add("reserved-byte-7", "bad-reserved", _put("B", 7, 1))
_add("reserved-tail-first", "bad-reserved", _put("B", 120, 1))
_add("reserved-tail-last", "bad-reserved", _put("B", 255, 1))
for delta in (-1, 1, -256, 256, 1 << 40):
    _add(f"slab-size{delta:+}", "bad-layout", lambda d, delta=delta: _put("Q", SLAB_SIZE, len(d) + delta)(d))
_add("slab-size-0", "bad-layout", _put("Q", SLAB_SIZE, 0))
_add("slab-size-max", "bad-layout", _put("Q", SLAB_SIZE, 2**64 - 256))
_add("slab-with-256-bytes-more", "bad-layout", lambda d: (_put("Q", SLAB_SIZE, len(d) + 256)(d), d.extend(bytes(256)))[-1])
_add("n-cols", "bad-shape", _put("I", 24, COLS - 32))
_add("n-cols-odd", "bad-shape", _put("I", 24, 33))
_add("n-cols-0", "bad-shape", _put("I", 24, 0))
_add("n-rows", "bad-shape", _put("I", 28, ROWS - 1))
_add("n-rows-0", "bad-shape", _put("I", 28, 0))
_add("n-rows-max", "bad-shape", _put("I", 28, 2**32 - 1))
_add("n-slabs-0", "bad-shape", _put("I", 32, 0))
_add("n-slabs-2", "bad-shape", _put("I", 32, 2))
_add("scale-mode-2", "bad-mode", _put("B", 36, 2))
_add("offset-mode-3", "bad-mode", _put("B", 37, 3))
_add("scale-infinite", "bad-scale", _put("H", 38, 0x7C00))
_add("scale-nan", "bad-scale", _put("H", 38, 0x7E01))
_add("scale-in-header-and-rows", "bad-scale", _put("H", 38, 0x3800), rows=True)
_add("offset-without-mode", "bad-scale", _put("f", 40, 1.0))
_add("offset-negative-zero-without-mode", "bad-scale", _put("f", 40, -0.0))
_add("offset-in-header-and-rows", "bad-scale", _put("f", 40, 4.0), offset=2)
_add("offset-nan", "bad-scale", _put("f", 40, float("nan")), offset=1)
_add("offset-infinite", "bad-scale", _put("f", 40, float("inf")), offset=1)
_add("tile-cols-0", "bad-shape", _put("I", 44, 0))
_add("tile-cols-48", "bad-shape", _put("I", 44, 48))
_add("tile-cols-2048", "bad-shape", _put("I", 44, 2048))
_add("device-size-0", "bad-layout", _put("Q", DEVICE_SIZE, 0))
_add("device-size-768", "bad-layout", _put("Q", DEVICE_SIZE, 768))
_add("device-size-odd", "bad-layout", _put("Q", DEVICE_SIZE, 4096 + 64))
_add(
    "device-size-beyond-15-bits-a-symbol", "bad-layout", lambda d: _put("Q", DEVICE_SIZE, _field(d, DEVICE_SIZE) + 256)(d), device_size=None
)
_add("device-size-too-large", "bad-layout", _put("Q", DEVICE_SIZE, (1 << 46) + 256))
_add("device-size-max", "bad-layout", _put("Q", DEVICE_SIZE, 2**64 - 256))
for name, field in (("index", INDEX), ("body", BODY)):
    _add(f"{name}-at-0", "bad-layout", _put("Q", field, 0))
    _add(f"{name}-at-later", "bad-layout", lambda d, field=field: _put("Q", field, _field(d, field) + 64)(d))
    _add(f"{name}-at-far", "bad-layout", _put("Q", field, 2**63))
_add("scales-at-without-mode", "bad-layout", _put("Q", SCALES, 256))
_add("offsets-at-without-mode", "bad-layout", _put("Q", OFFSETS, 256))
_add("scales-at-0", "bad-layout", _put("Q", SCALES, 0), rows=True)
_add("offsets-at-0", "bad-layout", _put("Q", OFFSETS, 0), offset=2)
_add("mode-without-scales", "bad-layout", lambda d: (_put("B", 36, 1)(d), _put("H", 38, 0)(d))[-1])
_add("body-size-odd", "bad-layout", lambda d: _put("Q", BODY_SIZE, _field(d, BODY_SIZE) - 4)(d))
_add("body-size-too-small", "bad-layout", _put("Q", BODY_SIZE, 3 * RAW_SIZE[1] - 8))
_add("body-size-0", "bad-layout", _put("Q", BODY_SIZE, 0))
_add("body-size-too-large", "bad-layout", _put("Q", BODY_SIZE, 1 << 35))
_add("body-size-max", "bad-layout", _put("Q", BODY_SIZE, 2**64 - 8))

# 5.8 bf16
_add("rests-at-of-another-kind", "bad-layout", _put("Q", RESTS, 512))
_add("ebf16-rests-at-0", "bad-layout", _put("Q", RESTS, 0), kind=3)
_add("ebf16-rests-at-later", "bad-layout", lambda d: _put("Q", RESTS, _field(d, RESTS) + 64)(d), kind=3)
_add("ebf16-rests-in-the-body", "bad-layout", lambda d: _put("Q", RESTS, _field(d, BODY))(d), kind=3)
_add("ebf16-body-at-the-rests", "bad-layout", lambda d: _put("Q", BODY, _field(d, RESTS))(d), kind=3)
_add("ebf16-with-a-scale", "bad-scale", _put("H", 38, 0x3C00), kind=3)
_add("ebf16-with-scales", "bad-mode", _put("B", 36, 1), kind=3)
_add("ebf16-with-an-offset", "bad-mode", _put("B", 37, 1), kind=3)
_add("ebf16-with-a-device-size", "bad-layout", _put("Q", DEVICE_SIZE, 4096), kind=3)
_add("ebf16-last-byte-missing", "truncated", lambda d: d[:-1], kind=3)

# 5.2 code
_add("raw-bits-0", "bad-table", _put("B", PARAMETERS, 0))
_add("raw-bits-9", "bad-table", _put("B", PARAMETERS, 9))
_add("raw-bits-8-with-a-tail", "bad-table", lambda d: _set_code(d, 8, 0, 1))
_add("raw-bits-8-with-bin-bits", "bad-table", lambda d: _set_code(d, 8, 1, 0))
_add("bin-bits-of-all-raw-bits", "bad-table", _put("B", PARAMETERS + 1, 5))
_add("bin-bits-255", "bad-table", _put("B", PARAMETERS + 1, 255))
_add("tail-0-below-8-bits", "bad-table", lambda d: _set_code(d, 5, 3, 0))
_add("tail-unknown", "bad-table", _put("B", PARAMETERS + 2, 3))
_add("tail-255", "bad-table", _put("B", PARAMETERS + 2, 255))
_add("class-0-elsewhere", "bad-table", lambda d: _put("B", PARAMETERS + 4, (d[PARAMETERS + 4] + 1) % 256)(d))
_add("base-moved", "bad-table", lambda d: _put("B", PARAMETERS + 3, (d[PARAMETERS + 3] + 1) % 256)(d))
_add("class-that-the-shape-has-not", "bad-table", _put("B", PARAMETERS + 4 + 6, 1))
_add("class-of-8-bits", "bad-table", _put("b", PARAMETERS + 4, -128), code=make_code(8, 0, 0, -128))
_add("reserved-byte-of-the-code", "bad-table", _put("B", PARAMETERS + 15, 1))


def _set_code(d: bytearray, raw_bits: int, bin_bits: int, tail: int) -> None:
    """Nothing else is wrong, class 0 included."""
    n_direct = 256 if raw_bits == 8 else (1 << raw_bits) - (1 << bin_bits)
    d[PARAMETERS : PARAMETERS + 16] = struct.pack("<BBBbB11s", raw_bits, bin_bits, tail, 0, n_direct % 256 if tail else 0, bytes(11))


# 5.3, 5.4, 6.1 scales and offsets
_add("row-scale-infinite", "bad-scale", _put_in(SCALES, "H", 2 * (ROWS - 1), 0xFC00), rows=True)
_add("row-scale-nan", "bad-scale", _put_in(SCALES, "H", 0, 0x7E00), rows=True)
_add("row-offset-nan", "bad-scale", _put_in(OFFSETS, "I", 4 * (ROWS - 1), 0x7FC00000), offset=2)
_add("q4-minimum-is-no-f16", "bad-scale", _put("f", 40, 5.0001), kind=2, offset=1)
_add("q4-row-minimum-is-no-f16", "bad-scale", _put_in(OFFSETS, "f", 4 * 3, 1.0001), kind=2, offset=2)
_add("q4-minimum-too-large", "bad-scale", _put("f", 40, 1e6), kind=2, offset=1)

# 5.5 index: begin of group i (u32, in units of 8 bytes) at 4 i
_add("first-group-not-at-0", "bad-index", _put_in(INDEX, "I", 0, 1))
_add("first-group-at-the-end", "bad-index", _put_in(INDEX, "I", 0, 2**32 - 1))
_add("group-shorter-than-its-raw-bits", "bad-index", _put_in(INDEX, "I", 4, RAW_SIZE[1] // 8 - 1))
_add("group-of-no-bytes", "bad-index", _put_in(INDEX, "I", 4, 0))
_add("group-without-room-for-raw-bits", "bad-index", lambda d: _put_in(INDEX, "I", 4, _begin(d, 2) - RAW_SIZE[1] // 8 + 1)(d))
_add("groups-in-another-order", "bad-index", lambda d: _put_in(INDEX, "I", 4, _begin(d, 2) + RAW_SIZE[1] // 8)(d))
_add("last-group-without-room", "bad-index", lambda d: _put_in(INDEX, "I", 8, (_field(d, BODY_SIZE) - RAW_SIZE[1]) // 8 + 1)(d))
_add("last-group-at-the-end", "bad-index", lambda d: _put_in(INDEX, "I", 8, _field(d, BODY_SIZE) // 8)(d))
_add("last-group-max", "bad-index", _put_in(INDEX, "I", 8, 2**32 - 1))


def _begin(d: bytearray, group: int) -> int:
    return struct.unpack_from("<I", d, _field(d, INDEX) + 4 * group)[0]


def _claim_many_rows() -> Built:
    """A header of 2^31 - 1 rows. It is consistent in itself, except for the body, which is that of
    one group."""
    n_rows = 2**31 - 1
    d = bytearray(encode_slab(np.zeros((16, 32), np.int8), 1, np.float16([1]), name=NAME))
    body = 256 + -(-4 * -(-n_rows // 16) // 64) * 64
    struct.pack_into("<I", d, 28, n_rows)
    struct.pack_into("<Q", d, BODY, body)
    struct.pack_into("<Q", d, SLAB_SIZE, -(-(body + _field(d, BODY_SIZE)) // 256) * 256 + 256)
    return rehash(bytes(d), NAME), 1, (32, n_rows, 1, 1)


CASES.append(Case("many-rows-of-no-bits", "bad-layout", "reject", _claim_many_rows))

# 9: accepted by a loader, found by verify
_add("hash", "bad-hash", _put("Q", 8, 12345), verdict="accept", keep_hash=True)
_add("hash-of-another-name", "bad-hash", lambda d: bytearray(rehash(bytes(d), NAME + "s")), verdict="accept", keep_hash=True)
_add("hash-without-a-name", "bad-hash", lambda d: bytearray(rehash(bytes(d), "")), verdict="accept", keep_hash=True)
_add("hash-of-another-slab", "bad-hash", lambda d: bytearray(rehash(bytes(d), NAME, 1)), verdict="accept", keep_hash=True)
_add("slack-not-zero", "bad-reserved", lambda d: d.__setitem__(-1, 1), verdict="accept")
_add("gap-not-zero", "bad-reserved", _put_in(INDEX, "B", 4 * 3, 1), verdict="accept")
_add("gap-behind-scales-not-zero", "bad-reserved", _put_in(SCALES, "B", 2 * ROWS, 1), verdict="accept", rows=True)
_add("ebf16-gap-behind-the-index-not-zero", "bad-reserved", _put_in(INDEX, "B", 4 * 3, 1), verdict="accept", kind=3)
CASES.append(Case("ebf16-gap-behind-rests-not-zero", "bad-reserved", "accept", lambda: _gap_behind_rests()))
_add("ebf16-hash-of-other-rests", "bad-hash", _put_in(RESTS, "B", 0, 0), verdict="accept", keep_hash=True, kind=3)
_add("body-inverted", "bad-stream", lambda d: _fill(d, lambda body: 255 - body), verdict="accept")
_add("body-zero", "bad-stream", lambda d: _fill(d, lambda body: body * 0), verdict="accept")
_add("body-ones", "bad-stream", lambda d: _fill(d, lambda body: body * 0 + 255), verdict="accept")
_add("q4-body-ones", "bad-stream", lambda d: _fill(d, lambda body: body * 0 + 255), verdict="accept", kind=2)
# row 3 of the last group is the first one that does not exist: its weights are those from 12 on, in
# the nibbles' bytes from 12 on
_add("missing-row-not-zero", "bad-stream", lambda d: _put_in(BODY, "B", 8 * _begin(d, 2) + 12, 1)(d), verdict="accept")
_add(
    "missing-row-not-zero-in-bytes", "bad-stream", lambda d: _put_in(BODY, "B", 8 * _begin(d, 2) + 12, 1)(d), verdict="accept",
    code=make_code(8, 0, 0, -128),
)  # fmt: skip
_add("group-longer", "bad-stream", lambda d: _regroup(d, lambda tail, far: tail + bytes(8) + far), verdict="accept")
_add("group-shorter", "bad-stream", lambda d: _regroup(d, lambda tail, far: tail[:-8] + far), verdict="accept")
_add("unused-bit-behind-the-tail", "bad-stream", lambda d: _regroup(d, lambda tail, far: tail[:-1] + b"\x80" + far), verdict="accept")
_add("tail-missing", "bad-stream", lambda d: _regroup(d, lambda tail, far: far[-8:]), verdict="accept")
_add("far-stream-missing", "bad-stream", lambda d: _regroup(d, lambda tail, far: tail), verdict="accept")
_add("far-stream-with-more", "bad-stream", lambda d: _regroup(d, lambda tail, far: tail + far + far[:8]), verdict="accept")
_add("all-but-raw-bits-missing", "bad-stream", lambda d: _regroup(d, lambda tail, far: b""), verdict="accept")


def _gap_behind_rests() -> Built:
    """33 rows of 32 bytes end within 64."""
    codes, rests = np.zeros((33, 32), np.int8), np.zeros((33, 32), np.uint8)
    d = bytearray(encode_slab(codes, 3, np.zeros(1, np.float16), rests=rests, name=NAME))
    d[_field(d, RESTS) + rests.size] = 1
    return rehash(bytes(d), NAME), 3, (32, 33, 1, 1)


def _fill(d: bytearray, change: Callable[[np.ndarray], np.ndarray]) -> None:
    body = slice(_field(d, BODY), _field(d, BODY) + _field(d, BODY_SIZE))
    d[body] = change(np.frombuffer(bytes(d[body]), np.uint8)).astype(np.uint8).tobytes()


def _regroup(d: bytearray, change: Callable[[bytes, bytes], bytes]) -> bytearray:
    """Change what follows the raw bits of the last group: change(tail with the padding, far
    stream). All sections are consistent again."""
    begin = _field(d, BODY) + 8 * _begin(d, 2) + RAW_SIZE[1]
    end = _field(d, BODY) + _field(d, BODY_SIZE)
    n_far = int(((_codes(1)[32:] < -36) | (_codes(1)[32:] > 35)).sum())  # neither direct nor in one of six classes of 8 codes
    rest = change(bytes(d[begin : end - n_far]), bytes(d[end - n_far : end]))
    rest += bytes(-len(rest) % 8)
    struct.pack_into("<Q", d, BODY_SIZE, begin + len(rest) - _field(d, BODY))
    whole = bytes(d[:begin]) + rest
    struct.pack_into("<Q", d, SLAB_SIZE, -(-len(whole) // 256) * 256 + 256)
    return bytearray((bytes(d[:begin]) + rest).ljust(_field(d, SLAB_SIZE), b"\0"))


def _one_tail() -> np.ndarray:
    """All weights of the last group are direct but one in its first unit, whose tail is of zero
    bits."""
    codes = _codes(1)
    codes[32:] = 0
    codes[32, 0] = 12  # the first code of class 0
    return codes


# a decoder moves its position back to the end of the group in unit 4: verify must see the bits that
# were missing before
_add("tail-of-zero-bits-missing", "bad-stream", lambda d: _regroup(d, lambda tail, far: b""), verdict="accept", codes=_one_tail())


# 4: experts
def _experts() -> bytearray:
    codes = np.stack([_codes(1) // d for d in (1, 2, 30)])
    return bytearray(encode_tensor(codes, 1, np.full((3, 1), 1, np.float16), name=NAME, device_size=4096))


def _add_experts(name: str, rule: str, change: Callable[[bytearray, int], bytearray | None], verdict: str = "reject") -> None:
    def build() -> Built:
        data = _experts()
        changed = change(data, len(data) // 3)
        return bytes(data if changed is None else changed), 1, (COLS, ROWS, 3, 1)

    CASES.append(Case(name, rule, verdict, build))


_add_experts("experts-last-slab-missing", "truncated", lambda d, size: d[: 2 * size])
_add_experts("experts-half-a-slab-missing", "truncated", lambda d, size: d[: 2 * size + 256])
_add_experts("experts-bytes-behind", "bad-layout", lambda d, size: d + bytes(256))
_add_experts("experts-second-magic", "bad-magic", lambda d, size: _put("B", size, 0)(d))
_add_experts("experts-second-version", "old-version", lambda d, size: _put("B", size + 3, 0x31)(d))
_add_experts("experts-second-size", "bad-layout", lambda d, size: _put("Q", size + SLAB_SIZE, size + 256)(d))
_add_experts("experts-second-tile-cols", "bad-shape", lambda d, size: _put("I", size + 44, 64)(d))
_add_experts("experts-second-device-size", "bad-layout", lambda d, size: _put("Q", size + DEVICE_SIZE, _field(d, DEVICE_SIZE) + 256)(d))
_add_experts("experts-second-scale", "bad-scale", lambda d, size: _put("H", size + 38, 0x7C00)(d))
_add_experts("experts-third-code", "bad-table", lambda d, size: _put("B", 2 * size + PARAMETERS, 0)(d))
_add_experts("experts-third-index", "bad-index", lambda d, size: _put("I", 2 * size + _field(d, INDEX), 1)(d))
_add_experts("experts-in-each-other's-place", "bad-hash", lambda d, size: d[size : 2 * size] + d[:size] + d[2 * size :], verdict="accept")
_add_experts("experts-last-slack", "bad-reserved", lambda d, size: _last_slack(d, size), verdict="accept")


def _last_slack(d: bytearray, size: int) -> None:
    d[-1] = 1
    d[2 * size :] = rehash(bytes(d[2 * size :]), NAME, 2)


def _other_mode(d: bytearray, size: int) -> None:
    sizes = {"n_slabs": 3, "slab_size": size, "device_size": _field(d, DEVICE_SIZE)}
    d[size : 2 * size] = encode_slab(_codes(1) // 2, 1, np.float16([1]), np.float32([1]), name=NAME, i_slab=1, **sizes)


_add_experts("experts-second-offset-mode", "bad-mode", _other_mode)
