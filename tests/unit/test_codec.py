# SPDX-License-Identifier: MIT
"""The C codec against the reference decoder and encoder, which were written from docs/format.md alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import decoder as ref_decoder
from reference import encoder as ref_encoder

from entrollm_gguf import codec
from entrollm_gguf.codec import EntropyType
from entrollm_gguf.errors import FormatError

EQ8, EQ4 = EntropyType.EQ8, EntropyType.EQ4
KINDS = {EQ8: 1, EQ4: 2}  # ggml type -> kind byte of the header

SHAPES = [(1, 32), (1, 64), (31, 32), (32, 64), (33, 576), (64, 96), (65, 1056), (7, 4096)]


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


@pytest.mark.parametrize("kind", [EQ8, EQ4])
@pytest.mark.parametrize("shape", SHAPES)
def test_reference_decodes_what_c_encodes(rng, kind, shape):
    q = random_codes(rng, kind, shape)
    scales, _ = random_grid(rng, kind, shape[0], 1, 0)
    encoded = codec.encode(kind, q, scales)
    slab = ref_decoder.parse_slab(encoded.payload.tobytes(), KINDS[kind], shape[1], shape[0], 1)
    ref_decoder.verify(slab)
    assert np.array_equal(ref_decoder.decode_codes(slab), q)
    assert np.array_equal(codec.decode(kind, encoded.payload, shape), q)
    codec.verify(kind, encoded.payload, shape)


@pytest.mark.parametrize("kind", [EQ8, EQ4])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tile_cols", [32, 512])
def test_c_decodes_what_the_reference_encodes(rng, kind, shape, tile_cols):
    q = random_codes(rng, kind, shape)
    scales, _ = random_grid(rng, kind, shape[0], 0, 0)
    payload = np.frombuffer(ref_encoder.encode_slab(q, KINDS[kind], scales, None, tile_cols), np.uint8)
    codec.verify(kind, payload, shape)
    assert np.array_equal(codec.decode(kind, payload, shape), q)


@pytest.mark.parametrize("kind", [EQ8, EQ4])
@pytest.mark.parametrize("scale_mode", [0, 1])
@pytest.mark.parametrize("offset_mode", [0, 1, 2])
def test_plain_rows_are_the_reference_s(rng, kind, scale_mode, offset_mode):
    shape = (45, 192)
    q = random_codes(rng, kind, shape)
    scales, offsets = random_grid(rng, kind, shape[0], scale_mode, offset_mode)
    encoded = codec.encode(kind, q, scales, offsets, tile_cols=128)
    slab = ref_decoder.parse_slab(encoded.payload.tobytes(), KINDS[kind], shape[1], shape[0], 1)
    name, rows = codec.decode_plain(kind, encoded.payload, shape)
    ref_name, ref_rows = ref_decoder.decode_plain(slab)
    assert name == ref_name
    assert rows.tobytes() == ref_rows
    got_scales, got_offsets = codec.scales_and_offsets(kind, encoded.payload, shape)
    assert np.array_equal(got_scales[0], scales)
    assert (offsets is None and got_offsets is None) or np.array_equal(got_offsets[0], offsets)


@pytest.mark.parametrize("symbol", [-128, -1, 0, 127])
def test_one_symbol(symbol):
    q = np.full((40, 96), symbol, np.int8)
    encoded = codec.encode(EQ8, q, np.float16([1]))
    assert encoded.coded_bits == q.size  # one bit a code
    assert np.array_equal(codec.decode(EQ8, encoded.payload, q.shape), q)
    slab = ref_decoder.parse_slab(encoded.payload.tobytes(), 1, 96, 40, 1)
    assert np.array_equal(ref_decoder.decode_codes(slab), q)


def test_rare_symbols_use_the_escape(rng):
    # one value nearly always, every other value once: more symbols than short prefixes
    q = np.zeros((64, 1024), np.int8)
    q.reshape(-1)[rng.choice(q.size, 255, replace=False)] = np.delete(np.arange(-128, 128), 128)
    encoded = codec.encode(EQ8, q, np.float16([1]))
    lengths = codec.plan_code(codec.count_symbols(EQ8, q)).lengths
    assert lengths[128] == 1 and lengths.max() >= 9
    slab = ref_decoder.parse_slab(encoded.payload.tobytes(), 1, 1024, 64, 1)
    assert np.array_equal(ref_decoder.decode_codes(slab), q)


def test_uniform_codes_take_eight_bits(rng):
    q = rng.permutation(np.tile(np.arange(-128, 128), 256)).reshape(64, 1024).astype(np.int8)
    encoded = codec.encode(EQ8, q, np.float16([1]))
    assert encoded.coded_bits == 8 * q.size


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_threads_give_the_same_bytes(rng, threads):
    q = random_codes(rng, EQ8, (333, 512))
    one = codec.encode(EQ8, q, np.float16([0.01]), threads=1)
    assert np.array_equal(codec.encode(EQ8, q, np.float16([0.01]), threads=threads).payload, one.payload)
    assert np.array_equal(codec.decode(EQ8, one.payload, q.shape, threads=threads), q)


def test_long_lanes_take_smaller_tiles(rng):
    # rare values everywhere in one row: 1024 codes of 9 and more bits exceed 255 words
    q = np.zeros((640, 1024), np.int8)
    q[5] = rng.integers(-128, 127, 1024)
    encoded = codec.encode(EQ8, q, np.float16([1]), tile_cols=1024)
    assert encoded.tile_cols < 1024
    assert np.array_equal(codec.decode(EQ8, encoded.payload, q.shape), q)


@pytest.mark.parametrize("kind", [EQ8, EQ4])
def test_experts_are_slabs_of_equal_size(rng, kind):
    # very different distributions: the slabs would differ in size
    q = np.stack([random_codes(rng, kind, (40, 160), spread) for spread in (0.01, 0.1, 0.5)])
    scales = rng.uniform(0.001, 0.1, (3, 40)).astype(np.float16)
    encoded = codec.encode(kind, q, scales)
    assert encoded.payload.size % (3 * 256) == 0
    slabs = ref_decoder.parse_tensor(encoded.payload.tobytes(), KINDS[kind], (160, 40, 3, 1))
    assert np.array_equal(np.stack([ref_decoder.decode_codes(slab) for slab in slabs]), q)
    assert np.array_equal(codec.decode(kind, encoded.payload, q.shape), q)
    codec.verify(kind, encoded.payload, q.shape)
    _, rows = codec.decode_plain(kind, encoded.payload, q.shape)
    assert rows.tobytes() == b"".join(ref_decoder.decode_plain(slab)[1] for slab in slabs)


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
    encoded = codec.encode(kind, q, np.float16([0.5]), tile_cols=32 * tile_blocks)
    assert np.array_equal(codec.decode(kind, encoded.payload, shape), q)
    codec.verify(kind, encoded.payload, shape)
    header = codec.read_header(kind, encoded.payload, shape)
    assert header.n_bytes == encoded.payload.size


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
                codec.decode(kind, payload, shape)
        else:
            assert np.array_equal(codec.decode(kind, payload, shape)[0], q)


def test_truncation_at_every_byte_is_refused(rng):
    q = random_codes(rng, EQ8, (3, 32))
    payload = codec.encode(EQ8, q, np.float16([1])).payload
    for n in range(payload.size):
        with pytest.raises(FormatError):
            codec.validate(EQ8, payload[:n], q.shape)


@pytest.mark.parametrize("kind", [EQ8, EQ4])
def test_every_flipped_byte_is_reported_by_verify(rng, kind):
    q = random_codes(rng, kind, (35, 64))
    payload = codec.encode(kind, q, np.float16([1])).payload
    survivors = 0
    for i in range(payload.size):
        damaged = payload.copy()
        damaged[i] ^= 1 << (i % 8)
        with pytest.raises(FormatError):
            codec.verify(kind, damaged, q.shape)
        try:  # what a loader does: refuse, or decode to something, in bounds
            codec.decode(kind, damaged, q.shape)
            survivors += 1
        except FormatError:
            pass
    assert survivors > 0  # bitstream, hash and slack are not validated at load


def test_any_bitstream_decodes_in_bounds_as_the_reference_says(rng):
    q = random_codes(rng, EQ8, (33, 96))
    payload = codec.encode(EQ8, q, np.float16([1])).payload
    for _ in range(20):
        damaged = payload.copy()
        start = int(np.frombuffer(payload[96:104].tobytes(), "<u8")[0])
        words = int(np.frombuffer(payload[104:112].tobytes(), "<u8")[0])
        damaged[start : start + 4 * words] = rng.integers(0, 256, 4 * words)
        slab = ref_decoder.parse_slab(damaged.tobytes(), 1, 96, 33, 1)
        assert np.array_equal(codec.decode(EQ8, damaged, q.shape), ref_decoder.decode_codes(slab))


def test_unaligned_memory_is_copied(rng):
    q = random_codes(rng, EQ8, (3, 32))
    payload = codec.encode(EQ8, q, np.float16([1])).payload
    shifted = np.zeros(payload.size + 1, np.uint8)
    shifted[1:] = payload
    assert np.array_equal(codec.decode(EQ8, shifted[1:], q.shape), q)
