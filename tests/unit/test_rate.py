# SPDX-License-Identifier: MIT
"""Steps chosen by rate: against theory for Gaussian weights, and profiles' promises against what
the coder takes."""

from __future__ import annotations

import functools
import math
import re

import numpy as np
import pytest

from entrollm_gguf import codec
from entrollm_gguf.codec import EntropyType
from entrollm_gguf.convert import budget, pipeline
from entrollm_gguf.convert.encode import TensorRecord
from entrollm_gguf.errors import ConversionError
from entrollm_gguf.quant import NotFiniteError, QuantizeError, profile, quantize_step

EQ8 = EntropyType.EQ8


def gaussian(rng, n_rows=512, n_cols=1024):
    """Rows of very different size, as far as scales allow."""
    return (rng.normal(0, 1, (n_rows, n_cols)) * rng.uniform(0.01, 3, (n_rows, 1))).astype(np.float32)


def relative_error(weights, quantized):
    """Mean over rows of error over energy."""
    back = quantized.codes * quantized.scales.reshape(-1, 1).astype(np.float64)
    return float((((back - weights) ** 2).sum(axis=1) / (weights.astype(np.float64) ** 2).sum(axis=1)).mean())


@pytest.mark.parametrize("step", [0.05, 0.1, 0.2, 0.4, 0.8])
def test_gaussian_rows_against_the_bound(rng, step):
    """A uniform quantizer with an ideal entropy coder is 0.25 bit from the rate-distortion bound at
    high rates, and less below (Gish and Pierce). Huffman's loss and the container come on top."""
    weights = gaussian(rng)
    quantized = quantize_step(weights, EQ8, step=step)
    error = relative_error(weights, quantized)
    bound = 0.5 * math.log2(1 / error)  # bits that any code of this error needs
    encoded = codec.encode(EQ8, quantized.codes, quantized.scales)
    entropy = encoded.entropy_bits / weights.size
    assert bound < entropy < bound + 0.26
    assert encoded.coded_bits / weights.size < bound + 0.26 + 0.11
    assert error <= step**2 / 12 * 1.01  # the error of a uniform grid
    assert encoded.payload.size * 8 / weights.size < encoded.coded_bits / weights.size + 0.1


def test_scales_fit_the_codes(rng):
    """At low rates intervals are wide and weights gather at their inner ends: the least-squares
    scale loses less than the step itself."""
    weights = gaussian(rng, 64, 4096)
    step = 1.5
    quantized = quantize_step(weights, EQ8, step=step)
    rms = np.sqrt((weights.astype(np.float64) ** 2).mean(axis=1))
    plain = quantized.codes * (step * rms)[:, None]
    plain_error = (((plain - weights) ** 2).sum(axis=1) / (weights.astype(np.float64) ** 2).sum(axis=1)).mean()
    assert relative_error(weights, quantized) < 0.99 * plain_error


def test_rows_of_zeros_and_outliers(rng):
    weights = gaussian(rng, 64, 128)
    weights[3] = 0
    weights[5, 7] = 1e4
    quantized = quantize_step(weights, EQ8, step=0.05)
    assert (quantized.codes[3] == 0).all() and quantized.scales[0, 3] == 0
    assert quantized.codes[5, 7] == 127 and abs(float(quantized.scales[0, 5]) * 127 - 1e4) < 20
    with pytest.raises(NotFiniteError):
        quantize_step(np.array([[np.nan] * 32] * 2, np.float32), EQ8, step=0.1)
    with pytest.raises(NotFiniteError):
        profile(np.array([[np.inf] * 32] * 2, np.float32))


@pytest.mark.parametrize("factor, refused", [(1, False), (1e-4, False), (1e-7, True), (4e3, False), (1e5, True)])
def test_what_is_refused_does_not_hang_on_the_step(rng, factor, refused):
    """This lets the survey know which matrices stay in a stock type before a step is chosen."""
    weights = (rng.normal(0, 1, (64, 128)) * factor).astype(np.float32)
    calls = [functools.partial(quantize_step, weights, EQ8, step=step) for step in (0.001, 0.02, 0.5, 6)] + [
        functools.partial(profile, weights)
    ]
    for call in calls:
        if refused:
            with pytest.raises(QuantizeError, match="f16"):
                call()
        else:
            call()


