# SPDX-License-Identifier: MIT
"""Damaged payloads at random: the codec and the reference decoder come to the same verdict, and to
the same codes where they accept.

`make fuzz` runs this with fresh seeds for minutes, under AddressSanitizer.
"""

from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import decoder as ref_decoder
from reference import encoder as ref_encoder

from entrollm_gguf import codec
from entrollm_gguf.codec import EntropyType
from entrollm_gguf.errors import FormatError

VECTORS = Path(__file__).parents[1] / "vectors"
INDEX = json.loads((VECTORS / "index.json").read_text())


@st.composite
def damaged(draw) -> tuple[dict, bytes]:
    """A vector and its payload with some bytes changed, most of them where a reader looks first, or
    with a random body; sometimes cut."""
    entry = draw(st.sampled_from(INDEX))
    payload = bytearray((VECTORS / f"{entry['name']}.payload").read_bytes())
    slab_size, index_at, body_at = (struct.unpack_from("<Q", payload, at)[0] for at in (16, 72, 80))
    if draw(st.integers(0, 2)) == 0:
        rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        slabs = [bytes(payload[at : at + slab_size]) for at in range(0, len(payload), slab_size)]
        payload = bytearray(b"".join(ref_encoder.scramble(slab, rng) for slab in slabs))
    first = slab_size * draw(st.integers(0, len(payload) // slab_size - 1))
    places = st.one_of(st.integers(0, 111), st.integers(96, 111), st.integers(index_at, body_at - 1), st.integers(body_at, slab_size - 1))
    for place in draw(st.lists(places, min_size=0, max_size=4)):
        at = first + place
        payload[at] = draw(st.one_of(st.integers(0, 255), st.sampled_from([payload[at] ^ 1 << bit for bit in range(8)])))
    if draw(st.booleans()):  # with the right hash, verify gets to the checks behind it
        slabs = [bytes(payload[at : at + slab_size]) for at in range(0, len(payload), slab_size)]
        payload = bytearray(b"".join(ref_encoder.rehash(slab, entry["name"], i) for i, slab in enumerate(slabs)))
    if draw(st.integers(0, 9)) == 0:
        del payload[draw(st.integers(0, len(payload) - 1)) :]
    return entry, bytes(payload)


def read_by_reference(entry: dict, data: bytes) -> tuple[np.ndarray | None, bool]:
    """Codes, None where a loader refuses the payload, and whether verify accepts it."""
    n_slabs, n_rows, n_cols = (1, *entry["shape"])[-3:]
    try:
        slabs = ref_decoder.parse_tensor(data, {"EQ8": 1, "EQ4": 2}[entry["type"]], (n_cols, n_rows, n_slabs, 1))
    except ref_decoder.Rejected:
        return None, False
    codes = np.stack([ref_decoder.decode_codes(slab) for slab in slabs]).reshape(entry["shape"])
    try:
        for i, slab in enumerate(slabs):
            ref_decoder.verify(slab, entry["name"], i)
    except ref_decoder.Rejected:
        return codes, False
    return codes, True


def read_by_codec(entry: dict, data: bytes) -> tuple[np.ndarray | None, bool]:
    """The same by the C codec."""
    kind, payload, shape = EntropyType[entry["type"]], np.frombuffer(data, np.uint8), tuple(entry["shape"])
    try:
        codes = codec.Payload(kind, payload, shape).codes()
    except FormatError:
        return None, False
    try:
        codec.Payload(kind, payload, shape, entry["name"]).verify()
    except FormatError:
        return codes, False
    return codes, True


@settings(deadline=None, max_examples=200)
@given(damaged())
def test_both_decoders_agree(case):
    entry, data = case
    expected, exact = read_by_reference(entry, data)
    found, accepted = read_by_codec(entry, data)
    assert (found is None) == (expected is None)
    assert found is None or np.array_equal(found, expected)
    assert accepted == exact
    if found is not None:  # it only has to stay in bounds: the size that the header promises may not suffice for other codes
        with contextlib.suppress(FormatError):
            codec.Payload(EntropyType[entry["type"]], np.frombuffer(data, np.uint8), tuple(entry["shape"])).to_lanes()
