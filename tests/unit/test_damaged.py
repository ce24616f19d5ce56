# SPDX-License-Identifier: MIT
"""Damaged payloads at random: the codec and the reference decoder come to the same verdict, and to the same codes where they accept.

`make fuzz` runs this with fresh seeds for minutes, under AddressSanitizer.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import decoder as ref_decoder

from entrollm_gguf import codec
from entrollm_gguf.codec import EntropyType
from entrollm_gguf.errors import FormatError

VECTORS = Path(__file__).parents[1] / "vectors"
# the reference decoder is slow
SMALL = [entry for entry in json.loads((VECTORS / "index.json").read_text()) if np.prod(entry["shape"]) <= 2100]


@st.composite
def damaged(draw) -> tuple[dict, bytes]:
    """A vector and its payload with some bytes changed, most of them where a reader looks first; sometimes cut."""
    entry = draw(st.sampled_from(SMALL))
    payload = bytearray((VECTORS / f"{entry['name']}.payload").read_bytes())
    anywhere = st.integers(0, len(payload) - 1)
    used_header = st.integers(0, 111)
    for at in draw(st.lists(st.one_of(used_header, st.integers(256, 767), anywhere), min_size=1, max_size=4)):
        payload[at] = draw(st.one_of(st.integers(0, 255), st.sampled_from([payload[at] ^ 1 << bit for bit in range(8)])))
    if draw(st.integers(0, 9)) == 0:
        del payload[draw(anywhere) :]
    return entry, bytes(payload)


@settings(deadline=None, max_examples=100)
@given(damaged())
def test_both_decoders_agree(case):
    entry, payload = case
    kind, shape = EntropyType[entry["type"]], tuple(entry["shape"])
    n_slabs, n_rows, n_cols = (1, *shape)[-3:]
    try:
        slabs = ref_decoder.parse_tensor(payload, {"EQ8": 1, "EQ4": 2}[entry["type"]], (n_cols, n_rows, n_slabs, 1))
        expected = np.stack([ref_decoder.decode_codes(slab) for slab in slabs]).reshape(shape)
    except ref_decoder.Rejected:
        expected = None
    try:
        found = codec.decode(kind, np.frombuffer(payload, np.uint8), shape)
    except FormatError:
        found = None
    assert (found is None) == (expected is None)
    assert found is None or np.array_equal(found, expected)