@pytest.mark.parametrize("tails", [False, True])
@pytest.mark.parametrize("step", [0.05, 0.1, 0.25, 0.6, 1.5])
def test_profiles_foresee_the_size(rng, tails, step):
    weights = gaussian(rng, 700, 1500 // 32 * 32)
    if tails:  # a few rows with weights of 10 to 100 times their size
        weights[::7, ::97] *= rng.uniform(10, 100, weights[::7, ::97].shape)
    quantized = quantize_step(weights, EQ8, step=step)
    encoded = codec.encode(EQ8, quantized.codes, quantized.scales)
    one = profile(weights)
    assert one.n_weights == weights.size
    assert one.coded_bits(step) == pytest.approx(encoded.coded_bits, rel=0.004)
    assert one.n_bytes(step) == pytest.approx(encoded.payload.size, rel=0.004)
    assert one.entropy_bits(step) == pytest.approx(encoded.entropy_bits, rel=0.004)


def test_rows_too_small_for_a_scale_with_many_digits(rng):
    """Below 6e-5 f16 loses digits: the step is then a number that it holds."""
    sizes = np.concatenate([np.full(250, 1e-3), [1e-4, 1e-5, 1e-6, 1e-7, 3e-8, 1e-12]])  # a few that nobody uses
    weights = (rng.normal(0, 1, (256, 512)) * sizes[:, None]).astype(np.float32)
    for hessian in (None, lambda slab: np.eye(512, dtype=np.float32)):
        quantized = quantize_step(weights, EQ8, step=0.02, hessian=hessian)
        assert quantized.n_coarse == 4
        back = quantized.codes * quantized.scales.reshape(-1, 1).astype(np.float64)
        error = np.sqrt(((back - weights) ** 2).mean(axis=1))
        # a step, or the next multiple of 2^-24, over sqrt(12)
        widths = np.where(0.04 * sizes < 2.0**-14, np.ceil(0.04 * sizes * 2**24) * 2.0**-24, 0.04 * sizes)
        assert (error <= widths / math.sqrt(12) * 1.1).all()


def test_factors_are_bounded(rng):
    shape = (1, 512)
    some = {name: budget.Sensitivity(factor, np.ones(shape, np.float32)) for name, factor in (("a", 1e-9), ("b", 1.0), ("c", 1e9))}
    one = profile(gaussian(rng))
    survey = budget.Survey({name: one for name in some}, {}, 0, some)
    assert [survey.factor(name) for name in ("a", "b", "c", "no statistics")] == [1 / 8, 1, 8, 1]
    # values that four heads share
    for heads, factor in (((8, 2), 0.5), ((8, 8), 1), (None, 1)):
        survey = budget.Survey({}, {}, 0, {}, heads)
        assert survey.factor("blk.3.attn_v.weight") == factor and survey.factor("blk.3.attn_q.weight") == 1


def test_a_stack_of_matrices(rng):
    weights = gaussian(rng, 96, 256).reshape(3, 32, 256)
    quantized = quantize_step(weights, EQ8, step=0.2)
    assert quantized.scales.shape == (3, 32)
    encoded = codec.encode(EQ8, quantized.codes, quantized.scales)
    assert profile(weights).n_bytes(0.2) == pytest.approx(encoded.payload.size, rel=0.03)


def kept(name="norm", n_bytes=4096, shape=(1024,)):
    """A tensor that stays in a stock type, as `Survey` has it."""
    return {name: TensorRecord(name, "F32", shape, n_bytes, "as llama.cpp writes it")}


def test_budgets(rng):
    survey = budget.Survey({"a": profile(gaussian(rng)), "b": profile(gaussian(rng, 96, 512))}, kept(), 10_000)
    assert survey.n_weights == 512 * 1024 + 96 * 512 + 1024
    for bits in (2.5, 4.25, 6.0):
        target = budget.find_target(survey, bits=bits)
        assert target.n_bytes == int(survey.n_weights * bits / 8)
        step = budget.step_for(survey, target)
        assert 0.995 * target.n_bytes < survey.tensor_bytes(step) <= target.n_bytes
    assert budget.find_target(survey, size=300_000).n_bytes == 290_000
    # a bit more per weight is half the step, about
    one, two = (budget.step_for(survey, budget.find_target(survey, bits=bits)) for bits in (4, 5))
    assert one / two == pytest.approx(2, rel=0.05)


def test_promises_that_cannot_be_kept_tell_the_least(rng):
    survey = budget.Survey({"a": profile(gaussian(rng))}, kept(), 10_000)
    with pytest.raises(ConversionError, match=r"the least is .* 4096 of them") as caught:
        budget.find_target(survey, size=14_000)
    least = int(re.search(r"a file of (\d+) bytes", str(caught.value))[1])
    assert budget.find_target(survey, size=least).n_bytes == least - 10_000
    with pytest.raises(ConversionError, match="the least"):
        budget.find_target(survey, size=least - 1)
    with pytest.raises(ConversionError, match="the least"):
        budget.find_target(survey, bits=1)


def test_a_recipe_counts_what_is_coded(rng):
    """However much the other tensors take, the steps of the coded matrices are the same."""
    one = profile(gaussian(rng))
    steps = set()
    for others in ({}, kept(), kept("per_layer_token_embd.weight", 10_000_000, (1250, 1000))):
        survey = budget.Survey({"a": one}, others, 10_000)
        target = budget.find_target(survey, rate=4.5)
        assert target.coded_bytes == int(4.5 * one.n_weights / 8) and not target.promised
        steps.add(budget.step_for(survey, target))
    assert len(steps) == 1 and one.n_bytes(steps.pop()) * 8 / one.n_weights == pytest.approx(4.5, rel=0.005)
    nothing = budget.Survey({}, kept(), 10_000)
    assert budget.step_for(nothing, budget.find_target(nothing, rate=4.5)) == budget.FINEST


def test_a_recipe_spares_small_matrices(rng):
    """Their headers and scales take more bits than a recipe has; the codes make up for one bit of
    that and no more."""
    survey = budget.Survey({str(i): profile(gaussian(rng, 16, 64)) for i in range(3)}, {}, 0)
    target = budget.find_target(survey, rate=4.5)
    step = budget.step_for(survey, target)
    assert step == target.coarsest and survey.coded_bytes(step) > target.coded_bytes
    assert survey.entropy_bits(step) / survey.n_coded == pytest.approx(3.5, rel=0.01)


@pytest.mark.parametrize("share", [0.9999, 0.999, 0.99, 0.95])
def test_budgets_where_sizes_do_not_move(rng, share):
    """Rows whose largest weight is code 127 at any fine step: even a target a little below the
    largest possible size is met."""
    weights = gaussian(rng)
    weights[:, 0] = 8 * np.sqrt((weights**2).mean(axis=1))
    survey = budget.Survey({"a": profile(weights)}, {}, 0)
    largest = survey.tensor_bytes(budget.FINEST)
    assert survey.tensor_bytes(2 * budget.FINEST) == largest
    step = budget.step_for(survey, budget.Target(int(share * largest), 0))
    assert 0.98 * share * largest < survey.tensor_bytes(step) <= share * largest


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.8])
def test_budgets_where_codes_change(rng, share):
    """Like matrices change their code at nearly the same step, and their sizes jump by more than
    the percent that bits promises: targets in the gap are met all the same."""
    survey = budget.Survey({str(i): profile(rng.laplace(0, 1, (256, 1024)).astype(np.float32)) for i in range(16)}, {}, 0)
    steps = 0.2 * 1.001 ** np.arange(100)
    sizes = [survey.profiles["0"].n_bytes(step) for step in steps]
    at = int(np.argmin(np.diff(sizes)))
    assert sizes[at + 1] < 0.99 * sizes[at]
    target = int(16 * (share * sizes[at] + (1 - share) * sizes[at + 1]))
    assert 0.995 * target < survey.coded_bytes(budget.step_for(survey, budget.Target(target, 0))) <= target


