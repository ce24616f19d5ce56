# SPDX-License-Identifier: MIT
"""The C codec against the reference decoder and encoder, which were written from docs/format.md
alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import decoder as ref_decoder
from reference import encoder as ref_encoder
from reference import lanes

from entrollm_gguf import codec
from entrollm_gguf.codec import EntropyType
from entrollm_gguf.errors import FormatError

EQ8, EQ4 = EntropyType.EQ8, EntropyType.EQ4
KINDS = {EQ8: 1, EQ4: 2}  # ggml type -> kind byte of the header
NAME = "blk.7.attn_q.weight"

SHAPES = [(1, 32), (1, 64), (15, 32), (16, 64), (17, 576), (64, 96), (65, 1056), (7, 4096)]


def random_codes(rng: np.random.Generator, kind: EntropyType, shape: tuple[int, ...], spread: float = 0.12) -> np.ndarray:
    """Heavy-tailed codes around zero; `spread` is relative to the range of the type."""
    low, high = kind.code_range
    values = rng.standard_t(4, shape) * spread * high
    return np.clip(np.rint(values), low, high).astype(np.int8)


def random_grid(rng: np.random.Generator, kind: EntropyType, n_rows: int, scale_mode: int, offset_mode: int):
    """Scales and offsets of the modes; for EQ4, offsets that give f16 minima."""
    scales = rng.uniform(0.001, 0.1, n_rows if scale_mode else 1).astype(np.float16)
    if offset_mode == 0:
        return scales, None
    n = n_rows if offset_mode == 2 else 1
    if offset_mode == 1:
        scales = scales[:1] if kind is EQ4 else scales  # one offset serves one scale exactly
    minimum = rng.uniform(-0.5, 0.5, n).astype(np.float16).astype(np.float32)
    half = 8 if kind is EQ4 else 128
    offsets = (minimum + half * np.broadcast_to(scales.astype(np.float32), (n,) if len(scales) == 1 else scales.shape)[:n]).astype(
        np.float32
    )
    return scales, offsets


def reference_slab(payload: np.ndarray, kind: EntropyType, shape: tuple[int, int]) -> ref_decoder.Slab:
    """A matrix through the reference decoder's validation."""
    return ref_decoder.parse_slab(payload.tobytes(), KINDS[kind], shape[1], shape[0], 1)


def check_lanes(kind: EntropyType, payload: np.ndarray, shape: tuple[int, ...], codes: np.ndarray) -> None:
    """The device layout of a payload is what section 8 says, and holds these codes."""
    n_slabs, n_rows, n_cols = (1, *shape)[-3:]
    slabs = ref_decoder.parse_tensor(payload.tobytes(), KINDS[kind], (n_cols, n_rows, n_slabs, 1))
    device = lanes.parse_tensor(codec.Payload(kind, payload, shape, NAME).to_lanes().tobytes(), slabs)
    for plane, slab, expected in zip(slabs, device, codes.reshape(n_slabs, n_rows, n_cols)):
        lanes.verify(slab)
        assert np.array_equal(lanes.decode_codes(slab), expected)
        assert np.array_equal(slab.scales, plane.scales) and np.array_equal(slab.offsets, plane.offsets)


@pytest.mark.parametrize("kind", [EQ8, EQ4])
@pytest.mark.parametrize("shape", SHAPES)
def test_reference_decodes_what_c_encodes(rng, kind, shape):
    q = random_codes(rng, kind, shape)
    scales, _ = random_grid(rng, kind, shape[0], 1, 0)
    encoded = codec.encode(kind, q, scales, name=NAME)
    slab = reference_slab(encoded.payload, kind, shape)
    ref_decoder.verify(slab, NAME)
    assert np.array_equal(ref_decoder.decode_codes(slab), q)
    payload = codec.Payload(kind, encoded.payload, shape, NAME)
    assert np.array_equal(payload.codes(), q)
    payload.verify()
    check_lanes(kind, encoded.payload, shape, q)


