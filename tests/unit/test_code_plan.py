# SPDX-License-Identifier: MIT
"""The plan of a code: it is the best of its family (docs/format.md 7), close to the entropy, and
describes itself correctly."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.decoder import TAIL_SHAPES
from reference.decoder import Code as RefCode

from entrollm_gguf import codec

HEADER = Path(__file__).parents[2] / "patches" / "llama.cpp" / "overlay" / "ggml" / "src" / "ggml-entropy.h"
PLANE_COST, TAIL_COST, FAR_COST = (
    float(re.search(rf"#define GGML_ENTROPY_{name}_COST\s+([\d.]+)", HEADER.read_text())[1]) for name in ("PLANE", "TAIL", "FAR")
)


def gaussian_counts(sigma: float, total: float = 1e7) -> np.ndarray:
    u = np.arange(256)
    return np.rint(total * np.exp(-0.5 * ((u - 128) / sigma) ** 2) / (sigma * 2.5066)).astype(np.uint64)


def class_lengths(digits: tuple[int, ...]) -> list[int]:
    """5.2: bits of the tail that names each class."""
    return [sum(digits[: i + 1]) for i, w in enumerate(digits) for _ in range((1 << w) - 1)]


def code_lengths(code: RefCode) -> np.ndarray:
    """Bits of each code q + 128: directly, else by the first class that holds it, else far (7)."""
    q = np.arange(256) - 128
    lengths = np.full(256, code.raw_bits + code.n_planes + 8)
    for base, n_bits in reversed(list(zip(code.class_base, class_lengths(code.digits)))):
        lengths[(q - base) % 256 < 1 << code.bin_bits] = code.raw_bits + n_bits
    lengths[(q - code.base) % 256 < code.n_direct] = code.raw_bits
    return lengths


def cost_of(n_bits, n_far, raw_bits: int, n_planes: int, n_weights: int):
    """What a code is judged by: its bits, and a decoder's time for planes, tails and far weights
    (numbers or arrays)."""
    n_tail_bits = n_bits - raw_bits * n_weights - 8 * n_far
    return n_bits + PLANE_COST * n_planes * n_weights + TAIL_COST * n_tail_bits + FAR_COST * n_far


def cost_of_plan(plan: codec.CodePlan, n_weights: int) -> float:
    return cost_of(plan.n_bits, plan.n_far, plan.code.raw_bits, plan.code.n_planes, n_weights)


def least_cost(counts: np.ndarray) -> float:
    """Of all codes of the family: every B, k and tail shape, bases among the codes that occur, and
    every number of bins above and below. Nothing wraps around."""
    total, margin = int(counts.sum()), 1024
    first, last = np.flatnonzero(counts)[[0, -1]]
    # [margin + u]: of the codes below u = q + 128
    sums = np.concatenate([np.zeros(margin + 1, int), np.cumsum(counts.astype(int)), np.full(margin, total)])

    best = 8.0 * total
    for digits in TAIL_SHAPES.values():
        lengths = np.array(class_lengths(digits))
        n_classes, n_planes = len(lengths), sum(digits)
        for raw_bits in range(1, 8) if digits else []:
            for bin_bits in range(raw_bits):
                size, n_direct = 1 << bin_bits, (1 << raw_bits) - (1 << bin_bits)
                lowest = max(0, min(first, 256 - n_direct))
                base = margin + np.arange(lowest, max(lowest, min(last - n_direct + 1, 256 - n_direct)) + 1)

                def count(start: int, width: int) -> np.ndarray:
                    """How many weights lie in the `width` codes from base + start on, for every
                    base."""
                    return sums[base + start + width] - sums[base + start]

                direct = count(0, n_direct)
                for n_above in range(1, n_classes + 1):
                    above = [count(n_direct + i * size, size) for i in range(n_above)]
                    below = [count(-(i + 1) * size, size) for i in range(n_classes - n_above)]
                    others = np.sort(np.stack(above[1:] + below), axis=0)[::-1]  # codes that occur more often are shorter
                    bins = np.concatenate([above[:1], others])
                    far = total - direct - bins.sum(axis=0)
                    n_bits = raw_bits * total + lengths @ bins + far * (n_planes + 8)
                    best = min(best, float(cost_of(n_bits, far, raw_bits, n_planes, total).min()))
    return best


def check_plan(counts: np.ndarray) -> codec.CodePlan:
    """A plan's own promises: its lengths and its sums are those of its code."""
    plan = codec.plan_code(counts)
    code = RefCode(plan.code.raw_bits, plan.code.bin_bits, plan.code.tail, plan.code.base, plan.code.class_base)
    assert len(code.class_base) == code.n_classes
    lengths = code_lengths(code)
    assert np.array_equal(plan.lengths, lengths) and np.array_equal(plan.code.lengths(), lengths)
    used = counts.astype(object)
    assert plan.n_bits == (used * lengths).sum()
    assert plan.n_tail == used[lengths > code.raw_bits].sum()
    assert plan.n_far == (0 if code.raw_bits == 8 else used[lengths == code.raw_bits + code.n_planes + 8].sum())
    n_weights = int(counts.sum(dtype=object))
    assert plan.n_bits <= 9 * n_weights  # what a buffer may rely on
    assert cost_of_plan(plan, n_weights) <= 8 * n_weights * (1 + 1e-12)
    return plan


