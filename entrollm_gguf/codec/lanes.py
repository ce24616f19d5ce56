# SPDX-License-Identifier: MIT
"""The device layout (docs/format.md 8), as far as a file has to know it: its size."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np

from entrollm_gguf.codec import c
from entrollm_gguf.codec.code import histogram
from entrollm_gguf.codec.shared import (
    LANES,
    MAX_LANE_WORDS,
    MAX_TILE_COLS,
    MIN_COLS,
    CodecError,
    EntropyType,
    check_argument,
    n_groups_of,
    run_groups,
)


@dataclass(frozen=True)
class Lanes:
    """The code of a slab in the device layout, and the lengths of its lanes."""

    plan: c.LanesPlan
    words: np.ndarray  # uint8 (n_tiles, 32)
    longest: int  # words of the longest lane; above 255 `words` is wrong


def lanes_plan(kind: EntropyType, codes: np.ndarray, n_threads: int) -> c.LanesPlan:
    counts = histogram(c.library().ggml_entropy_lanes_count, kind, codes, LANES, n_threads)
    plan = c.LanesPlan()
    check_argument(c.library().ggml_entropy_lanes_plan_code(counts.ctypes.data, ctypes.byref(plan)))
    return plan


def measure_lanes(kind: EntropyType, codes: np.ndarray, plan: c.LanesPlan, tile_cols: int, n_threads: int) -> Lanes:
    n_rows, n_cols = codes.shape
    n_groups = n_groups_of(n_rows, LANES)
    words = np.zeros((n_groups * -(-n_cols // tile_cols), LANES), np.uint8)
    longest: list[ctypes.c_int64] = []

    def part(group0: int, group1: int) -> int:
        most = ctypes.c_int64(0)
        longest.append(most)
        return c.library().ggml_entropy_lanes_measure(
            kind, n_rows, n_cols, codes.ctypes.data, ctypes.byref(plan), tile_cols, group0, group1, words.ctypes.data, ctypes.byref(most)
        )  # fmt: skip

    check_argument(run_groups(part, n_groups, n_threads))
    return Lanes(plan, words, max(most.value for most in longest))


def check_tile_cols(tile_cols: int) -> None:
    """Check that tiles of the device layout can have that width (docs/format.md 8.1).

    Raises:
        CodecError: they cannot.

    >>> check_tile_cols(100)
    Traceback (most recent call last):
    entrollm_gguf.codec.shared.CodecError: tile_cols 100: must be a multiple of 32 from 32 to 1024
    """
    if tile_cols % MIN_COLS or not MIN_COLS <= tile_cols <= MAX_TILE_COLS:
        raise CodecError(f"tile_cols {tile_cols}: must be a multiple of {MIN_COLS} from {MIN_COLS} to {MAX_TILE_COLS}")


def plan_device_layout(stack: np.ndarray, specs: list[c.Spec], tile_cols: int | None, n_threads: int) -> None:
    """Fill in tile_cols and device_size of all slabs: the widest tiles that keep each lane within
    255 words, and the longest slab. EBF16 has no device layout: its device_size stays 0.

    Raises:
        CodecError: tile_cols is impossible.
    """
    lib = c.library()
    kind = EntropyType(specs[0].type)
    _, n_rows, n_cols = stack.shape
    if tile_cols is None:
        width = lib.ggml_entropy_lanes_default_tile_cols(n_rows, n_cols)
    else:
        check_tile_cols(tile_cols)
        width = tile_cols
    if not kind.is_quantized:
        for spec in specs:
            spec.tile_cols = width
        return
    plans = [lanes_plan(kind, codes, n_threads) for codes in stack]
    while True:
        lanes = [measure_lanes(kind, codes, plan, width, n_threads) for codes, plan in zip(stack, plans)]
        if max(one.longest for one in lanes) <= MAX_LANE_WORDS:
            break
        # 512 codes of at most 15 bits are 240 words, so this ends
        width = max(MIN_COLS, width // 2 // MIN_COLS * MIN_COLS)
    for spec in specs:
        spec.tile_cols = width
    sizes = [lib.ggml_entropy_lanes_size(ctypes.byref(spec), one.words.ctypes.data) for spec, one in zip(specs, lanes)]
    if 0 in sizes:
        raise CodecError(f"a matrix of {n_rows} x {n_cols} cannot be represented in the device layout")
    for spec in specs:
        spec.device_size = max(sizes)