@pytest.mark.parametrize("kind", [EQ8, EQ4])
@pytest.mark.parametrize("shape", SHAPES)
def test_c_decodes_what_the_reference_encodes(rng, kind, shape):
    q = random_codes(rng, kind, shape)
    scales, _ = random_grid(rng, kind, shape[0], 0, 0)
    data = np.frombuffer(ref_encoder.encode_slab(q, KINDS[kind], scales, name=NAME), np.uint8)
    payload = codec.Payload(kind, data, shape, NAME)
    payload.verify()
    assert np.array_equal(payload.codes(), q)


@pytest.mark.parametrize("raw_bits", range(1, 9))
def test_c_decodes_every_code(rng, raw_bits):
    """All k and tail shapes: what their parameters say, and what random bits mean under them."""
    shape = (19, 96)
    q = rng.integers(-128, 128, shape).astype(np.int8)
    for bin_bits in range(raw_bits) if raw_bits < 8 else [0]:
        for tail in [shape for shape in ref_decoder.TAIL_SHAPES if (shape == 0) == (raw_bits == 8)]:
            code = ref_encoder.make_code(raw_bits, bin_bits, tail, int(rng.integers(-128, 128)))
            whole = ref_encoder.encode_slab(q, 1, np.float16([1]), name=NAME, code=code)
            payload = codec.Payload(EQ8, np.frombuffer(whole, np.uint8), shape, NAME)
            payload.verify()
            assert np.array_equal(payload.codes(), q)
            assert dataclasses.asdict(payload.code_parameters()[0]) == dataclasses.asdict(code)
            for _ in range(4):
                damaged = np.frombuffer(ref_encoder.scramble(whole, rng), np.uint8)
                expected = ref_decoder.decode_codes(reference_slab(damaged, EQ8, shape))
                assert np.array_equal(codec.Payload(EQ8, damaged, shape).codes(), expected)


@pytest.mark.parametrize("kind", [EQ8, EQ4])
@pytest.mark.parametrize("scale_mode", [0, 1])
@pytest.mark.parametrize("offset_mode", [0, 1, 2])
def test_plain_rows_are_the_reference_s(rng, kind, scale_mode, offset_mode):
    shape = (45, 192)
    q = random_codes(rng, kind, shape)
    scales, offsets = random_grid(rng, kind, shape[0], scale_mode, offset_mode)
    encoded = codec.encode(kind, q, scales, offsets, tile_cols=128)
    slab = reference_slab(encoded.payload, kind, shape)
    payload = codec.Payload(kind, encoded.payload, shape)
    name, rows = payload.plain()
    ref_name, ref_rows = ref_decoder.decode_plain(slab)
    assert name == ref_name
    assert rows.tobytes() == ref_rows
    got_scales, got_offsets = payload.scales_and_offsets()
    assert np.array_equal(got_scales[0], scales)
    assert (offsets is None and got_offsets is None) or np.array_equal(got_offsets[0], offsets)
    check_lanes(kind, encoded.payload, shape, q)


@pytest.mark.parametrize("symbol", [-128, -1, 0, 127])
def test_one_symbol(symbol):
    q = np.full((40, 96), symbol, np.int8)
    encoded = codec.encode(EQ8, q, np.float16([1]))
    assert encoded.coded_bits == q.size  # one bit a code
    assert np.array_equal(codec.Payload(EQ8, encoded.payload, q.shape).codes(), q)
    assert np.array_equal(ref_decoder.decode_codes(reference_slab(encoded.payload, EQ8, q.shape)), q)
    check_lanes(EQ8, encoded.payload, q.shape, q)