@pytest.mark.parametrize("kind, bits", [("uniform", 4.02), ("uniform", 6.03), ("normal", 1.2), ("laplace", 1.15)])
def test_budgets_where_sizes_hardly_move(rng, kind, bits):
    """The entropy falls with the step and the size does not: the search must not creep up to it
    from one side. What is possible is seen on a fine grid of steps."""
    weights = {
        "uniform": lambda: rng.uniform(-1, 1, (256, 1024)),
        "normal": lambda: rng.normal(0, 1, (256, 1024)),
        "laplace": lambda: rng.laplace(0, 1, (256, 1024)),
    }[kind]().astype(np.float32)
    survey = budget.Survey({"a": profile(weights)}, {}, 0)
    limit = int(bits * weights.size / 8)
    sizes = [survey.coded_bytes(step) for step in 0.02 * 1.01 ** np.arange(570)]
    possible = max(size for size in sizes if size <= limit)
    assert 0.985 * possible < survey.coded_bytes(budget.step_for(survey, budget.Target(limit, 0))) <= limit


def test_corrections_close_in(rng):
    survey = budget.Survey({"a": profile(gaussian(rng))}, {}, 0)
    size, target = 100_000, budget.Target(100_000, 0)
    assert budget.corrected([(0.2, 102_000)], target, survey) > 0.2 > budget.corrected([(0.2, 90_000)], target, survey)
    between = budget.corrected([(0.2, 102_000), (0.25, 97_000), (0.3, 80_000)], target, survey)
    assert 0.2 < between < 0.25
    # targets are met even where sizes swing with the step, as those of Huffman codes of few symbols
    # do
    tried, step = [], 0.2
    for _ in range(6):
        found = int(size * (0.2 / step) ** 0.5 * (1.015 + 0.01 * math.sin(step * 300)))
        if 0.99 * size <= found <= size:
            return
        tried.append((step, found))
        step = budget.corrected(tried, target, survey)
    pytest.fail(f"no step in {tried}")


