# SPDX-License-Identifier: MIT
"""The binding itself: ctypes mirrors compared with the tables of docs/format.md, what an open
payload tells, a code in words."""

from __future__ import annotations

import ctypes
import gc
import re
from pathlib import Path

import numpy as np
import pytest

from entrollm_gguf import codec
from entrollm_gguf.codec import EntropyType, Payload
from entrollm_gguf.codec import c as codec_c
from entrollm_gguf.errors import FormatError, RuntimeMissingError

EQ8, EQ4 = EntropyType.EQ8, EntropyType.EQ4
FORMAT = (Path(__file__).parents[2] / "docs" / "format.md").read_text()


def text_of(section: str) -> str:
    text = re.search(rf"^### {re.escape(section)} .*?(?=^##)", FORMAT, re.MULTILINE | re.DOTALL)
    assert text is not None
    return text[0]


def documented(section: str) -> list[tuple[int, int, str]]:
    """Offset, size and name of every field of a section's table."""
    lines = re.findall(r"^\| (\d+) \| (?:(\d+) bytes|(?:(\d+) x )?[uif](\d+)) \| (\w+)", text_of(section), re.MULTILINE)
    return [(int(at), int(n_bytes or int(count or 1) * int(bits) // 8), name) for at, n_bytes, count, bits, name in lines]


def mirrored(structure: type[ctypes.Structure]) -> list[tuple[int, int, str]]:
    fields = [(name, getattr(structure, name)) for name, *_ in structure._fields_]
    return [(field.offset, field.size, re.sub(r"\d$", "", name)) for name, field in fields]


@pytest.mark.parametrize("section, structure", [("5.1", codec_c.Header), ("5.2", codec_c.Code), ("8.1", codec_c.LanesHeader)])
def test_structures_are_those_of_the_document(section, structure):
    told, ours = documented(section), mirrored(structure)
    assert len(told) > 5
    if section == "8.1":  # reserved bytes are not listed there
        ours = [field for field in ours if field[2] != "reserved"]
    assert ours == told


def test_tail_shapes_are_those_of_the_document():
    shapes = re.findall(r"^\| (\d+) \| ([\d, ]+|none) \| (\d+) \| (\d+) \|$", text_of("5.2"), re.MULTILINE)
    assert len(shapes) >= 3
    for number, digits, n_classes, n_planes in shapes:
        code = codec.Code(1, 0, int(number), 0, ())
        assert code.digits == (() if digits == "none" else tuple(map(int, digits.split(", "))))
        assert (len(code.class_bits), code.n_planes) == (int(n_classes), int(n_planes))
    with pytest.raises(codec.CodecError):
        _ = codec.Code(1, 0, len(shapes), 0, ()).digits


def test_sizes_of_structures():
    assert ctypes.sizeof(codec_c.Header) == ctypes.sizeof(codec_c.LanesHeader) == codec.HEADER_SIZE
    assert ctypes.sizeof(codec_c.Code) == 16 and ctypes.sizeof(codec_c.Extent) == 8
    pointers = 6 * ctypes.sizeof(ctypes.c_void_p)
    assert ctypes.sizeof(codec_c.View) == codec.HEADER_SIZE + pointers + 2 * 8
    assert codec_c.View.scales.offset == codec.HEADER_SIZE
    assert ctypes.sizeof(codec_c.Plan) == 16 + 256 + 3 * 8
    assert ctypes.sizeof(codec_c.LanesPlan) == 512 + 512 + 256 + 8


def test_a_library_of_another_version(monkeypatch):
    """Its functions have the names that are asked for, and structures of other sizes."""
    assert codec_c.library().ggml_entropy_size_of(b"view") == ctypes.sizeof(codec_c.View)
    assert codec_c.library().ggml_entropy_size_of(b"views") == 0
    monkeypatch.setitem(codec_c._MIRRORS, "view", type("Longer", (codec_c.View,), {"_fields_": [("more", ctypes.c_void_p)]}))
    with pytest.raises(RuntimeMissingError, match="belongs to another version of this package; run `entrollm runtime build`"):
        codec_c.library.__wrapped__()


def some_codes(rng, kind: EntropyType, shape: tuple[int, ...], sigma: float) -> np.ndarray:
    return np.clip(np.rint(rng.normal(0, sigma, shape)), *kind.code_range).astype(np.int8)


def test_counts_of_matrices_and_stacks(rng):
    q = some_codes(rng, EQ8, (3, 37, 64), 9)
    whole = codec.count_codes(EQ8, q)
    assert np.array_equal(whole, np.bincount(q.astype(int).ravel() + 128, minlength=256))
    assert np.array_equal(whole, sum(codec.count_codes(EQ8, one, threads=3) for one in q))
    for wrong in (q[0, 0], q[None], q.astype(np.int16), q[:, :, :33], q[:, :0], np.zeros((0, 32), np.int8)):
        with pytest.raises(codec.CodecError):
            codec.count_codes(EQ8, wrong)
    with pytest.raises(codec.CodecError, match="range"):
        codec.count_codes(EQ4, np.full((1, 32), 8, np.int8))


@pytest.mark.parametrize("kind, sigma", [(EQ8, 0.3), (EQ8, 2.0), (EQ8, 9.0), (EQ8, 37.0), (EQ4, 0.6), (EQ4, 2.5)])
def test_a_code_in_words(rng, kind, sigma):
    """Lengths and shares that Python derives from a code's parameters are those that C plans
    with."""
    counts = codec.count_codes(kind, some_codes(rng, kind, (64, 512), sigma))
    plan = codec.plan_code(counts)
    assert np.array_equal(plan.code.lengths(), plan.lengths)
    assert int(counts @ plan.code.lengths()) == plan.n_bits
    usage = plan.code.usage(counts)
    assert (usage.direct + usage.tail + usage.far, usage.tail + usage.far, usage.far) == (counts.sum(), plan.n_tail, plan.n_far)
    low, high = plan.code.direct
    assert (high - low) % 256 + 1 == plan.code.n_direct
    assert (plan.code.lengths() == plan.code.raw_bits).sum() == plan.code.n_direct
    assert len(plan.code.class_base) == len(plan.code.class_bits) == len(plan.code.classes)
    assert plan.code.n_planes == max(plan.code.class_bits)
    # the first class lies beside the direct interval
    assert (plan.code.classes[0][0] - low) % 256 == plan.code.n_direct


def test_a_code_of_eight_bits():
    plan = codec.plan_code(np.full(256, 1000, np.uint64))
    assert plan.code == codec.Code(8, 0, 0, plan.code.base, ()) and plan.code.digits == () and plan.code.n_direct == 256
    assert (plan.code.lengths() == 8).all() and (plan.n_bits, plan.n_tail, plan.n_far) == (8 * 256_000, 0, 0)
    assert plan.code.usage(np.ones(256, np.uint64)) == codec.CodeUsage(256, 0, 0)


@pytest.mark.parametrize("kind", [EQ8, EQ4])
@pytest.mark.parametrize("with_offsets", [False, True])
def test_an_open_payload(rng, kind, with_offsets):
    q = some_codes(rng, kind, (3, 37, 96), 2.0)
    scales = rng.uniform(0.01, 0.1, (3, 37)).astype(np.float16)
    offsets = 8 * scales.astype(np.float32) if with_offsets else None
    encoded = codec.encode(kind, q, scales, offsets, name="blk.0.w")
    opened = Payload(kind, encoded.payload.copy(), q.shape, "blk.0.w")
    gc.collect()  # it holds the copy
    assert np.array_equal(opened.codes(), q) and np.array_equal(opened.codes(threads=1), q)
    opened.verify()
    got_scales, got_offsets = opened.scales_and_offsets()
    assert np.array_equal(got_scales, scales)
    assert (got_offsets is None) if offsets is None else np.array_equal(got_offsets, offsets)
    counts = opened.counts()
    assert np.array_equal(counts, [codec.count_codes(kind, one) for one in q])
    assert opened.code_parameters() == [codec.plan_code(one).code for one in counts]
    assert opened.header.code == opened.code_parameters()[0] and opened.header.n_bytes == encoded.payload.size
    used = [code.usage(one) for code, one in zip(opened.code_parameters(), counts)]
    assert all(one.direct + one.tail + one.far == q[0].size for one in used)
    assert encoded.entropy_bits == pytest.approx(sum(map(codec.entropy_bits, counts)))
    name, rows = opened.plain()
    assert name == opened.header.plain_type and rows.shape[:2] == q.shape[:2]
    # one matrix alone, seen without the leading axis
    alone = codec.encode(kind, q[0], scales[0], None if offsets is None else offsets[0])
    assert np.array_equal(codec.Payload(kind, alone.payload, (1, *q.shape[1:])).codes()[0], q[0])


def test_the_hash_takes_in_name_and_place(rng):
    q = some_codes(rng, EQ8, (2, 16, 32), 4.0)
    payload = codec.encode(EQ8, q, np.float16([1]), name="blk.0.ffn_up_exps.weight").payload
    codec.Payload(EQ8, payload, q.shape, "blk.0.ffn_up_exps.weight").verify()
    with pytest.raises(FormatError, match=r"^this one: .*hash"):
        codec.Payload(EQ8, payload, q.shape, "blk.1.ffn_up_exps.weight", label="this one").verify()
    swapped = payload.reshape(2, -1)[::-1].ravel()
    with pytest.raises(FormatError, match=r"^blk\.0\.ffn_up_exps\.weight: .*hash"):
        codec.Payload(EQ8, swapped, q.shape, "blk.0.ffn_up_exps.weight").verify()
    assert np.array_equal(codec.Payload(EQ8, swapped, q.shape).codes(), q[::-1])


@pytest.mark.parametrize("kind", [EQ8, EQ4])
@pytest.mark.parametrize("shape, tile_cols", [((1, 32), None), ((70, 1056), 96), ((3, 33, 64), 64)])
def test_the_device_layout_takes_what_the_header_says(rng, kind, shape, tile_cols):
    q = some_codes(rng, kind, shape, 3.0)
    encoded = codec.encode(kind, q, np.float16([0.5]), tile_cols=tile_cols)
    header = codec.read_header(kind, encoded.payload, shape)
    lanes = codec.Payload(kind, encoded.payload, shape).to_lanes()
    assert header.tile_cols == encoded.tile_cols and lanes.size == header.device_bytes
    assert np.array_equal(lanes, codec.Payload(kind, encoded.payload, shape).to_lanes(threads=3))
    for slab in lanes.reshape(header.n_slabs, header.device_size):
        head = codec_c.LanesHeader.from_buffer_copy(slab.tobytes())
        assert bytes(head.magic) == b"EQTL" and head.slab_size == header.device_size and head.tile_cols == header.tile_cols
        assert (head.n_slabs, head.n_rows, head.n_cols) == (header.n_slabs, header.n_rows, header.n_cols)
    # and the longest slab has nothing to spare
    assert max(np.flatnonzero(slab)[-1] for slab in lanes.reshape(header.n_slabs, -1)) >= header.device_size - 256 - 256


def test_codes_that_do_not_fit_the_device_layout(rng):
    """A body of other bits decodes to codes that need more room than the header promises."""
    q = np.zeros((64, 1024), np.int8)
    q[0, :100] = rng.integers(-128, 127, 100)
    payload = codec.encode(EQ8, q, np.float16([1])).payload
    body_at, body_size = (int(n) for n in payload[80:96].view(np.uint64))
    payload[body_at : body_at + body_size] = rng.integers(0, 256, body_size)
    assert codec.Payload(EQ8, payload, q.shape).codes().shape == q.shape
    with pytest.raises(FormatError, match="t7: the codes do not fit"):
        codec.Payload(EQ8, payload, q.shape, "t7").to_lanes()


@pytest.mark.parametrize("kind, sigma", [(EQ8, 1.0), (EQ8, 3.9), (EQ8, 28.0), (EQ4, 2.0)])
@pytest.mark.parametrize("shape", [(512, 576), (1000, 256), (2, 200, 1024)])
def test_expected_sizes(rng, kind, sigma, shape):
    encoded = codec.encode(kind, some_codes(rng, kind, shape, sigma), np.ones(shape[-2], np.float16))
    raw_bits = codec.Payload(kind, encoded.payload, shape).code_parameters()[0].raw_bits
    assert codec.expected_size(shape, encoded.coded_bits, raw_bits) == pytest.approx(encoded.payload.size, rel=0.002, abs=600)


def test_tiles_are_checked():
    for tile_cols in (0, 16, 33, 1056, -32):
        with pytest.raises(codec.CodecError, match="tile_cols"):
            codec.encode(EQ8, np.zeros((2, 32), np.int8), np.float16([1]), tile_cols=tile_cols)
