# SPDX-License-Identifier: MIT
"""Quantizers: the published rules, literal values, bounds on the error, exactness of what is
stored."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from entrollm_gguf import codec
from entrollm_gguf.codec import EntropyType
from entrollm_gguf.gguf_io.patched import import_gguf
from entrollm_gguf.quant import QUANTIZERS, NotFiniteError, QuantizeError, quantize_mixed, quantize_paper, quantize_rows
from entrollm_gguf.quant.mixed import coded_bits
from entrollm_gguf.quant.uniform import quantize_asymmetric, quantize_symmetric

EQ8, EQ4 = EntropyType.EQ8, EntropyType.EQ4
LOSSY = sorted(set(QUANTIZERS) - {"lossless"})  # see test_ebf16.py for the other


def dequantize(q) -> np.ndarray:
    """Weights f64 of one matrix."""
    offset = 0.0 if q.offsets is None else q.offsets[0, :, None].astype(np.float64)
    return q.codes * q.scales[0, :, None].astype(np.float64) + offset


def test_asymmetric_literal():
    w = np.zeros((1, 32), np.float32)
    w[0, :4] = [-1.0, 0.0, 1.0, 2.0]
    q = quantize_paper(w, EQ4)
    # 1/s = (2 - -1) / 15 = 0.2, as f16 not below: 0.2000732; z = -1
    assert q.scheme == "asymmetric"
    assert q.scales[0, 0] == np.float16(0.2000732421875)
    assert q.codes[0, :5].tolist() == [0 - 8, 5 - 8, 10 - 8, 15 - 8, 5 - 8]
    assert q.offsets[0, 0] == np.float32(-1.0 + 8 * 0.2000732421875)


def test_sign_rule():
    rng = np.random.default_rng(0)
    positive = rng.uniform(0.1, 1.0, (4, 32)).astype(np.float32)
    for w, scheme in ((positive, "symmetric-unsigned"), (-positive, "symmetric-unsigned"), (positive - 0.5, "asymmetric")):
        assert quantize_paper(w, EQ8).scheme == scheme


@pytest.mark.parametrize("kind", [EQ8, EQ4])
@pytest.mark.parametrize("sign", [1, -1])
def test_symmetric_unsigned_literal(kind, sign):
    levels = 255 if kind is EQ8 else 15
    w = np.zeros((1, 32), np.float32)
    w[0, :3] = sign * np.float32([levels, 1, 2]) * np.float32(0.125)
    q = quantize_paper(w, kind)
    half = (levels + 1) // 2
    assert q.scales[0, 0] == np.float16(sign * 0.125)
    assert q.codes[0, :4].tolist() == [levels - half, 1 - half, 2 - half, -half]
    assert np.array_equal(dequantize(q), w)


@pytest.mark.parametrize("kind", [EQ8, EQ4])
def test_mixed_takes_the_smaller(rng, kind):
    for shift in (0.0, 0.3):
        w = (rng.standard_t(5, (64, 256)) * 0.05 + shift).astype(np.float32)
        low, high = float(w.min()), float(w.max())
        sizes = {g(w, kind, low, high).scheme: coded_bits(g(w, kind, low, high), kind) for g in (quantize_symmetric, quantize_asymmetric)}
        chosen = quantize_mixed(w, kind)
        assert coded_bits(chosen, kind) == min(sizes.values())
        assert chosen.scheme == min(sizes, key=sizes.get)


@pytest.mark.parametrize("name", LOSSY)
@settings(deadline=None, max_examples=40)
@given(
    kind=st.sampled_from([EQ8, EQ4]),
    w=arrays(np.float32, (3, 32), elements=st.floats(-1000, 1000, width=32)),
)
def test_error_is_at_most_half_a_step_and_the_file_holds_it(name, kind, w):
    try:
        q = QUANTIZERS[name](w, kind, 1)
    except QuantizeError:  # a range thousands of times smaller than the distance from zero, or a row too small for an f16 scale
        peaks = np.abs(w).max(axis=1)
        assert np.ptp(w) * 1000 < peaks.max() or peaks[peaks > 0].min() < 5e-5
        return
    step = np.abs(q.scales[0, :, None].astype(np.float64))
    # f32 arithmetic of offset and quotient adds a little to half a step, and a row of denormals
    # alone counts as zeros
    slack = 1e-5 * (np.abs(w).max() + step) + np.finfo(np.float32).tiny
    assert (np.abs(dequantize(q) - w) <= 0.5 * step + slack).all()
    payload = codec.encode(kind, q.codes, q.scales, q.offsets).payload
    codec.Payload(kind, payload, w.shape).verify()


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("kind", [EQ8, EQ4])
@pytest.mark.parametrize("value", [0.0, 0.75, -2.5])
def test_constant_tensors(name, kind, value):
    w = np.full((33, 64), value, np.float32)
    q = QUANTIZERS[name](w, kind, 1)
    assert np.allclose(dequantize(q), w, rtol=1e-3)
    codec.Payload(kind, codec.encode(kind, q.codes, q.scales, q.offsets).payload, w.shape).verify()


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite(name, bad):
    w = np.zeros((300, 4096), np.float32)
    w[-1, -1] = bad
    with pytest.raises(NotFiniteError):
        QUANTIZERS[name](w, EQ8, 2)


def test_too_large_for_f16():
    with pytest.raises(QuantizeError, match="too large"):
        quantize_paper(np.float32([[-3e38, 3e38] * 16]), EQ8)


@pytest.mark.parametrize("kind", [EQ8, EQ4])
@pytest.mark.parametrize("factor, shift", [(1e5, 0), (1e6, 0), (1, 70_000), (1, -70_000), (1, 500), (1e-6, 0), (1e-9, 0), (1e-6, 1)])
@pytest.mark.parametrize("name", LOSSY)
def test_what_is_not_refused_is_held_by_the_stock_type(rng, name, kind, factor, shift):
    """The decoded weights are finite, and off by at most twice the error of the grid's own
    steps."""
    w = (rng.uniform(-1, 1, (16, 64)) * factor + shift).astype(np.float32)
    extreme, levels = np.abs(w).max(), 255 if kind is EQ8 else 15
    try:
        q = QUANTIZERS[name](w, kind, 1)
    except QuantizeError:
        q = None
    # without an offset, a step is a fraction of the largest weight, which works wherever f16 scales
    # work
    assert q is not None or name == "paper" or extreme / (levels // 2) > 65504 or extreme < 1e-4
    if q is None:
        return
    type_name, rows = codec.Payload(kind, codec.encode(kind, q.codes, q.scales, q.offsets).payload, w.shape).plain()
    gguf = import_gguf()
    back = gguf.dequantize(rows, gguf.GGMLQuantizationType[type_name]).reshape(w.shape).astype(np.float64)
    promised = {"asymmetric": np.ptp(w) / levels, "symmetric-unsigned": extreme / levels}.get(q.scheme, 2 * extreme / (levels - 1))
    assert np.isfinite(back).all()
    assert np.square(back - w, dtype=np.float64).mean() <= 2.2 * promised**2 / 12


def test_rows_that_nobody_uses_do_not_count(rng):
    """Weights close to zero may be lost in a few rows, which are reported; in many rows they are a
    reason to refuse."""
    w = rng.normal(0, 0.02, (64, 64)).astype(np.float32)
    w[:2] *= 1e-12
    w[2] = 0
    assert quantize_rows(w, EQ8).n_coarse == 2
    w[:3] = 1e-12
    with pytest.raises(QuantizeError, match="too coarse for steps of"):
        quantize_rows(w, EQ8)


def test_f16_input_and_threads(rng):
    w = rng.normal(0, 0.02, (700, 1024)).astype(np.float16)
    one, many = quantize_paper(w, EQ8, 1), quantize_paper(w.astype(np.float32), EQ8, 4)
    assert np.array_equal(one.codes, many.codes) and one.scales == many.scales


@pytest.mark.parametrize("kind", [EQ8, EQ4])
def test_rows(rng, kind):
    top = 127 if kind is EQ8 else 7
    w = (rng.standard_normal((3, 40, 64)) * np.exp2(rng.integers(-6, 3, (3, 40, 1)))).astype(np.float32)
    w[1, 7] = 0
    w[0, 0, :3] = [-top * 0.25, top * 0.25, 0.25]
    w[0, 0, 3:] = 0
    q = quantize_rows(w, kind, threads=2)
    assert q.offsets is None and q.scales.shape == (3, 40)
    assert q.scales[0, 0] == 0.25 and q.codes[0, 0, :4].tolist() == [-top, top, 1, 0]
    assert q.scales[1, 7] == 0 and not q.codes[1, 7].any()
    steps = q.scales.astype(np.float64)[:, :, None]
    assert (np.abs(q.codes * steps - w) <= steps * 0.5001).all()
    assert np.array_equal(np.abs(q.codes).max(axis=2), np.where(w.any(axis=2), top, 0))
