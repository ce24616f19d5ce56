# SPDX-License-Identifier: MIT
"""From codes to payloads."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import numpy as np

from entrollm_gguf.codec import c
from entrollm_gguf.codec.code import count_codes, entropy_bits, plan_code, struct_of
from entrollm_gguf.codec.lanes import plan_device_layout
from entrollm_gguf.codec.shared import (
    CodecError,
    EntropyType,
    as_stack,
    check_argument,
    n_groups_of,
    n_threads_of,
    per_slab,
    run_groups,
    seed,
    spec_of,
)


@dataclass(frozen=True)
class Encoded:
    """A payload, and what is known from making it."""

    payload: np.ndarray  # uint8 (n_slabs * slab_size,), as it stands in the GGUF
    entropy_bits: float  # of the codes, summed over slabs
    coded_bits: int  # of the codes alone: raw bits, tails and far bytes without padding and index
    tile_cols: int  # of the device layout


def encode(
    kind: EntropyType,
    codes: np.ndarray,
    scales: np.ndarray,
    offsets: np.ndarray | None = None,
    *,
    rests: np.ndarray | None = None,
    name: str = "",
    tile_cols: int | None = None,
    threads: int | None = None,
) -> Encoded:
    """Entropy-code a matrix, or a stack of matrices (experts), into the payload of one tensor.

    Args:
        kind: EQ8 (codes -128..127), EQ4 (codes -8..7) or EBF16 (exponents less 128).
        codes: int8, shape (n_rows, n_cols) or (n_slabs, n_rows, n_cols); n_cols a multiple of 32.
        scales: f16, shape (1,) or (n_rows,), or the same per slab; for EBF16 one that is 0.
        offsets: f32 of the same shapes, or None.
        rests: for EBF16 the sign (bit 7) and mantissa of each weight, uint8 of the shape of codes.
        name: of the tensor in the GGUF; the hash takes it in.
        tile_cols: columns of a tile of the device layout, a multiple of 32 up to 1024; None for the
            default. It is halved until no lane exceeds 255 words.
        threads: None for all cores.
    Raises:
        CodecError: arguments that cannot be encoded.
        MemoryError: no memory for the payload.

    >>> codes = np.zeros((64, 128), np.int8)
    >>> codes[:, ::8] = 3
    >>> encoded = encode(EntropyType.EQ8, codes, np.array([0.5], np.float16))
    >>> encoded.coded_bits, round(encoded.entropy_bits)  # of 8192 weights
    (10240, 4453)
    >>> encoded.payload.nbytes  # with header, index and padding
    2048
    """
    lib = c.library()
    n_threads = n_threads_of(threads)
    stack = as_stack(codes)
    n_slabs, n_rows, n_cols = stack.shape
    if np.asarray(scales).dtype != np.float16:
        raise CodecError("scales must be float16: round them before choosing codes")
    scales = per_slab(scales, np.float16, n_slabs, n_rows, "scales")
    offsets = None if offsets is None else per_slab(offsets, np.float32, n_slabs, n_rows, "offsets")
    if (rests is None) == (kind is EntropyType.EBF16) or (rests is not None and (rests.dtype != np.uint8 or rests.shape != codes.shape)):
        raise CodecError("EBF16, and it alone, takes rests: uint8 of the shape of the codes")
    rests = None if rests is None else np.ascontiguousarray(rests).reshape(stack.shape)

    histograms = [count_codes(kind, slab, n_threads) for slab in stack]
    plans = [plan_code(counts) for counts in histograms]
    structs = [struct_of(plan.code) for plan in plans]
    extents = [_measure(kind, slab, code, n_threads) for slab, code in zip(stack, structs)]

    specs = [spec_of(kind, stack.shape, scales[i], *(None if one is None else one[i] for one in (offsets, rests))) for i in range(n_slabs)]
    plan_device_layout(stack, specs, tile_cols, n_threads)
    sizes = [lib.ggml_entropy_slab_size(ctypes.byref(s), ctypes.byref(code), e) for s, code, e in zip(specs, structs, extents)]
    slab_size = max(sizes)
    if 0 in sizes:
        raise CodecError(f"a matrix of {n_rows} x {n_cols} cannot be represented")

    payload = np.zeros(n_slabs * slab_size, np.uint8)
    for i, (slab_codes, spec, code, extent) in enumerate(zip(stack, specs, structs, extents)):
        slab, data = payload.ctypes.data + i * slab_size, slab_codes.ctypes.data
        check_argument(lib.ggml_entropy_begin(ctypes.byref(spec), ctypes.byref(code), extent, slab, slab_size))
        encode_groups = functools.partial(lib.ggml_entropy_encode_groups, data)
        check_argument(run_groups(lambda group0, group1: encode_groups(group0, group1, slab), n_groups_of(n_rows), n_threads))
        check_argument(lib.ggml_entropy_finish(slab, seed(name, i)))
    coded_bits = sum(plan.n_bits for plan in plans)
    return Encoded(payload, sum(map(entropy_bits, histograms)), coded_bits, specs[0].tile_cols)


def _measure(kind: EntropyType, codes: np.ndarray, code: c.Code, n_threads: int) -> ctypes.Array:
    """Extents of all row groups of a matrix."""
    n_rows, n_cols = codes.shape
    extents = (c.Extent * n_groups_of(n_rows))()

    def part(group0: int, group1: int) -> int:
        return c.library().ggml_entropy_measure(
            kind, n_rows, n_cols, codes.ctypes.data, ctypes.byref(code), group0, group1, extents
        )  # fmt: skip

    check_argument(run_groups(part, n_groups_of(n_rows), n_threads))
    return extents
