# SPDX-License-Identifier: MIT
"""Rounding with error feedback, against a plain version in f64 that shares no code with it."""

from __future__ import annotations

import numpy as np
import pytest

from entrollm_gguf import codec
from entrollm_gguf.codec import EntropyType
from entrollm_gguf.quant import quantize_step
from entrollm_gguf.quant.feedback import fitted_scales, round_with_feedback

TOP = 127


def correlated_inputs(rng, n_cols, n_tokens=4000, rank=None):
    """The mean of x x^T for correlated inputs, some of them much larger than others."""
    mix = rng.normal(0, 1, (rank or n_cols, n_cols)) * rng.lognormal(0, 1, n_cols) + np.eye(rank or n_cols, n_cols)
    x = rng.normal(0, 1, (n_tokens, mix.shape[0])) @ mix
    return (x.T @ x / n_tokens).astype(np.float32)


def cost(error, hessian):
    """e H e^T of each row."""
    return np.einsum("ij,jk,ik->i", error, hessian.astype(np.float64), error)


def damped(hessian):
    h = hessian.astype(np.float64)
    return h + 0.01 * np.diagonal(h).mean() * np.eye(len(h))


def plain_feedback(weights, steps, hessian):
    """Optimal Brain Quantizer, columns in order: round one, spread its error with the inverse
    Hessian of what is left, and take the column out of it."""
    w = weights.astype(np.float64)
    inverse = np.linalg.inv(damped(hessian))
    codes = np.zeros(w.shape)
    for j in range(w.shape[1]):
        codes[:, j] = np.clip(np.rint(w[:, j] / steps), -TOP, TOP)
        error = (w[:, j] - codes[:, j] * steps) / inverse[j, j]
        w[:, j:] -= error[:, None] * inverse[j, j:]
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes


@pytest.mark.parametrize("n_cols", [32, 64, 96, 160])
def test_equals_the_plain_version(rng, n_cols):
    weights, hessian = rng.standard_t(5, (40, n_cols)).astype(np.float32), correlated_inputs(rng, n_cols)
    steps = rng.uniform(0.1, 0.6, 40).astype(np.float32)
    codes, plain = round_with_feedback(weights, steps, hessian, TOP), plain_feedback(weights, steps, hessian)
    # a weight halfway between two codes may be rounded either way in f32, and with it what follows
    # in its row
    assert (codes == plain).all(axis=1).mean() > 0.9
    scale = steps[:, None].astype(np.float64)
    ours, theirs = (cost(weights - q * scale, damped(hessian)).sum() for q in (codes, plain))
    assert ours == pytest.approx(theirs, rel=0.01)


@pytest.mark.parametrize("step", [0.05, 0.3, 1.0, 2.0])
@pytest.mark.parametrize("seed", range(4))
def test_never_worse_than_rounding(step, seed):
    rng = np.random.default_rng(seed)
    n_cols = (64, 96, 128, 256)[seed]
    weights, hessian = rng.normal(0, 1, (64, n_cols)).astype(np.float32), correlated_inputs(rng, n_cols)
    steps = np.full(64, step, np.float32)
    feedback, nearest = round_with_feedback(weights, steps, hessian, TOP), np.clip(np.rint(weights / step), -TOP, TOP)
    with_feedback, without = (cost(weights - q * np.float64(step), damped(hessian)).sum() for q in (feedback, nearest))
    assert with_feedback <= without
    assert with_feedback < 0.7 * without  # inputs this strongly correlated must give more than a tie
    # with the scales that are stored instead of the step, it is smaller still
    scales = fitted_scales(weights, feedback, hessian)
    assert (
        cost(weights - feedback * scales[:, None], damped(hessian)) <= cost(weights - feedback * np.float64(step), damped(hessian)) + 1e-6
    ).all()


def test_inputs_that_do_not_go_together_round_to_nearest(rng):
    weights, hessian = rng.normal(0, 1, (33, 64)).astype(np.float32), np.diag(rng.uniform(0.1, 10, 64)).astype(np.float32)
    steps = np.full(33, 0.25, np.float32)
    assert np.array_equal(round_with_feedback(weights, steps, hessian, TOP), np.rint(weights / 0.25))


@pytest.mark.parametrize("rank, n_tokens", [(1, 1), (3, 5), (None, 2)])
def test_few_tokens(rng, rank, n_tokens):
    """Hessians of less than full rank, and one of zeros: nothing is divided by zero, codes stay in
    range."""
    weights = rng.normal(0, 1, (16, 64)).astype(np.float32)
    for hessian in (correlated_inputs(rng, 64, n_tokens, rank), np.zeros((64, 64), np.float32)):
        codes = round_with_feedback(weights, np.full(16, 0.2, np.float32), hessian, TOP)
        assert np.abs(codes).max() <= TOP and np.isfinite(fitted_scales(weights, codes, hessian)).all()


def test_as_a_quantizer(rng):
    """A stack, a row of zeros, row factors: scales and codes have their shapes, and the rate is
    that of rounding to nearest."""
    weights = rng.normal(0, 1, (2, 48, 96)).astype(np.float32)
    weights[1, 5] = 0
    hessians = [correlated_inputs(rng, 96), correlated_inputs(rng, 96)]
    factors = rng.uniform(0.5, 2, (2, 48)).astype(np.float32)
    result = quantize_step(weights, EntropyType.EQ8, step=0.2, row_factors=factors, hessian=hessians.__getitem__)
    assert result.codes.shape == weights.shape and result.scales.shape == (2, 48)
    assert result.scales[1, 5] == 0 and (result.codes[1, 5] == 0).all()
    assert result.scheme == "step-0.2000-rows-feedback"
    plain = quantize_step(weights, EntropyType.EQ8, step=0.2, row_factors=factors)
    sizes = [codec.encode(EntropyType.EQ8, one.codes, one.scales).coded_bits for one in (result, plain)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.03)
    # a wider row has fewer codes
    ratio = np.abs(result.codes[0].astype(int)).mean(axis=1) * factors[0]
    assert ratio.std() / ratio.mean() < 0.2


def test_a_slab_without_inputs_is_rounded_to_nearest(rng):
    """An expert that no token reached has a Hessian of zeros."""
    weights = rng.normal(0, 1, (2, 48, 96)).astype(np.float32)
    hessians = [correlated_inputs(rng, 96), np.zeros((96, 96), np.float32)]
    result, nearest = (quantize_step(weights, EntropyType.EQ8, step=0.2, hessian=one) for one in (hessians.__getitem__, None))
    assert np.array_equal(result.codes[1], nearest.codes[1]) and np.array_equal(result.scales[1], nearest.scales[1])
    assert not np.array_equal(result.codes[0], nearest.codes[0])