def test_rare_codes_are_far(rng):
    # one value nearly always, and every other value once, which are more than there are classes
    q = np.zeros((64, 1024), np.int8)
    q.reshape(-1)[rng.choice(q.size, 255, replace=False)] = np.delete(np.arange(-128, 128), 128)
    encoded = codec.encode(EQ8, q, np.float16([1]))
    plan = codec.plan_code(codec.count_codes(EQ8, q))
    assert plan.code.raw_bits == 1 and plan.lengths[128] == 1
    assert 0 < plan.n_far < plan.n_tail == 255
    slab = reference_slab(encoded.payload, EQ8, q.shape)
    ref_decoder.verify(slab, "")
    assert np.array_equal(ref_decoder.decode_codes(slab), q)
    assert sum(ref_decoder.decode_group(slab, group).n_far for group in range(slab.n_groups)) == plan.n_far


def test_uniform_codes_take_eight_bits(rng):
    q = rng.permutation(np.tile(np.arange(-128, 128), 256)).reshape(64, 1024).astype(np.int8)
    encoded = codec.encode(EQ8, q, np.float16([1]))
    assert encoded.coded_bits == 8 * q.size
    assert np.array_equal(codec.Payload(EQ8, encoded.payload, q.shape).codes(), q)


def test_the_coded_size_is_what_stands_in_the_file(rng):
    """Bits of raw numbers, tails and far streams, and what the plan said."""
    q = random_codes(rng, EQ8, (32, 576))
    encoded = codec.encode(EQ8, q, np.float16([1]))
    slab = reference_slab(encoded.payload, EQ8, q.shape)
    groups = [ref_decoder.decode_group(slab, group) for group in range(slab.n_groups)]
    coded = slab.code.raw_bits * q.size + sum(group.n_tail + 8 * group.n_far for group in groups)
    plan = codec.plan_code(codec.count_codes(EQ8, q))
    assert encoded.coded_bits == plan.n_bits == coded
    assert plan.n_bits == int((plan.lengths.astype(int) * codec.count_codes(EQ8, q).astype(int)).sum())
    assert encoded.entropy_bits == codec.entropy_bits(codec.count_codes(EQ8, q)) <= coded


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_threads_give_the_same_bytes(rng, threads):
    q = random_codes(rng, EQ8, (333, 512))
    one = codec.encode(EQ8, q, np.float16([0.01]), threads=1)
    assert np.array_equal(codec.encode(EQ8, q, np.float16([0.01]), threads=threads).payload, one.payload)
    assert np.array_equal(codec.Payload(EQ8, one.payload, q.shape).codes(threads=threads), q)
    device = codec.Payload(EQ8, one.payload, q.shape).to_lanes(threads=1)
    assert np.array_equal(codec.Payload(EQ8, one.payload, q.shape).to_lanes(threads=threads), device)


def test_long_lanes_take_smaller_tiles(rng):
    # rare values everywhere in one row: 1024 codes of 9 and more bits exceed 255 words
    q = np.zeros((640, 1024), np.int8)
    q[5] = rng.integers(-128, 127, 1024)
    encoded = codec.encode(EQ8, q, np.float16([1]), tile_cols=1024)
    assert encoded.tile_cols < 1024
    assert np.array_equal(codec.Payload(EQ8, encoded.payload, q.shape).codes(), q)
    check_lanes(EQ8, encoded.payload, q.shape, q)


@pytest.mark.parametrize("kind", [EQ8, EQ4])
def test_experts_are_slabs_of_equal_size(rng, kind):
    # very different distributions: the slabs would differ in size
    q = np.stack([random_codes(rng, kind, (40, 160), spread) for spread in (0.01, 0.1, 0.5)])
    scales = rng.uniform(0.001, 0.1, (3, 40)).astype(np.float16)
    encoded = codec.encode(kind, q, scales, name=NAME)
    assert encoded.payload.size % (3 * 256) == 0
    slabs = ref_decoder.parse_tensor(encoded.payload.tobytes(), KINDS[kind], (160, 40, 3, 1))
    for i, slab in enumerate(slabs):
        ref_decoder.verify(slab, NAME, i)
    assert np.array_equal(np.stack([ref_decoder.decode_codes(slab) for slab in slabs]), q)
    assert np.array_equal(codec.Payload(kind, encoded.payload, q.shape).codes(), q)
    codec.Payload(kind, encoded.payload, q.shape, NAME).verify()
    _, rows = codec.Payload(kind, encoded.payload, q.shape).plain()
    assert rows.tobytes() == b"".join(ref_decoder.decode_plain(slab)[1] for slab in slabs)
    assert np.array_equal(codec.count_codes(kind, q), np.bincount(q.reshape(-1).astype(int) + 128, minlength=256))
    check_lanes(kind, encoded.payload, q.shape, q)


