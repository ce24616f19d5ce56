# SPDX-License-Identifier: MIT
"""EBF16 (docs/format.md 5.8): bf16 weights come back bit by bit, from the codec and from the
reference decoder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from reference import decoder, encoder
from vectors import make

from entrollm_gguf import codec
from entrollm_gguf.codec import CodecError, EntropyType
from entrollm_gguf.convert.encode import encode_tensor
from entrollm_gguf.errors import FormatError
from entrollm_gguf.quant import NotFiniteError, QuantizeError, quantize_lossless

FOLDER = Path(__file__).parents[1] / "vectors"
INDEX = json.loads((FOLDER / "ebf16.json").read_text())
EBF16 = EntropyType.EBF16


def as_bf16(weights: np.ndarray) -> np.ndarray:
    """The nearest bf16 towards zero, as f32."""
    return (weights.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)


def encode(bits: np.ndarray, name: str = "w") -> np.ndarray:
    codes, rests = make.split_bf16(bits)
    return codec.encode(EBF16, codes, np.zeros(1, np.float16), rests=rests, name=name).payload


def reference_bits(payload: np.ndarray, shape: tuple[int, ...], name: str) -> np.ndarray:
    n_slabs, n_rows, n_cols = (1, *shape)[-3:]
    slabs = decoder.parse_tensor(payload.tobytes(), 3, (n_cols, n_rows, n_slabs, 1))
    for i, slab in enumerate(slabs):
        decoder.verify(slab, name, i)
    return np.stack([decoder.decode_bf16(slab) for slab in slabs]).reshape(shape)


def check(payload: np.ndarray, bits: np.ndarray, name: str) -> None:
    codec.Payload(EBF16, payload, bits.shape, name).verify()
    assert np.array_equal(reference_bits(payload, bits.shape, name), bits)
    type_name, rows = codec.Payload(EBF16, payload, bits.shape).plain()
    assert type_name == "BF16"
    assert np.array_equal(rows.view("<u2"), bits)
    one = codec.Payload(EBF16, payload, bits.shape, name)
    assert np.array_equal(one.rests(), make.split_bf16(bits)[1])


@pytest.mark.parametrize("entry", INDEX, ids=lambda entry: entry["name"])
def test_vectors(entry):
    name, shape = entry["name"], tuple(entry["shape"])
    payload = np.fromfile(FOLDER / f"{name}.payload", np.uint8)
    bits = np.fromfile(FOLDER / f"{name}.bf16", "<u2").reshape(shape)
    assert hashlib.sha256(payload).hexdigest() == entry["sha256"]
    check(payload, bits, name)
    assert np.array_equal(encode(bits, name), payload)


def test_the_reference_encoder_s_bytes(rng):
    """The same code gives the same slab."""
    bits = (as_bf16(rng.normal(0, 0.02, (37, 96))).view(np.uint32) >> 16).astype(np.uint16)
    codes, rests = make.split_bf16(bits)
    payload = encode(bits)
    slab = decoder.parse_slab(payload.tobytes(), 3, 96, 37, 1)
    twin = encoder.encode_slab(codes, 3, np.zeros(1, np.float16), rests=rests, name="w", code=slab.code, tile_cols=slab.tile_cols)
    assert twin == payload.tobytes()


@pytest.mark.parametrize("shape", [(1, 32), (16, 64), (17, 512), (3, 5, 96)])
def test_any_bits_come_back(shape, rng):
    """Infinities, NaNs with any payload, subnormal numbers and negative zeros too."""
    bits = rng.integers(0, 1 << 16, shape).astype(np.uint16)
    check(encode(bits), bits, "w")


def test_trained_weights_take_eleven_bits(rng):
    """Rows of Gaussian weights of different size, as models have them."""
    weights = as_bf16(rng.normal(0, 0.02, (512, 1024)) * rng.lognormal(0, 0.3, (512, 1)))
    quantized = quantize_lossless(weights, EBF16)
    encoded = codec.encode(EBF16, quantized.codes, quantized.scales, rests=quantized.rests)
    assert 10.5 < encoded.payload.nbytes * 8 / weights.size < 11.1
    _, rows = codec.Payload(EBF16, encoded.payload, weights.shape).plain()
    assert np.array_equal((rows.view("<u2").astype(np.uint32) << 16).view(np.float32), weights)


def test_random_bodies_decode_alike(rng):
    bits = (as_bf16(rng.normal(0, 0.02, (33, 96))).view(np.uint32) >> 16).astype(np.uint16)
    whole = encode(bits).tobytes()
    for _ in range(8):
        payload = encoder.scramble(whole, rng)
        slab = decoder.parse_slab(payload, 3, 96, 33, 1)
        rows = codec.Payload(EBF16, np.frombuffer(payload, np.uint8), bits.shape).plain()[1]
        assert rows.tobytes() == decoder.decode_plain(slab)[1]


def test_what_is_no_bf16_is_refused(rng):
    weights = as_bf16(rng.normal(0, 1, (4, 32)))
    weights[3, 31] = 1 + 2.0**-9
    with pytest.raises(QuantizeError, match="no bf16 numbers"):
        quantize_lossless(weights, EBF16)
    for bad in (np.nan, np.inf):
        weights[3, 31] = bad
        with pytest.raises(NotFiniteError):
            quantize_lossless(weights, EBF16)


def test_f16_weights_that_are_bf16_numbers(rng):
    weights = np.float16(rng.integers(-8, 8, (2, 32)) / 8)
    quantized = quantize_lossless(weights, EBF16)
    payload = codec.encode(EBF16, quantized.codes, quantized.scales, rests=quantized.rests).payload
    rows = codec.Payload(EBF16, payload, weights.shape).plain()[1]
    assert np.array_equal((rows.view("<u2").astype(np.uint32) << 16).view(np.float32), weights)


def test_it_adds_no_error(rng):
    """Where weights were quantized before and happen to be bf16 numbers."""
    weights = as_bf16(rng.normal(0, 1, (16, 32)))
    _, record = encode_tensor("w", weights, EBF16, quantize_lossless, measure=True)
    assert record.type_name == "EBF16" and record.added_error == 0


def test_what_there_is_not(rng):
    """Rests belong to EBF16 alone, and it has no device layout."""
    codes, rests = make.split_bf16(rng.integers(0, 1 << 16, (2, 32)).astype(np.uint16))
    zero = np.zeros(1, np.float16)
    for kind, one in ((EBF16, None), (EntropyType.EQ8, rests), (EBF16, rests[:1]), (EBF16, codes)):
        with pytest.raises(CodecError, match="rests"):
            codec.encode(kind, codes, zero, rests=one)
    with pytest.raises(CodecError, match="scale or offset"):
        codec.encode(EBF16, codes, np.ones(1, np.float16), rests=rests)
    payload = codec.encode(EBF16, codes, zero, rests=rests).payload
    with pytest.raises(CodecError, match="no device layout"):
        codec.Payload(EBF16, payload, codes.shape).to_lanes()
    with pytest.raises(FormatError, match="another type"):
        codec.Payload(EntropyType.EQ8, payload, codes.shape)
    assert codec.Payload(EntropyType.EQ8, codec.encode(EntropyType.EQ8, codes, zero).payload, codes.shape).rests() is None
