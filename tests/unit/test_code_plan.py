# SPDX-License-Identifier: MIT
"""The class partition: valid, optimal, and close to the entropy."""

from __future__ import annotations

import heapq
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entrollm_gguf import codec

MAX_PREFIX, MAX_LENGTH = 8, 15


def gaussian_counts(sigma: float, total: float = 1e7) -> np.ndarray:
    u = np.arange(256)
    return np.rint(total * np.exp(-0.5 * ((u - 128) / sigma) ** 2) / (sigma * 2.5066)).astype(np.uint64)


def huffman_bits(counts: np.ndarray) -> int:
    """Size of an unlimited Huffman code: the least that one code word per symbol can reach."""
    heap = [int(c) for c in counts if c]
    heapq.heapify(heap)
    total = 0
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        total += merged
        heapq.heappush(heap, merged)
    return total


def brute_force_bits(counts: dict[int, int], n: int) -> int:
    """Least cost over all sets of classes on symbols 0..n-1, by exhaustive search: partitions into intervals of 2^e, prefix lengths, escape."""
    best = [10**9]

    def prefix_lengths(classes, budget):
        # classes: (count, e); cheapest lengths with Kraft sum <= budget / 256, by trying all
        costs = [10**9]
        for lengths in itertools.product(range(1, 5), repeat=len(classes)):
            if sum(256 >> p for p in lengths) <= budget:
                costs.append(sum(c * (p + e) for (c, e), p in zip(classes, lengths)))
        return min(costs)

    def walk(j, classes, escaped):
        if j >= n:
            if escaped:
                for p in range(1, 8):
                    best[0] = min(best[0], escaped * (p + 8) + (prefix_lengths(classes, 256 - (256 >> p)) if classes else 0))
            elif len(classes) == 1:
                best[0] = min(best[0], classes[0][0] * max(1, classes[0][1]))
            else:
                best[0] = min(best[0], prefix_lengths(classes, 256))
            return
        if counts.get(j, 0) == 0:
            walk(j + 1, classes, escaped)
        else:
            walk(j + 1, classes, escaped + counts[j])
        for e in range(3):
            covered = sum(counts.get(u, 0) for u in range(j, j + (1 << e)))
            if covered:
                walk(j + (1 << e), [*classes, (covered, e)], escaped)

    walk(0, [], 0)
    return best[0]


def check_plan(counts: np.ndarray) -> codec.CodePlan:
    """A plan's own promises: every used symbol has a code, the table decodes it, lengths are in range."""
    plan = codec.plan_code(counts)
    lengths = plan.lengths.astype(int)
    assert (lengths[counts > 0] > 0).all() and lengths.max() <= MAX_LENGTH
    assert plan.n_bits == int((counts.astype(object) * lengths).sum())
    for u in np.flatnonzero(lengths):
        bits = format(plan._c.code[u], f"0{lengths[u]}b")
        t, bias = plan.table[int(bits.ljust(8, "0")[:8], 2)]
        assert t == lengths[u] and (int(bits, 2) + int(bias)) % 256 == u
    return plan


@pytest.mark.parametrize("sigma, most", [(1.0, 1.055), (2.0, 1.03), (4.0, 1.02), (9.0, 1.015), (20.0, 1.012), (60.0, 1.01)])
def test_close_to_the_entropy(sigma, most):
    counts = gaussian_counts(sigma)
    plan = check_plan(counts)
    assert codec.entropy_bits(counts) <= plan.n_bits <= most * codec.entropy_bits(counts)


@pytest.mark.parametrize("sigma", [1.0, 3.0, 9.0, 20.0])
def test_within_a_percent_of_unlimited_huffman(sigma):
    counts = gaussian_counts(sigma)
    assert huffman_bits(counts) <= check_plan(counts).n_bits <= 1.01 * huffman_bits(counts)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 50), min_size=2, max_size=5).filter(any))
def test_optimal_on_small_alphabets(values):
    counts = np.zeros(256, np.uint64)
    counts[: len(values)] = values
    assert check_plan(counts).n_bits <= brute_force_bits(dict(enumerate(values)), len(values))


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.integers(0, 255), st.integers(1, 2**40), min_size=1, max_size=256))
def test_any_histogram(values):
    counts = np.zeros(256, np.uint64)
    for u, c in values.items():
        counts[u] = c
    plan = check_plan(counts)
    assert plan.n_bits <= 8 * int(counts.sum(dtype=object)) + int(counts.sum(dtype=object))


def test_no_counts_are_an_error():
    with pytest.raises(codec.CodecError):
        codec.plan_code(np.zeros(256, np.uint64))


def test_same_counts_same_plan():
    counts = gaussian_counts(7.0)
    assert np.array_equal(codec.plan_code(counts).table, codec.plan_code(counts.copy()).table)


def test_lengths_from_the_table(rng):
    """What the plot shows is what the encoder uses: the coded size follows from the table alone."""
    from entrollm_gguf.inspect.plot import code_lengths

    for sd in (0.4, 2.0, 9.0, 40.0):
        codes = np.clip(np.rint(rng.normal(0, sd, (64, 128))), -128, 127).astype(np.int8)
        counts = codec.count_symbols(codec.EntropyType.EQ8, codes)
        plan = codec.plan_code(counts)
        payload = codec.encode(codec.EntropyType.EQ8, codes, np.ones(1, np.float16)).payload
        lengths = code_lengths(codec.table(codec.EntropyType.EQ8, payload, codes.shape)[0])
        assert int((lengths * counts.astype(np.int64)).sum()) == plan.n_bits