class FakeModel:
    """What `_encode_to_size` asks of an encoded model."""

    def __init__(self, n_bytes):
        self.n_bytes, self.closed = n_bytes, False

    def close(self):
        self.closed = True


@pytest.mark.parametrize(
    "sizes, taken",
    [
        ([1000], 1000),
        ([1010, 995], 995),
        ([900, 1010, 920, 1010, 910, 1010], 920),  # Huffman codes jump over the target: the best that fits
        ([950, 1010, 1010, 1010, 1010, 1010], 950),
    ],
)
def test_the_largest_that_fits_is_taken(rng, sizes, taken):
    survey = budget.Survey({"a": profile(gaussian(rng, 64, 128))}, {}, 0)
    made = []

    def encode(step):
        made.append(FakeModel(sizes[len(made)]))
        return made[-1]

    found = pipeline._encode_to_size(encode, survey, budget.Target(1000, 0), 0.2)
    assert found.n_bytes == taken and [one.n_bytes for one in made] == sizes[: len(made)]
    assert all(one.closed != (one is found) for one in made)


def test_what_never_fits_or_fails_leaves_nothing_behind(rng):
    survey = budget.Survey({"a": profile(gaussian(rng, 64, 128))}, {}, 0)
    made = []

    def encode(step):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(FakeModel(900 + len(made)))
        return made[-1]

    with pytest.raises(KeyboardInterrupt):
        pipeline._encode_to_size(encode, survey, budget.Target(1000, 0), 0.2)
    assert all(one.closed for one in made)
    # nothing is finer, so less than the target is accepted
    assert pipeline._encode_to_size(lambda step: FakeModel(500), survey, budget.Target(1000, 0), budget.FINEST).n_bytes == 500


def test_what_never_fits(rng):
    """A promised size ends in an error that names the least; a recipe takes what comes nearest."""
    survey = budget.Survey({"a": profile(gaussian(rng, 64, 128))}, {}, 10)
    sizes, made = [1003, 1001, 1002, 1004, 1005, 1006], []

    def encode(step):
        made.append(FakeModel(sizes[len(made)]))
        return made[-1]

    with pytest.raises(ConversionError, match="the least that came out is a file of 1011 bytes"):
        pipeline._encode_to_size(encode, survey, budget.Target(1000, 0), 0.2)
    assert len(made) == 6 and all(one.closed for one in made)
    made.clear()
    found = pipeline._encode_to_size(encode, survey, budget.Target(1000, 0, promised=False), 0.2)
    assert found.n_bytes == 1001 and [one for one in made if not one.closed] == [found]
    # nothing is coarser, so one try is enough
    made.clear()
    assert pipeline._encode_to_size(encode, survey, budget.Target(1000, 0, 0.5, promised=False), 0.5).n_bytes == 1003 and len(made) == 1


def test_sizes_that_move_in_steps_are_met_from_below():
    """After each result above the target, the next try aims lower."""
    survey = budget.Survey({"a": profile(np.ones((64, 128), np.float32))}, {}, 0)
    found = pipeline._encode_to_size(lambda step: FakeModel(5_000 if step < 0.22 else 4_800), survey, budget.Target(4_990, 0), 0.2)
    assert found.n_bytes == 4_800