def test_the_hash_knows_name_and_place(rng):
    q = random_codes(rng, EQ8, (2, 20, 32))
    payload = codec.encode(EQ8, q, np.float16([1]), name=NAME).payload
    codec.Payload(EQ8, payload, q.shape, NAME).verify()
    for name in ("", NAME + "s", "blk.8.attn_q.weight"):
        with pytest.raises(FormatError, match="hash"):
            codec.Payload(EQ8, payload, q.shape, name).verify()
    swapped = np.concatenate(np.split(payload, 2)[::-1])
    with pytest.raises(FormatError, match="a label: hash"):
        codec.Payload(EQ8, swapped, q.shape, NAME, label="a label").verify()
    assert np.array_equal(codec.Payload(EQ8, swapped, q.shape).codes(), q[::-1])  # a loader does not look at it


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from([EQ8, EQ4]),
    n_rows=st.integers(1, 70),
    n_blocks=st.integers(1, 12),
    tile_blocks=st.integers(1, 32),
    spread=st.floats(0.001, 2.0),
    seed=st.integers(0, 2**32 - 1),
)
def test_round_trip(kind, n_rows, n_blocks, tile_blocks, spread, seed):
    rng = np.random.default_rng(seed)
    shape = (n_rows, 32 * n_blocks)
    q = random_codes(rng, kind, shape, spread)
    encoded = codec.encode(kind, q, np.float16([0.5]), tile_cols=32 * tile_blocks, name=NAME)
    assert np.array_equal(codec.Payload(kind, encoded.payload, shape).codes(), q)
    codec.Payload(kind, encoded.payload, shape, NAME).verify()
    header = codec.read_header(kind, encoded.payload, shape)
    assert header.n_bytes == encoded.payload.size
    assert header.device_bytes == codec.Payload(kind, encoded.payload, shape).to_lanes().size


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from([EQ8, EQ4]),
    n_rows=st.integers(1, 40),
    n_blocks=st.integers(1, 20),
    raw_bits=st.integers(1, 8),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_bits_decode_as_the_reference_says(kind, n_rows, n_blocks, raw_bits, seed):
    """Random bodies behind valid headers and indices, decoded to codes, to a stock type, and to the
    device layout."""
    rng = np.random.default_rng(seed)
    shape = (n_rows, 32 * n_blocks)
    tail = 0 if raw_bits == 8 else int(rng.choice([shape for shape in ref_decoder.TAIL_SHAPES if shape]))
    bin_bits = 0 if raw_bits == 8 else int(rng.integers(raw_bits))
    code = ref_encoder.make_code(raw_bits, bin_bits, tail, int(rng.integers(-128, 128)), tuple(rng.integers(-128, 128, 5).tolist()))
    whole = ref_encoder.encode_slab(random_codes(rng, kind, shape), KINDS[kind], np.float16([0.5]), np.float32([4]), code=code)
    payload = np.frombuffer(ref_encoder.scramble(whole, rng), np.uint8)
    slab = reference_slab(payload, kind, shape)
    expected = ref_decoder.decode_codes(slab)
    assert np.array_equal(codec.Payload(kind, payload, shape).codes(), expected)
    name, rows = codec.Payload(kind, payload, shape).plain()
    assert (name, rows.tobytes()) == ref_decoder.decode_plain(slab)
    # in the device layout codes of EQ4 are taken modulo 16 (8)
    check_lanes(kind, payload, shape, expected if kind is EQ8 else (expected.astype(int) + 8 & 15) - 8)


