# SPDX-License-Identifier: MIT
"""The reference encoder and decoder agree with each other, and the decoder rejects every malformed case for its own reason."""

from __future__ import annotations

import numpy as np
import pytest
from malformed.cases import CASES
from reference.decoder import Rejected, decode_codes, decode_weights, parse_slab, parse_tensor, verify
from reference.encoder import encode_slab


@pytest.mark.parametrize("kind", [1, 2])
@pytest.mark.parametrize("shape", [(1, 32), (31, 64), (32, 576), (33, 96), (3, 1056)])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("offset", [0, 1, 2])
def test_round_trip(rng, kind, shape, rows, offset):
    top = 127 if kind == 1 else 7
    q = np.clip(rng.normal(0, top / 4, shape), -top, top).astype(np.int8)
    scales = rng.choice(np.float16([0.5, 0.25, 0.0, -2.0]), shape[0] if rows else 1)
    offsets = None if offset == 0 else np.full(1 if offset == 1 else shape[0], 2.0, np.float32)
    slab = parse_slab(encode_slab(q, kind, scales, offsets, 512), kind, shape[1], shape[0], 1)
    verify(slab)
    assert np.array_equal(decode_codes(slab), q)
    expected = scales.astype(np.float32).reshape(-1, 1) * q + (0 if offsets is None else offsets.reshape(-1, 1))
    assert np.array_equal(decode_weights(slab), expected)


@pytest.mark.parametrize("symbol", [-128, 0, 127])
def test_one_symbol(symbol):
    q = np.full((5, 64), symbol, np.int8)
    slab = parse_slab(encode_slab(q, 1, np.float16([1]), None, 64), 1, 64, 5, 1)
    assert np.array_equal(decode_codes(slab), q)


def test_overlapping_classes_and_escape():
    q = np.tile(np.arange(-8, 8), 8).reshape(2, 64).astype(np.int8)
    # 128..135 by a class of 8, 120..135 by a class of 16, everything by the escape
    slab = parse_slab(encode_slab(q, 1, np.float16([1]), None, 64, classes=[(128, 3, 1), (120, 4, 2), (0, 8, 2)]), 1, 64, 2, 1)
    verify(slab)
    assert np.array_equal(decode_codes(slab), q)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_malformed(case):
    data, kind, ne = case.build()
    with pytest.raises(Rejected) as caught:
        for slab in parse_tensor(data, kind, ne):
            assert case.verdict == "accept"
            verify(slab)
    assert caught.value.rule == case.rule
