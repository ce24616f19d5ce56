# SPDX-License-Identifier: MIT
"""Slow, readable decoder written from docs/format.md: the oracle of all tests. It shares no code
with the codec.

Section numbers are the document's. This is the plane layout, which stands in files; lanes.py beside
it reads the device layout. One file, to be read beside the document from top to bottom.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import xxhash

# ---- 2 Conventions, 3 Glossary ----

KIND_EQ8, KIND_EQ4, KIND_EBF16 = 1, 2, 3
GROUP_ROWS = 16
UNIT_COLS = 4
UNIT = 64  # weights


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


def as_i8(x: int | np.ndarray) -> int | np.ndarray:
    """5.2: modulo 256, the result taken as i8."""
    return (x + 128) % 256 - 128


# ---- 5.2 Code ----

# tail shape -> widths of its digits in bits
TAIL_SHAPES: dict[int, tuple[int, ...]] = {0: (), 1: (2, 2), 2: (1, 1, 2, 2)}

_CODE = struct.Struct("<BBBb8s4s")


@dataclass(frozen=True)
class Code:
    """Parameters of a code, and the numbers that follow from them."""

    raw_bits: int  # B
    bin_bits: int  # k
    tail: int
    base: int
    class_base: tuple[int, ...]  # of the classes that the tail shape has

    @property
    def n_direct(self) -> int:
        """D: raw numbers below it are direct."""
        return 256 if self.raw_bits == 8 else (1 << self.raw_bits) - (1 << self.bin_bits)

    @property
    def digits(self) -> tuple[int, ...]:
        return TAIL_SHAPES[self.tail]

    @property
    def n_classes(self) -> int:
        """A digit of w bits names 2^w - 1 classes."""
        return sum((1 << w) - 1 for w in self.digits)

    @property
    def n_planes(self) -> int:
        return sum(self.digits)


def parse_code(data: bytes) -> Code:
    """The 16 bytes of 5.2.

    Raises:
        Rejected: bad-table.
    """
    raw_bits, bin_bits, tail, base, class_base, reserved = _CODE.unpack(data)
    require(1 <= raw_bits <= 8, "bad-table", "raw_bits")
    require(bin_bits == 0 if raw_bits == 8 else bin_bits < raw_bits, "bad-table", "bin_bits")
    require(tail in TAIL_SHAPES and (tail == 0) == (raw_bits == 8), "bad-table", "tail")
    bases = np.frombuffer(class_base, np.int8).astype(int).tolist()
    code = Code(raw_bits, bin_bits, tail, base, tuple(bases[: Code(raw_bits, bin_bits, tail, base, ()).n_classes]))
    if code.class_base:
        require(code.class_base[0] == as_i8(base + code.n_direct), "bad-table", "class_base[0]")
    require(not any(bases[code.n_classes :]) and not any(reserved), "bad-table", "unused bytes")
    return code


# ---- 5 Slab: validation ----


@dataclass
class Slab:
    """A validated slab (5): the header's fields and the sections."""

    data: bytes  # all slab_size bytes
    kind: int
    n_cols: int
    n_rows: int
    n_slabs: int
    scale_mode: int
    offset_mode: int
    tile_cols: int
    device_size: int
    hash: int
    code: Code
    scales: np.ndarray  # float16 (n_rows,)
    offsets: np.ndarray  # float32 (n_rows,)
    index: np.ndarray  # (n_groups,): begin, in units of 8 bytes
    rests: np.ndarray  # 5.8: uint8 (n_rows, n_cols); no rows unless the kind is EBF16
    body_at: int
    body_size: int
    gaps: list[tuple[int, int]]  # unused byte ranges between sections, and the slack

    @property
    def n_groups(self) -> int:
        return ceil_div(self.n_rows, GROUP_ROWS)

    @property
    def n_units(self) -> int:
        return self.n_cols // UNIT_COLS

    @property
    def raw_size(self) -> int:
        return self.n_units * 8 * self.code.raw_bits

    @cached_property
    def bits(self) -> np.ndarray:
        """2: all bits of the slab, the least significant of a byte first, one byte each."""
        return np.unpackbits(np.frombuffer(self.data, np.uint8), bitorder="little")

    def group_extent(self, group: int) -> tuple[int, int]:
        """5.5: begin and end of a row group, in bytes of the slab."""
        edges = [*(8 * int(begin) for begin in self.index), self.body_size]
        return self.body_at + edges[group], self.body_at + edges[group + 1]


