# SPDX-License-Identifier: MIT
"""Golden vectors (docs/format.md 10): every decoder gives their codes, the encoder gives their
bytes, and their device layout has not changed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from reference import decoder as ref_decoder
from reference import encoder as ref_encoder
from reference import lanes
from vectors import make

from entrollm_gguf import codec
from entrollm_gguf.codec import EntropyType

FOLDER = Path(__file__).parents[1] / "vectors"
INDEX = json.loads((FOLDER / "index.json").read_text())
KINDS = {"EQ8": 1, "EQ4": 2}


@pytest.fixture(params=INDEX, ids=lambda entry: entry["name"])
def entry(request) -> dict:
    """One entry of the index."""
    return request.param


def payload_of(entry: dict) -> np.ndarray:
    return np.fromfile(FOLDER / f"{entry['name']}.payload", np.uint8)


def codes_of(entry: dict) -> np.ndarray:
    return np.fromfile(FOLDER / f"{entry['name']}.codes", np.int8).reshape(entry["shape"])


def grid_of(entry: dict) -> tuple[np.ndarray, np.ndarray | None]:
    """Scales and offsets, (n_slabs, 1 or n_rows)."""
    n_slabs = (1, *entry["shape"])[-3]
    scales = np.frombuffer(bytes.fromhex(entry["scales"]), "<f2").reshape(n_slabs, -1)
    offsets = entry["offsets"] and np.frombuffer(bytes.fromhex(entry["offsets"]), "<f4").reshape(n_slabs, -1)
    return scales, offsets


def reference_slabs(entry: dict, payload: bytes | None = None) -> list[ref_decoder.Slab]:
    n_slabs, n_rows, n_cols = (1, *entry["shape"])[-3:]
    return ref_decoder.parse_tensor(payload or payload_of(entry).tobytes(), KINDS[entry["type"]], (n_cols, n_rows, n_slabs, 1))


def test_hashes(entry):
    payload = payload_of(entry).tobytes()
    assert hashlib.sha256(payload).hexdigest() == entry["sha256"]
    size = len(payload) // len(entry["xxh64"])
    for i, digest in enumerate(entry["xxh64"]):
        assert f"{ref_decoder.slab_hash(payload[i * size : (i + 1) * size], entry['name'], i):016x}" == digest


def test_the_reference_decoder_gives_the_codes(entry):
    slabs = reference_slabs(entry)
    scales, offsets = grid_of(entry)
    for i, (slab, codes) in enumerate(zip(slabs, codes_of(entry).reshape(len(slabs), *entry["shape"][-2:]))):
        ref_decoder.verify(slab, entry["name"], i)
        assert np.array_equal(ref_decoder.decode_codes(slab), codes)
        assert np.array_equal(slab.scales, np.broadcast_to(scales[i], slab.scales.shape))
        assert np.array_equal(slab.offsets, np.broadcast_to(0 if offsets is None else offsets[i], slab.offsets.shape))
        assert make.parameters(slab.data) == entry["codes"][i]


def test_the_codec_gives_the_codes(entry):
    payload = codec.Payload(EntropyType[entry["type"]], payload_of(entry), tuple(entry["shape"]), entry["name"])
    payload.verify()
    assert np.array_equal(payload.codes(), codes_of(entry))
    scales, offsets = payload.scales_and_offsets()
    expected_scales, expected_offsets = grid_of(entry)
    assert np.array_equal(scales, expected_scales)
    assert (offsets is None) == (expected_offsets is None) and (offsets is None or np.array_equal(offsets, expected_offsets))
    _, rows = payload.plain()
    assert rows.tobytes() == b"".join(ref_decoder.decode_plain(slab)[1] for slab in reference_slabs(entry))


def test_the_device_layout_holds_the_codes(entry):
    kind, payload, shape = EntropyType[entry["type"]], payload_of(entry), tuple(entry["shape"])
    device = codec.Payload(kind, payload, shape, entry["name"]).to_lanes().tobytes()
    assert hashlib.sha256(device).hexdigest() == entry["lanes_sha256"]
    slabs = lanes.parse_tensor(device, reference_slabs(entry))
    scales, offsets = grid_of(entry)
    for i, (slab, codes) in enumerate(zip(slabs, codes_of(entry).reshape(len(slabs), *shape[-2:]))):
        lanes.verify(slab)
        assert np.array_equal(lanes.decode_codes(slab), codes)
        assert np.array_equal(slab.scales, np.broadcast_to(scales[i], slab.scales.shape))
        assert np.array_equal(slab.offsets, np.broadcast_to(0 if offsets is None else offsets[i], slab.offsets.shape))


def test_random_bodies_decode_alike(entry, rng):
    """Each vector's header before random bits: codes and stock types of both decoders."""
    kind, whole, shape = EntropyType[entry["type"]], payload_of(entry).tobytes(), tuple(entry["shape"])
    size = len(whole) // len(entry["xxh64"])
    for _ in range(2):
        payload = b"".join(ref_encoder.scramble(whole[at : at + size], rng) for at in range(0, len(whole), size))
        slabs = reference_slabs(entry, payload)
        damaged = codec.Payload(kind, np.frombuffer(payload, np.uint8), shape)
        expected = np.stack([ref_decoder.decode_codes(slab) for slab in slabs]).reshape(shape)
        assert np.array_equal(damaged.codes(), expected)
        assert damaged.plain()[1].tobytes() == b"".join(ref_decoder.decode_plain(slab)[1] for slab in slabs)