def check_best(counts: np.ndarray) -> None:
    """No code of the family costs less."""
    plan = check_plan(counts)
    assert cost_of_plan(plan, int(counts.sum())) <= least_cost(counts) * (1 + 1e-12)


# measured and rounded up: excess over the entropy
@pytest.mark.parametrize("sigma, most", [(1.0, 1.08), (2.0, 1.05), (4.0, 1.04), (9.0, 1.02), (20.0, 1.015), (60.0, 1.03)])
def test_close_to_the_entropy(sigma, most):
    counts = gaussian_counts(sigma)
    plan = check_plan(counts)
    assert codec.entropy_bits(counts) <= plan.n_bits <= most * codec.entropy_bits(counts)


@pytest.mark.parametrize("sigma", [0.3, 0.7, 1.0, 1.5, 3.0, 9.0, 20.0, 60.0, 1000.0])
@pytest.mark.parametrize("shift", [-128, -100, 0, 3, 127])
def test_best_of_bells(sigma, shift):
    counts = gaussian_counts(sigma)
    moved = np.zeros_like(counts)
    u = np.arange(256) + shift
    moved[u[(u >= 0) & (u < 256)]] = counts[(u >= 0) & (u < 256)]
    check_best(moved)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=16).filter(any), st.integers(0, 240))
def test_best_of_small_alphabets(values, start):
    counts = np.zeros(256, np.uint64)
    counts[start : start + len(values)] = values
    check_best(counts)


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.integers(0, 255), st.integers(1, 1 << 20), min_size=1, max_size=12))
def test_best_of_codes_with_gaps(values):
    counts = np.zeros(256, np.uint64)
    for u, c in values.items():
        counts[u] = c
    check_best(counts)


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.integers(0, 255), st.integers(1, 2**40), min_size=1, max_size=256))
def test_any_histogram(values):
    counts = np.zeros(256, np.uint64)
    for u, c in values.items():
        counts[u] = c
    check_plan(counts)


def test_no_counts_are_an_error():
    with pytest.raises(codec.CodecError):
        codec.plan_code(np.zeros(256, np.uint64))


def test_same_counts_same_plan():
    counts = gaussian_counts(7.0)
    assert codec.plan_code(counts).code == codec.plan_code(counts.copy()).code


def test_parts_are_counted(rng):
    """`inspect` shows what the plan counted."""
    counts = np.bincount(np.clip(np.rint(rng.normal(128, 20, 10000)), 0, 255).astype(int), minlength=256).astype(np.uint64)
    plan = check_plan(counts)
    usage = plan.code.usage(counts)
    assert (usage.direct, usage.tail, usage.far) == (10000 - plan.n_tail, plan.n_tail - plan.n_far, plan.n_far)


def test_a_decoder_s_time_is_charged(monkeypatch):
    """Where two codes are nearly alike in size, the one with fewer tails is taken, not the smaller
    one."""
    counts = gaussian_counts(3.62)
    plan = check_plan(counts)
    for name in ("PLANE_COST", "TAIL_COST", "FAR_COST"):
        assert globals()[name] > 0
        monkeypatch.setitem(globals(), name, 0.0)
    assert 1.002 < plan.n_bits / least_cost(counts) < 1.01
    assert plan.n_tail < 0.25 * counts.sum()