# 5.1; the names follow the table of the document
_HEADER = struct.Struct("<4sHBBQQIIIBBHfIQQQQQQ16sQ")
MAGIC, MAGIC_1 = bytes.fromhex("45515450"), bytes.fromhex("45515431")


def parse_slab(data: bytes, kind: int, n_cols: int, n_rows: int, n_slabs: int) -> Slab:
    """Validate one slab against the GGUF's type and shape.

    Args:
        data: the slab; more bytes may follow only where n_slabs > 1.
    Raises:
        Rejected: naming the rule.
    """
    # 5.1
    require(len(data) >= 256, "truncated", "no header")
    (magic, version, h_kind, reserved, digest, slab_size, h_cols, h_rows, h_slabs, scale_mode, offset_mode, scale_bits, offset, tile_cols,
     device_size, scales_at, offsets_at, index_at, body_at, body_size, code_bytes, rests_at) = _HEADER.unpack_from(data)  # fmt: skip
    require(magic != MAGIC_1, "old-version", "version 1: convert the model again")
    require(magic == MAGIC, "bad-magic")
    require(version == 2, "bad-version")
    require(h_kind in (KIND_EQ8, KIND_EQ4, KIND_EBF16) and h_kind == kind, "bad-kind")
    require(reserved == 0 and not any(data[120:256]), "bad-reserved")
    require((h_cols, h_rows, h_slabs) == (n_cols, n_rows, n_slabs), "bad-shape")
    require(n_cols % 32 == 0 and 32 <= n_cols <= 1 << 24 and 1 <= n_rows < 1 << 31 and 1 <= n_slabs <= 1 << 16, "bad-shape")
    require(tile_cols % 32 == 0 and 32 <= tile_cols <= 1024, "bad-shape", "tile_cols")
    require(scale_mode in (0, 1) and offset_mode in (0, 1, 2), "bad-mode")
    is_ebf16 = kind == KIND_EBF16
    require(not is_ebf16 or (scale_mode, offset_mode) == (0, 0), "bad-mode", "5.8")
    scale = np.array([scale_bits], np.uint16).view(np.float16)[0]
    require(np.isfinite(scale) if scale_mode == 0 and not is_ebf16 else scale_bits == 0, "bad-scale")
    require(np.isfinite(offset) if offset_mode == 1 else data[40:44] == bytes(4), "bad-scale")
    n_tiles = ceil_div(n_rows, 32) * ceil_div(n_cols, tile_cols)
    device_limit = min(1 << 46, 4096 + 6 * n_rows + 176 * n_tiles + 2 * n_rows * n_cols)
    if is_ebf16:
        require(device_size == 0, "bad-layout", "device_size")
    else:
        require(device_size % 256 == 0 and 256 + 512 + 256 <= device_size <= device_limit, "bad-layout", "device_size")

    # 5.2
    code = parse_code(code_bytes)

    # 5: sections follow one another, each at a multiple of 64
    n_groups = ceil_div(n_rows, GROUP_ROWS)
    raw_size = n_cols // UNIT_COLS * 8 * code.raw_bits
    require(body_size % 8 == 0 and n_groups * raw_size <= body_size <= (1 << 35) - 8, "bad-layout", "body_size")
    end = 256
    places, gaps = [], []
    for present, size in (
        (scale_mode == 1, 2 * n_rows),
        (offset_mode == 2, 4 * n_rows),
        (True, 4 * n_groups),
        (is_ebf16, n_rows * n_cols),
        (True, body_size),
    ):
        places.append(align(end, 64) if present else 0)
        if present:
            gaps.append((end, places[-1]))
            end = places[-1] + size
    require([scales_at, offsets_at, index_at, rests_at, body_at] == places, "bad-layout", "section offsets")

    # 5.7
    least = align(end, 256) + 256
    require(slab_size % 256 == 0 and least <= slab_size <= 1 << 46 and (n_slabs > 1 or slab_size == least), "bad-layout", "slab_size")
    gaps.append((end, slab_size))
    require(len(data) >= slab_size, "truncated")
    data = data[:slab_size]

    # 5.3, 5.4, 6.1
    scales = np.frombuffer(data, "<f2", n_rows, scales_at) if scale_mode == 1 else np.full(n_rows, scale)
    offsets = np.frombuffer(data, "<f4", n_rows, offsets_at) if offset_mode == 2 else np.full(n_rows, offset, np.float32)
    require(bool(np.isfinite(scales).all() and np.isfinite(offsets).all()), "bad-scale")
    if kind == KIND_EQ4 and offset_mode:
        minima = minimum(scales, offsets)
        with np.errstate(over="ignore"):
            half = minima.astype(np.float16)
        require(bool(np.isfinite(half).all() and (half.astype(np.float32) == minima).all()), "bad-scale", "minimum is no f16")

    # 5.5
    index = np.frombuffer(data, "<u4", n_groups, index_at)
    require(index[0] == 0, "bad-index", "the first group")
    require(bool((np.diff(np.append(8 * index.astype(np.int64), body_size)) >= raw_size).all()), "bad-index", "a group is too short")
    rests = np.frombuffer(data, np.uint8, n_rows * n_cols if is_ebf16 else 0, rests_at).reshape(-1, n_cols)
    return Slab(
        data, kind, n_cols, n_rows, n_slabs, scale_mode, offset_mode, tile_cols, device_size, digest, code, scales, offsets, index, rests,
        body_at, body_size, gaps,
    )  # fmt: skip