@pytest.mark.parametrize("entry", [e for e in INDEX if e["encoder"] == "codec"], ids=lambda entry: entry["name"])
def test_the_codec_gives_the_bytes(entry):
    scales, offsets = grid_of(entry)
    encoded = codec.encode(EntropyType[entry["type"]], codes_of(entry), scales, offsets, name=entry["name"], tile_cols=entry["tile_cols"])
    assert hashlib.sha256(encoded.payload).hexdigest() == entry["sha256"]


def longest_tail(slab: ref_decoder.Slab) -> int:
    """Bits of the tail that one unit takes, from the codes: each weight goes on until a digit names
    its class."""
    code, most = slab.code, 0
    lengths = np.array([sum(code.digits[: i + 1]) for i, w in enumerate(code.digits) for _ in range((1 << w) - 1)] + [code.n_planes])
    for group in (ref_decoder.decode_group(slab, i) for i in range(slab.n_groups)):
        q, bits = group.codes.astype(int), np.zeros(group.codes.shape, int)
        first = np.full(q.shape, code.n_classes)
        for c in reversed(range(code.n_classes)):
            first[(q - code.class_base[c]) % 256 < 1 << code.bin_bits] = c
        is_open = group.raw >= code.n_direct
        bits[is_open] = lengths[first[is_open]]
        most = max(most, int(bits.reshape(16, -1, 4).sum(axis=(0, 2)).max()))
    return most


def test_they_cover_what_the_document_has():
    slabs = {entry["name"]: reference_slabs(entry) for entry in INDEX}
    for kind in (1, 2):
        of_kind = [slab for some in slabs.values() for slab in some if slab.kind == kind]
        assert {(slab.scale_mode, slab.offset_mode) for slab in of_kind} == {(s, o) for s in (0, 1) for o in (0, 1, 2)}
        assert {slab.n_rows for slab in of_kind} >= {1, 15, 16, 17, 33}
        assert {slab.code.raw_bits for slab in of_kind} == set(range(1, 9))
        assert {slab.code.tail for slab in of_kind} == set(ref_decoder.TAIL_SHAPES)
        assert any(slab.n_slabs > 1 for slab in of_kind)
        assert any(slab.n_cols % slab.tile_cols for slab in of_kind)
        assert any(slab.n_cols > 512 for slab in of_kind)
        assert max(map(longest_tail, of_kind)) > 300
        assert any(57 < longest_tail(slab) < 128 for slab in of_kind)
        used = [ref_decoder.decode_group(slab, group) for slab in of_kind for group in range(slab.n_groups)]
        assert any(group.n_far for group in used) and any(group.n_tail == 0 for group in used)
    by_codec = [slabs[entry["name"]][0] for entry in INDEX if entry["encoder"] == "codec"]
    assert {slab.code.tail for slab in by_codec} == set(ref_decoder.TAIL_SHAPES)
    assert slabs["eq8-long-lane"][0].tile_cols < 1024
    assert len({slab.code for slab in slabs["eq8-2x17x32-slabs-of-other-codes"]}) == 2
    assert ref_decoder.decode_group(slabs["eq8-far"][0], 0).n_far > 0


def test_the_script_makes_them(tmp_path):
    """No file here was edited by hand."""
    make.write(tmp_path)
    make.write_ebf16(tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (FOLDER / path.name).read_bytes(), path.name
    extra = {path.name for path in FOLDER.iterdir() if path.is_file()} - {path.name for path in tmp_path.iterdir()}
    assert extra <= {"make.py", "__init__.py"}
