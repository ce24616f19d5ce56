# SPDX-License-Identifier: MIT
"""Golden vectors (docs/format.md 10): every decoder gives their codes, the encoder their bytes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import xxhash
from reference import decoder as ref_decoder
from vectors import make

from entrollm_gguf import codec
from entrollm_gguf.codec import EntropyType

FOLDER = Path(__file__).parents[1] / "vectors"
INDEX = json.loads((FOLDER / "index.json").read_text())


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


def reference_slabs(entry: dict) -> list[ref_decoder.Slab]:
    n_slabs, n_rows, n_cols = (1, *entry["shape"])[-3:]
    kind = {"EQ8": 1, "EQ4": 2}[entry["type"]]
    return ref_decoder.parse_tensor(payload_of(entry).tobytes(), kind, (n_cols, n_rows, n_slabs, 1))


def test_hashes(entry):
    payload = payload_of(entry).tobytes()
    assert hashlib.sha256(payload).hexdigest() == entry["sha256"]
    size = len(payload) // len(entry["xxh64"])
    for i, digest in enumerate(entry["xxh64"]):
        assert xxhash.xxh64_hexdigest(payload[i * size + 16 : (i + 1) * size]) == digest


def test_the_reference_decoder_gives_the_codes(entry):
    slabs = reference_slabs(entry)
    scales, offsets = grid_of(entry)
    for i, (slab, codes) in enumerate(zip(slabs, codes_of(entry).reshape(len(slabs), *entry["shape"][-2:]))):
        ref_decoder.verify(slab)
        assert np.array_equal(ref_decoder.decode_codes(slab), codes)
        assert np.array_equal(slab.scales, np.broadcast_to(scales[i], slab.scales.shape))
        assert np.array_equal(slab.offsets, np.broadcast_to(0 if offsets is None else offsets[i], slab.offsets.shape))


def test_the_codec_gives_the_codes(entry):
    kind, payload, shape = EntropyType[entry["type"]], payload_of(entry), tuple(entry["shape"])
    codec.verify(kind, payload, shape)
    assert np.array_equal(codec.decode(kind, payload, shape), codes_of(entry))
    scales, offsets = codec.scales_and_offsets(kind, payload, shape)
    expected_scales, expected_offsets = grid_of(entry)
    assert np.array_equal(scales, expected_scales)
    assert (offsets is None) == (expected_offsets is None) and (offsets is None or np.array_equal(offsets, expected_offsets))
    _, rows = codec.decode_plain(kind, payload, shape)
    assert rows.tobytes() == b"".join(ref_decoder.decode_plain(slab)[1] for slab in reference_slabs(entry))


@pytest.mark.parametrize("entry", [e for e in INDEX if e["encoder"] == "codec"], ids=lambda entry: entry["name"])
def test_the_codec_gives_the_bytes(entry):
    scales, offsets = grid_of(entry)
    encoded = codec.encode(EntropyType[entry["type"]], codes_of(entry), scales, offsets, tile_cols=entry["tile_cols"])
    assert hashlib.sha256(encoded.payload).hexdigest() == entry["sha256"]


def test_they_cover_what_the_document_has():
    slabs = {entry["name"]: reference_slabs(entry)[0] for entry in INDEX}
    for kind in (1, 2):
        of_kind = [slab for slab in slabs.values() if slab.kind == kind]
        assert {(slab.scale_mode, slab.offset_mode) for slab in of_kind} >= {(0, 0), (0, 1), (1, 0), (1, 2)}
        assert {slab.n_rows for slab in of_kind} >= {1, 31, 32, 33}
        assert any(slab.n_cols % slab.tile_cols for slab in of_kind)
        assert any(slab.n_slabs > 1 for slab in of_kind)
        assert any(len(set(slab.table)) == 1 for slab in of_kind)
        assert max(t for slab in of_kind for t, _ in slab.table) == 15
        assert any(len({*lanes[lanes > 0]}) > 1 for slab in of_kind for lanes in slab.lane_words)
    assert slabs["eq8-long-lane"].tile_cols < 1024
    assert slabs["eq8-escapes"].n_rows and any(t >= 9 for t, _ in slabs["eq8-escapes"].table)


def test_the_script_makes_them(tmp_path):
    """Nothing here was edited by hand."""
    make.write(tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (FOLDER / path.name).read_bytes(), path.name
    extra = {path.name for path in FOLDER.iterdir() if path.is_file()} - {path.name for path in tmp_path.iterdir()}
    assert extra <= {"make.py", "__init__.py"}