def parse_tensor(data: bytes, kind: int, ne: tuple[int, int, int, int]) -> list[Slab]:
    """4: ne2 slabs, in which slab_size, the modes, tile_cols and device_size are equal (5.1).

    Raises:
        Rejected: naming the rule.
    """
    n_cols, n_rows, n_slabs, ne3 = ne
    require(ne3 == 1, "bad-shape")
    first = parse_slab(data, kind, n_cols, n_rows, n_slabs)
    size = len(first.data)
    require(len(data) >= size * n_slabs, "truncated")
    require(len(data) == size * n_slabs, "bad-layout", "bytes behind the last slab")
    slabs = [first]
    for i in range(1, n_slabs):
        slab = parse_slab(data[i * size :], kind, n_cols, n_rows, n_slabs)
        require(len(slab.data) == size, "bad-layout", "slab sizes differ")
        require((slab.scale_mode, slab.offset_mode) == (first.scale_mode, first.offset_mode), "bad-mode", "modes differ")
        require(slab.tile_cols == first.tile_cols, "bad-shape", "tile_cols differ")
        require(slab.device_size == first.device_size, "bad-layout", "device_size differs")
        slabs.append(slab)
    return slabs


# ---- 5.6 Body ----


def raw_numbers(slab: Slab, group: int) -> np.ndarray:
    """The raw bits r of a row group: int, shape (n_units, 64)."""
    begin, _ = slab.group_extent(group)
    B = slab.code.raw_bits
    units = np.frombuffer(slab.data, np.uint8, slab.raw_size, begin).reshape(slab.n_units, 8 * B).astype(int)
    if B == 8:
        return units
    i = np.arange(UNIT)
    r, have, at = np.zeros((slab.n_units, UNIT), int), 0, 0
    if B & 4:  # nibbles
        r += (units[:, at + i % 32] >> 4 * (i // 32) & 15) << have
        have, at = have + 4, at + 32
    if B & 2:  # pairs
        r += (units[:, at + i % 16] >> 2 * (i // 16) & 3) << have
        have, at = have + 2, at + 16
    if B & 1:  # a plane
        r += (units[:, at + i // 8] >> i % 8 & 1) << have
    return r


# ---- 6 Decoding ----


@dataclass
class Group:
    """What decoding a row group gives; verify looks at all of it."""

    codes: np.ndarray  # int8 (16, n_cols)
    raw: np.ndarray  # r, shape (16, n_cols)
    n_tail: int  # bits of the tail that were used
    n_far: int  # bytes of the far stream that were asked for
    beyond: bool  # the position was moved back to the end of the group


def decode_group(slab: Slab, group: int) -> Group:
    """Decode a row group. The result is defined for any bits behind a validated header and
    index."""
    code, D = slab.code, slab.code.n_direct
    begin, end = slab.group_extent(group)
    raw_end = begin + slab.raw_size
    tail, limit = 8 * raw_end, 8 * (end - raw_end)  # bits: of the slab, and from there
    pos, n_far, beyond = 0, 0, False
    r = raw_numbers(slab, group)  # step 1
    q = code.base + r
    for unit in range(slab.n_units):
        if unit % 4 == 0 and pos > limit:  # step 2
            pos, beyond = limit, True
        weights = np.flatnonzero(r[unit] >= D)  # step 3: the open ones
        f = 0
        for w in code.digits:
            planes = slab.bits[tail + pos : tail + pos + w * len(weights)].reshape(w, -1)
            pos += w * len(weights)
            value = sum(plane.astype(int) << i for i, plane in enumerate(planes))
            last = value < (1 << w) - 1
            done = weights[last]
            q[unit, done] = np.array(code.class_base)[f + value[last]] + r[unit, done] - D  # step 5
            weights = weights[~last]
            f += (1 << w) - 1
        for i in weights:  # step 4
            n_far += 1
            q[unit, i] = slab.data[end - n_far] if end - n_far >= raw_end else 0

    def rows(x: np.ndarray) -> np.ndarray:  # weight i is row i div 4, column i mod 4
        return x.reshape(slab.n_units, GROUP_ROWS, UNIT_COLS).transpose(1, 0, 2).reshape(GROUP_ROWS, slab.n_cols)

    return Group(rows(as_i8(q)).astype(np.int8), rows(r), pos, n_far, beyond)


def decode_codes(slab: Slab) -> np.ndarray:
    """Codes q: int8, shape (n_rows, n_cols)."""
    return np.concatenate([decode_group(slab, group).codes for group in range(slab.n_groups)])[: slab.n_rows]


def decode_bf16(slab: Slab) -> np.ndarray:
    """5.8: sign, exponent and mantissa of each weight as the 16 bits of a bf16, uint16."""
    exponent, rest = decode_codes(slab).astype(int) + 128, slab.rests.astype(int)
    return ((rest >> 7) << 15 | exponent << 7 | rest & 127).astype(np.uint16)


def decode_weights(slab: Slab) -> np.ndarray:
    """The weights of 6: float32, shape (n_rows, n_cols)."""
    if slab.kind == KIND_EBF16:
        return (decode_bf16(slab).astype(np.uint32) << 16).view(np.float32)
    return slab.scales.astype(np.float32)[:, None] * decode_codes(slab).astype(np.float32) + slab.offsets[:, None]


def minimum(scales: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """6.1: m of Q4_1, in f32."""
    return offsets - np.float32(8) * scales.astype(np.float32)


def decode_plain(slab: Slab) -> tuple[str, bytes]:
    """6.1: name of the stock type and its rows in ggml's block layout."""
    if slab.kind == KIND_EBF16:
        return "BF16", decode_bf16(slab).astype("<u2").tobytes()
    if slab.kind == KIND_EQ8 and slab.offset_mode:
        with np.errstate(over="ignore"):
            return "F16", decode_weights(slab).astype("<f2").tobytes()
    blocks = decode_codes(slab).reshape(slab.n_rows, -1, 32)
    out = bytearray()
    for row in range(slab.n_rows):
        head = slab.scales[row].astype("<f2").tobytes()
        if slab.offset_mode:
            head += minimum(slab.scales, slab.offsets)[row].astype("<f2").tobytes()
        for block in blocks[row]:
            if slab.kind == KIND_EQ8:
                out += head + block.tobytes()
            else:
                nibbles = (block.astype(int) + 8 & 15).astype(np.uint8)
                out += head + (nibbles[:16] | nibbles[16:] << 4).astype(np.uint8).tobytes()
    return {KIND_EQ8: "Q8_0"}.get(slab.kind, "Q4_1" if slab.offset_mode else "Q4_0"), bytes(out)


# ---- 9 Trust: what verify adds ----


def slab_hash(data: bytes, name: str, i_slab: int) -> int:
    """5.1: the seed depends on the tensor's name and the slab's number."""
    seed = xxhash.xxh64_intdigest(name.encode(), seed=0) + i_slab
    return xxhash.xxh64_intdigest(data[16:], seed=seed % (1 << 64))


def verify(slab: Slab, name: str, i_slab: int = 0) -> None:
    """Hash, exact row groups, zero padding; rows that fill up the last group hold r = 0.

    Args:
        name: of the tensor in the GGUF.
        i_slab: number of the slab in the tensor.
    Raises:
        Rejected: bad-hash, bad-reserved or bad-stream.
    """
    require(slab_hash(slab.data, name, i_slab) == slab.hash, "bad-hash")
    for start, end in slab.gaps:
        require(not any(slab.data[start:end]), "bad-reserved", "unused bytes")
    for i in range(slab.n_groups):
        begin, end = slab.group_extent(i)
        group = decode_group(slab, i)
        used = slab.raw_size + ceil_div(group.n_tail, 8) + group.n_far
        require(not group.beyond and align(used, 8) == end - begin, "bad-stream", f"length of group {i}")
        between = slab.bits[8 * (begin + slab.raw_size) + group.n_tail : 8 * (end - group.n_far)]
        require(not between.any(), "bad-stream", f"unused bits of group {i}")
        missing = group.raw[max(0, slab.n_rows - GROUP_ROWS * i) :]
        require(not missing.any(), "bad-stream", f"rows that fill up group {i}")
