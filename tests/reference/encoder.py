# SPDX-License-Identifier: MIT
"""Simple encoder written from docs/format.md, independent of the codec: for cross tests, and to
make damaged files from.

Its codes are valid, not optimal.
"""

from __future__ import annotations

import struct

import numpy as np

from .decoder import _CODE, _HEADER, GROUP_ROWS, MAGIC, TAIL_SHAPES, UNIT, UNIT_COLS, Code, align, as_i8, ceil_div, slab_hash


def make_code(raw_bits: int, bin_bits: int, tail: int, base: int, bins: tuple[int, ...] = ()) -> Code:
    """A code, from its parameters (5.2).

    Args:
        bins: first codes of the classes from class 1 on. By default, bins lie side by side,
            alternately below and above the direct interval.
    """
    assert (tail == 0) == (raw_bits == 8)
    empty = Code(raw_bits, bin_bits, tail, base, ())
    if tail:
        size, above = 1 << bin_bits, base + empty.n_direct
        places = [base - (i + 1) // 2 * size if i % 2 else above + i // 2 * size for i in range(empty.n_classes)]
        if bins:
            places = [above, *bins] + [0] * (empty.n_classes - 1 - len(bins))
    else:
        places = []
    return Code(raw_bits, bin_bits, tail, as_i8(base), tuple(as_i8(place) for place in places))


def default_code(codes: np.ndarray) -> Code:
    """A direct interval around the mean, about two standard deviations wide."""
    mean, deviation = float(codes.mean()), float(codes.std())
    if deviation > 50:
        return make_code(8, 0, 0, -128)
    raw_bits = min(7, max(1, int(np.log2(2 * deviation + 1)) + 1))
    bin_bits = max(0, raw_bits - 2)
    n_direct = (1 << raw_bits) - (1 << bin_bits)
    return make_code(raw_bits, bin_bits, max(TAIL_SHAPES), round(mean) - n_direct // 2)


def encode_unit(codes: np.ndarray, exists: np.ndarray, code: Code) -> tuple[np.ndarray, list[np.ndarray], bytes]:
    """5.6: raw numbers of a unit, its bit planes, and its part of the far stream. Arrays have 64
    entries, in the order of weights.

    A weight is coded directly, else by the first class that holds it, else it is far (7). Weights
    that do not exist have r = 0.
    """
    D, far = code.n_direct, code.n_classes
    places = (codes - code.base) % 256
    r = np.where(places < D, places, D)
    c = np.where(places < D, -1, far)
    for i in reversed(range(code.n_classes)):
        places = (codes - code.class_base[i]) % 256
        held = (c >= 0) & (places < 1 << code.bin_bits)
        c[held], r[held] = i, D + places[held]
    r[~exists], c[~exists] = 0, -1

    planes, weights, f = [], np.flatnonzero(c >= 0), 0
    for w in code.digits:
        value = np.minimum(c[weights] - f, (1 << w) - 1)
        planes += [value >> i & 1 for i in range(w)]
        weights = weights[value == (1 << w) - 1]
        f += (1 << w) - 1
    return r, planes, codes[weights].astype(np.int8).tobytes()


def pack_raw(r: np.ndarray, raw_bits: int) -> bytes:
    """5.6: the raw bits of a unit."""
    parts, i = [], np.arange(UNIT)
    for width in (8,) if raw_bits == 8 else [w for w in (4, 2, 1) if raw_bits & w]:
        n_bytes = 8 * width
        part = np.zeros(n_bytes, np.uint8)
        value = (r & (1 << width) - 1).astype(np.uint8)
        if width == 1:  # weight i in byte i div 8
            part = np.packbits(value, bitorder="little")
        else:  # in byte i mod n_bytes
            np.bitwise_or.at(part, i % n_bytes, value << (width * (i // n_bytes)).astype(np.uint8))
        parts.append(part.tobytes())
        r = r >> width
    return b"".join(parts)


def encode_group(codes: np.ndarray, code: Code) -> bytes:
    """A row group (5.6).

    Args:
        codes: int8 (1 to 16 rows, n_cols).
    """
    n_rows, n_cols = codes.shape
    whole = np.zeros((GROUP_ROWS, n_cols), int)
    whole[:n_rows] = codes
    exists = np.arange(UNIT) // UNIT_COLS < n_rows
    raw, planes, far = b"", [np.zeros(0, int)], b""
    for column in range(0, n_cols, UNIT_COLS):
        r, unit_planes, unit_far = encode_unit(whole[:, column : column + UNIT_COLS].reshape(-1), exists, code)
        raw += pack_raw(r, code.raw_bits)
        planes += unit_planes
        far += unit_far
    tail = np.packbits(np.concatenate(planes).astype(np.uint8), bitorder="little").tobytes()
    return raw + tail + bytes(-len(raw + tail + far) % 8) + far[::-1]


def device_size_bound(n_rows: int, n_cols: int, tile_cols: int) -> int:
    """5.1: the most bytes that a slab may take in the device layout, with codes of 15 bits
    everywhere."""
    n_tiles = ceil_div(n_rows, 32) * ceil_div(n_cols, tile_cols)
    return (4096 + 6 * n_rows + 176 * n_tiles + 2 * n_rows * n_cols) // 256 * 256


def encode_slab(
    codes: np.ndarray,
    kind: int,
    scales: np.ndarray,
    offsets: np.ndarray | None = None,
    *,
    rests: np.ndarray | None = None,
    name: str = "",
    i_slab: int = 0,
    code: Code | None = None,
    tile_cols: int = 32,
    device_size: int | None = None,
    n_slabs: int = 1,
    slab_size: int | None = None,
) -> bytes:
    """One slab.

    Args:
        codes: int8 (n_rows, n_cols).
        scales: float16 (1,) or (n_rows,).
        offsets: float32 of the same shapes, or None.
        rests: uint8 of the shape of codes, for EBF16.
        name, i_slab: of the tensor and in it, for the hash.
        code: None for default_code.
        device_size: None for one that suffices whatever the host's code.
        slab_size: for n_slabs > 1, a larger size than needed.
    """
    n_rows, n_cols = codes.shape
    code = code or default_code(codes)
    index, body = b"", b""
    for row in range(0, n_rows, GROUP_ROWS):
        index += struct.pack("<I", len(body) // 8)
        body += encode_group(codes[row : row + GROUP_ROWS], code)

    scale_mode = int(len(scales) > 1)
    offset_mode = 0 if offsets is None else 1 if len(offsets) == 1 else 2
    sections = [
        scales.astype("<f2").tobytes() if scale_mode else None,
        offsets.astype("<f4").tobytes() if offsets is not None and offset_mode == 2 else None,
        index,
        None if rests is None else rests.tobytes(),
        body,
    ]
    data, places = bytes(256), []
    for section in sections:
        if section is not None:
            data += bytes(-len(data) % 64)
        places.append(0 if section is None else len(data))
        data += section or b""
    size = slab_size or align(len(data), 256) + 256
    device_size = 0 if rests is not None else device_size or device_size_bound(n_rows, n_cols, tile_cols)
    rests_at = places.pop(3)
    class_base = np.array(code.class_base, np.int8).tobytes().ljust(8, b"\0")
    header = _HEADER.pack(
        MAGIC, 2, kind, 0, 0, size, n_cols, n_rows, n_slabs, scale_mode, offset_mode,
        0 if scale_mode else int(scales.astype("<f2").view("<u2")[0]), float(offsets[0]) if offset_mode == 1 else 0.0, tile_cols, device_size,
        *places, len(body), _CODE.pack(code.raw_bits, code.bin_bits, code.tail, code.base, class_base, bytes(4)), rests_at,
    )  # fmt: skip
    return rehash((header.ljust(256, b"\0") + data[256:]).ljust(size, b"\0"), name, i_slab)


def encode_tensor(codes: np.ndarray, kind: int, scales: np.ndarray, offsets: np.ndarray | None = None, **keywords) -> bytes:
    """All slabs of a tensor, of equal size.

    Args:
        codes: int8 (n_slabs, n_rows, n_cols).
        scales: float16 (n_slabs, 1 or n_rows).
        offsets: float32 of the same shapes, or None.
        keywords: name, code, tile_cols and device_size of encode_slab.
    """

    def slab(i: int, slab_size: int | None) -> bytes:
        offset = None if offsets is None else offsets[i]
        return encode_slab(codes[i], kind, scales[i], offset, i_slab=i, n_slabs=len(codes), slab_size=slab_size, **keywords)

    size = max(len(slab(i, None)) for i in range(len(codes)))
    return b"".join(slab(i, size) for i in range(len(codes)))


def rehash(slab: bytes, name: str = "", i_slab: int = 0) -> bytes:
    """The slab with the right hash (5.1)."""
    return slab[:8] + struct.pack("<Q", slab_hash(slab, name, i_slab)) + slab[16:]


def scramble(slab: bytes, rng: np.random.Generator) -> bytes:
    """The slab with random bits behind its header and its scales: an index of arbitrary groups that
    a reader accepts, and any body and slack.

    A third of the bodies are even noise, a third mostly ones, and a third mostly zeros. In every
    other one, all groups except the last are as short as possible.
    """
    header = _HEADER.unpack_from(slab)
    n_cols, n_rows, index_at, body_at, body_size, raw_bits = header[6], header[7], header[17], header[18], header[19], slab[96]
    n_groups, raw_size = ceil_div(n_rows, GROUP_ROWS), n_cols // UNIT_COLS * 8 * raw_bits
    taste, short = int(rng.integers(3)), bool(rng.integers(2))
    out = np.frombuffer(slab, np.uint8).copy()
    noise = rng.integers(0, 256, len(out) - body_at).astype(np.uint8)
    if taste:
        rare = (rng.integers(0, 256, noise.size) & rng.integers(0, 256, noise.size) & rng.integers(0, 256, noise.size)).astype(np.uint8)
        noise = ~rare if taste == 1 else rare
    out[body_at:] = noise

    spare = np.sort(rng.integers(0, (body_size - n_groups * raw_size) // 8 + 1, n_groups - 1))  # in units of 8 bytes
    begins = np.arange(n_groups) * (raw_size // 8) + np.concatenate([[0], spare * (not short)]).astype(int)
    out[index_at : index_at + 4 * n_groups] = begins.astype("<u4").view(np.uint8)
    return out.tobytes()