def test_codes_that_do_not_fit_the_promised_device_layout_are_refused(rng):
    """The size in the header is for codes that are all alike; random ones take more."""
    q = np.zeros((32, 256), np.int8)
    payload = codec.encode(EQ8, q, np.float16([1])).payload.copy()
    body, size = payload[80:96].view(np.uint64).astype(int)
    payload[body : body + size] = rng.integers(0, 256, size)
    assert codec.Payload(EQ8, payload, q.shape).codes().any()
    with pytest.raises(FormatError, match="device layout"):
        codec.Payload(EQ8, payload, q.shape).to_lanes()


def test_arguments_are_checked():
    good = np.zeros((4, 32), np.int8)
    one = np.float16([1])
    with pytest.raises(codec.CodecError, match="shape"):
        codec.encode(EQ8, np.zeros((4, 33), np.int8), one)
    with pytest.raises(codec.CodecError, match="range"):
        codec.encode(EQ4, good + 8, one)
    with pytest.raises(codec.CodecError, match="float16"):
        codec.encode(EQ8, good, np.float32([1]))
    with pytest.raises(codec.CodecError, match="scale"):
        codec.encode(EQ8, good, np.float16([np.inf]))
    with pytest.raises(codec.CodecError, match="scales have shape"):
        codec.encode(EQ8, good, np.ones(3, np.float16))
    with pytest.raises(codec.CodecError, match="scale"):
        codec.encode(EQ4, good, one, np.float32([1.0001]))  # its minimum is no f16
    with pytest.raises(codec.CodecError, match="int8"):
        codec.encode(EQ8, good.astype(np.int16), one)
    for width in (0, 31, 48, 2048):
        with pytest.raises(codec.CodecError, match="tile_cols"):
            codec.encode(EQ8, good, one, tile_cols=width)


def test_wrong_type_and_shape_are_refused(rng):
    q = random_codes(rng, EQ8, (33, 64))
    payload = codec.encode(EQ8, q, np.float16([1])).payload
    for kind, shape, message in (
        (EQ4, (33, 64), "another type"),
        (EQ8, (32, 64), "another shape"),
        (EQ8, (33, 96), "another shape"),
        (EQ8, (1, 33, 64), ""),  # the same matrix
    ):
        if message:
            with pytest.raises(FormatError, match=message):
                codec.Payload(kind, payload, shape).codes()
        else:
            assert np.array_equal(codec.Payload(kind, payload, shape).codes()[0], q)


def test_truncation_at_every_byte_is_refused(rng):
    q = random_codes(rng, EQ8, (3, 32))
    payload = codec.encode(EQ8, q, np.float16([1])).payload
    for n in range(payload.size):
        with pytest.raises(FormatError):
            codec.Payload(EQ8, payload[:n], q.shape)


@pytest.mark.parametrize("kind", [EQ8, EQ4])
def test_every_flipped_byte_is_reported_by_verify(rng, kind):
    q = random_codes(rng, kind, (35, 64))
    payload = codec.encode(kind, q, np.float16([1]), name=NAME).payload
    survivors = 0
    for i in range(payload.size):
        damaged = payload.copy()
        damaged[i] ^= 1 << (i % 8)
        with pytest.raises(FormatError):
            codec.Payload(kind, damaged, q.shape, NAME).verify()
        try:  # what a loader does: refuse, or decode to something, in bounds
            codec.Payload(kind, damaged, q.shape).codes()
            survivors += 1
        except FormatError:
            pass
    assert survivors > 0  # body, hash and slack are not validated at load


def test_unaligned_memory_is_copied(rng):
    q = random_codes(rng, EQ8, (3, 32))
    payload = codec.encode(EQ8, q, np.float16([1])).payload
    shifted = np.zeros(payload.size + 1, np.uint8)
    shifted[1:] = payload
    assert np.array_equal(codec.Payload(EQ8, shifted[1:], q.shape).codes(), q)
