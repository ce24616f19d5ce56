# SPDX-License-Identifier: MIT
"""The reference encoder and decoder agree with each other, and the decoder rejects every malformed
case for its own reason."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from malformed.cases import CASES, NAME
from reference.decoder import TAIL_SHAPES, Rejected, decode_codes, decode_weights, parse_slab, parse_tensor, verify
from reference.encoder import encode_slab, make_code, rehash, scramble


@pytest.mark.parametrize("kind", [1, 2])
@pytest.mark.parametrize("shape", [(1, 32), (15, 64), (16, 576), (17, 96), (33, 1056)])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("offset", [0, 1, 2])
def test_round_trip(rng, kind, shape, rows, offset):
    top = 127 if kind == 1 else 7
    q = np.clip(rng.normal(0, top / 4, shape), -top, top).astype(np.int8)
    scales = rng.choice(np.float16([0.5, 0.25, 0.0, -2.0]), shape[0] if rows else 1)
    offsets = None if offset == 0 else np.full(1 if offset == 1 else shape[0], 2.0, np.float32)
    slab = parse_slab(encode_slab(q, kind, scales, offsets, name="t"), kind, shape[1], shape[0], 1)
    verify(slab, "t")
    assert np.array_equal(decode_codes(slab), q)
    expected = scales.astype(np.float32).reshape(-1, 1) * q + (0 if offsets is None else offsets.reshape(-1, 1))
    assert np.array_equal(decode_weights(slab), expected)


@pytest.mark.parametrize("raw_bits", range(1, 9))
def test_every_code(rng, raw_bits):
    for bin_bits in range(raw_bits) if raw_bits < 8 else [0]:
        for tail in [shape for shape in TAIL_SHAPES if (shape == 0) == (raw_bits == 8)]:
            code = make_code(raw_bits, bin_bits, tail, int(rng.integers(-128, 128)))
            q = rng.integers(-128, 128, (18, 32)).astype(np.int8)
            slab = parse_slab(encode_slab(q, 1, np.float16([1]), code=code), 1, 32, 18, 1)
            verify(slab, "")
            assert slab.code == code
            assert np.array_equal(decode_codes(slab), q)


def test_a_unit_by_hand():
    """Bits put down one by one, from the text of 5.6: B = 3 (pairs and a plane), k = 1, D = 6, tail
    shape 1, base -2."""
    code = make_code(3, 1, 1, -2, bins=(-4, 6, 8, 10, 12))
    d = bytearray(encode_slab(np.zeros((1, 64), np.int8), 1, np.float16([1]), code=code))
    body = struct.unpack_from("<Q", d, 80)[0]
    for at, value in (
        (0, 1),  # weight 0: pair 01, plane 0: r = 1, direct: -1
        (1, 3),  # weight 1: r = 7, so class 3 at place 1: 8 + 1
        (2, 2),  # weight 2: r = 6, class 0 at place 0: 4
        (3, 2),  # weight 3: r = 6, far
        (16, 0b00001110),  # the plane: bit 2 of weights 1 to 3
    ):
        d[body + at] = value
    # first bit first: digit 1 has the values 3, 0, 3: planes 101 and 101; digit 2 of weights 1 and
    # 3 has 0 (class 3) and 3: planes 01 and 01
    bits = [1, 0, 1, 1, 0, 1, 0, 1, 0, 1]
    raw_size = 16 * 24
    d[body + raw_size : body + raw_size + 2] = bytes(np.packbits(bits, bitorder="little"))
    d[body + raw_size + 7] = 0x9C  # the far stream: -100
    struct.pack_into("<Q", d, 88, raw_size + 8)
    slab = parse_slab(rehash(bytes(d)), 1, 64, 1, 1)
    verify(slab, "")
    assert decode_codes(slab)[0, :5].tolist() == [-1, 9, 4, -100, 0]
    d[body + 4] = 2  # row 1 does not exist
    with pytest.raises(Rejected, match="fill up"):
        verify(parse_slab(rehash(bytes(d)), 1, 64, 1, 1), "")


def test_classes_that_overlap():
    """A class over the direct interval, two that overlap, one that wraps around; a weight takes the
    first that holds it."""
    code = make_code(4, 2, 2, -6, bins=(-6, 7, 9, 126, -20, 50, 0))
    q = np.resize(np.arange(-128, 128), (16, 32)).astype(np.int8)
    slab = parse_slab(encode_slab(q, 1, np.float16([1]), code=code), 1, 32, 16, 1)
    verify(slab, "")
    assert np.array_equal(decode_codes(slab), q)


def test_a_far_weight_may_have_any_place():
    """5.6: r of a far weight is any number from D on."""
    code = make_code(2, 1, 1, 0)
    q = np.zeros((1, 32), np.int8)
    q[0, 0] = 100
    d = bytearray(encode_slab(q, 1, np.float16([1]), code=code))
    body = struct.unpack_from("<Q", d, 80)[0]
    assert d[body] == 2
    d[body] = 3
    slab = parse_slab(rehash(bytes(d)), 1, 32, 1, 1)
    verify(slab, "")
    assert np.array_equal(decode_codes(slab), q)


@pytest.mark.parametrize("kind", [1, 2])
def test_any_bits_decode(rng, kind):
    """6: nothing that stands behind a valid header and index is an error."""
    q = np.clip(rng.normal(0, 2, (33, 96)), -8, 7).astype(np.int8)
    for raw_bits in range(1, 9):
        code = make_code(raw_bits, raw_bits % 3 if 2 < raw_bits < 8 else 0, 0 if raw_bits == 8 else 1 + raw_bits % 2, -2)
        whole = encode_slab(q, kind, np.float16([1]), code=code)
        for _ in range(8):
            assert decode_codes(parse_slab(scramble(whole, rng), kind, 96, 33, 1)).shape == q.shape


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_malformed(case):
    data, kind, ne = case.build()
    with pytest.raises(Rejected) as caught:
        for i, slab in enumerate(parse_tensor(data, kind, ne)):
            assert case.verdict == "accept"
            verify(slab, NAME, i)
    assert caught.value.rule == case.rule
