# SPDX-License-Identifier: MIT
"""The CUDA kernels, thread by thread on the CPU (simt.h), against numpy, the reference decoder and
the codec.

Payloads as in a file are brought into the device layout, as the model loader does it. Decoded
weights are bit-exact. Sums of products differ from f64 by the rounding of f32.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fused_cases import Case, Made, all_cases, make, make_columns
from host import SMALLEST_SHARED, HostKernels, KernelError, Weights, patched_tree
from reference import decoder, lanes

from entrollm_gguf import codec
from entrollm_gguf.codec import EntropyType

QUANTIZED = [kind for kind in EntropyType if kind.is_quantized]

BOUND = 2e-6  # relative to the sum of absolute products, as on the CPU


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> HostKernels:
    folder = tmp_path_factory.mktemp("cuda-host")
    return HostKernels(patched_tree(folder), folder)


def weights(one: Made) -> Weights:
    n_slabs, n_rows, n_cols = one.codes.shape
    return Weights(one.case.kind, codec.Payload(one.case.kind, one.payload, one.codes.shape).to_lanes(), n_rows, n_cols, n_slabs)


def values(one: Made) -> np.ndarray:
    """Weights f64 (n_slabs, n_rows, n_cols) from the codes, which the encoder's own tests compare
    with the reference decoder."""
    offset = 0 if one.offsets is None else one.offsets[:, :, None].astype(np.float64)
    return one.codes * one.scales[:, :, None].astype(np.float64) + offset


def check(one: Made, got: np.ndarray) -> None:
    expected, size = one.expected(values(one))
    error = np.abs(got.reshape(expected.shape) - expected) / np.maximum(size, 1e-30)
    assert error.max() <= BOUND, (str(one.case), error.max())


def kind_number(kind: EntropyType) -> int:
    """As in headers."""
    return 1 if kind is EntropyType.EQ8 else 2


def reference_slabs(one: Made) -> list[decoder.Slab]:
    n_slabs, n_rows, n_cols = one.codes.shape
    return decoder.parse_tensor(one.payload.tobytes(), kind_number(one.case.kind), (n_cols, n_rows, n_slabs, 1))


# what a mat-vec launch takes: up to eight columns
OPS = [case for case in all_cases() if case.n_columns is not None and case.n_columns <= 8]
ROWS = [case for case in all_cases() if case.n_columns is None]


@pytest.mark.parametrize("case", OPS, ids=str)
def test_products(kernels, rng, case):
    one = make(case, rng)
    got = kernels.mat_vec(weights(one), one.columns, one.ids)
    check(one, got)


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("offset", ["none", "row"])
@pytest.mark.parametrize("n_columns", range(1, 9))
def test_every_number_of_columns(kernels, rng, kind, offset, n_columns):
    one = make(Case(kind, 40, 96, n_columns, offset=offset), rng)
    check(one, kernels.mat_vec(weights(one), one.columns))


@pytest.mark.parametrize("case", all_cases(), ids=str)
def test_the_loader_makes_the_device_layout(kernels, rng, case):
    """Bit by bit what the Python codec makes, which the reference decoder of the device layout
    accepts and decodes to the same codes."""
    one = make(case, rng)
    made = kernels.make_lanes(case.kind, one.payload, one.codes.shape)
    np.testing.assert_array_equal(made, weights(one).payload)
    if one.codes.size <= 40_000:
        for slab, codes in zip(lanes.parse_tensor(made.tobytes(), reference_slabs(one)), one.codes):
            lanes.verify(slab)
            np.testing.assert_array_equal(lanes.decode_codes(slab), codes)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_matrices_that_do_not_fit(kernels, rng, kind):
    """A header that promises too little is refused; what is promised beyond need is filled up."""
    one = make(Case(kind, 100, 192, 1, n_slabs=3, offset="row"), rng)
    size = codec.read_header(kind, one.payload, one.codes.shape).device_size
    with pytest.raises(KernelError, match=rf"slab \d needs {size}$"):
        kernels.make_lanes(kind, one.payload, one.codes.shape, size - 256)
    larger = kernels.make_lanes(kind, one.payload, one.codes.shape, size + 512).reshape(3, -1)
    assert (larger[:, size:] == 0).all()
    np.testing.assert_array_equal(larger[:, 256:size], kernels.make_lanes(kind, one.payload, one.codes.shape).reshape(3, -1)[:, 256:])


def test_large_matrices_by_several_threads(kernels, rng):
    """The work is done in chunks of row groups, and the result does not depend on them. The last
    group is not full."""
    for kind in QUANTIZED:
        codes = np.clip(np.rint(rng.normal(0, 3, (2, 1013, 2048))), *kind.code_range).astype(np.int8)
        scales = rng.uniform(0.001, 0.02, (2, 1013)).astype(np.float16)
        payload = codec.encode(kind, codes, scales).payload
        np.testing.assert_array_equal(kernels.make_lanes(kind, payload, codes.shape), codec.Payload(kind, payload, codes.shape).to_lanes())


def check_pair(kernels, one: Made, other: Made, **options) -> None:
    """One launch for both matrices, in both orders: each against its own right result."""
    other.columns, other.ids = one.columns, one.ids
    for first, second in ((one, other), (other, one)):
        got = kernels.mat_vec_pair(weights(first), weights(second), one.columns, one.ids, **options)
        check(first, got[0])
        check(second, got[1])


# the second matrix has fewer rows, more, or the same number, and its last row group is full or not.
# A group of the wrong matrix would show: codes, scales and tables differ.
@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("n_columns", range(1, 9))
def test_two_matrices_in_one_launch(kernels, rng, kind, n_columns):
    n_rows = (40, 64, 1, 96, 33, 31, 32, 100)[n_columns - 1]
    case = Case(kind, 40, 96, n_columns)
    check_pair(kernels, make(case, rng), make(replace(case, n_rows=n_rows, codes="uniform"), rng))


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("n_columns", [1, 6])
@pytest.mark.parametrize("offsets", [("row", "row"), ("none", "row"), ("one", "none")], ids=str)
def test_two_matrices_with_offsets(kernels, rng, kind, n_columns, offsets):
    """Columns take their second term if either matrix has offsets. Tiles and row lengths as in a
    model, several slices to a warp."""
    case = Case(kind, 33, 1120, n_columns, offset=offsets[0], tile_cols=128)
    check_pair(kernels, make(case, rng), make(replace(case, n_rows=70, offset=offsets[1], tile_cols=256), rng), n_warps=3)


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("n_tokens", range(1, 9))
def test_experts_of_two_matrices(kernels, rng, kind, n_tokens):
    """Gate and up of a MoE: an expert of each for every token and slot; odd numbers of tokens share
    a column between their slots."""
    case = Case(kind, 33, 64, n_tokens, n_slabs=5, n_used=2, offset="row" if n_tokens > 4 else "none")
    check_pair(kernels, make(case, rng), make(replace(case, n_rows=20 + 15 * n_tokens, codes="escapes"), rng))


@pytest.mark.parametrize("kind", QUANTIZED)
def test_stacks_of_two_matrices(kernels, rng, kind):
    case = Case(kind, 40, 96, 3, n_slabs=3, planes=2)
    check_pair(kernels, make(case, rng), make(replace(case, n_rows=65), rng))


@pytest.mark.parametrize(
    "options", [{"n_warps": 1}, {"n_warps": 3}, {"backwards": True}, {"early": True}, {"shared_size": SMALLEST_SHARED}], ids=str
)
@pytest.mark.parametrize("kind", QUANTIZED)
def test_any_block(kernels, rng, kind, options):
    """Fewer warps than slices, the smallest shared memory of any device, threads in the other
    order, copies that land early."""
    one = make(Case(kind, 33, 1120, 2, offset="row", tile_cols=128), rng)
    check(one, kernels.mat_vec(weights(one), one.columns, **options))
    plain = "F16" if kind is EntropyType.EQ8 else "Q4_1"
    assert kernels.decode(weights(one), plain, **options).tobytes() == stock(one)[1]


@pytest.mark.parametrize("case", ROWS, ids=str)
def test_single_rows(kernels, rng, case):
    one = make(case, rng)
    got = kernels.get_rows(weights(one), one.ids)
    offset = np.float32(0) if one.offsets is None else one.offsets[:, :, None].astype(np.float32)
    exact = one.codes.astype(np.float32) * one.scales[:, :, None].astype(np.float32) + offset
    expected = np.stack([exact[i][one.ids[i]] for i in range(case.n_slabs)])
    np.testing.assert_array_equal(got, expected)


def stock(one: Made) -> tuple[str, bytes]:
    """What the reference decoder, or for large tensors the codec, makes of the payload."""
    if one.codes.size > 40_000:
        name, data = codec.Payload(one.case.kind, one.payload, one.codes.shape).plain()
        return name, data.tobytes()
    decoded = [decoder.decode_plain(slab) for slab in reference_slabs(one)]
    return decoded[0][0], b"".join(data for _, data in decoded)


@pytest.mark.parametrize("case", [case for case in all_cases() if not case.n_used], ids=str)
def test_rows_of_the_stock_type_are_bit_exact(kernels, rng, case):
    one = make(case, rng)
    name, expected = stock(one)
    assert kernels.decode(weights(one), name).tobytes() == expected


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("offset", ["none", "row"])
def test_rows_for_batches(kernels, rng, kind, offset):
    """F16 of either kind, and codes as Q8_0 or Q4_0 whose offsets are left out; a part of the row
    groups."""
    one = make(Case(kind, 100, 192, 1, offset=offset, n_slabs=2), rng)
    halves = kernels.decode(weights(one), "F16", 1, 2).view(np.float16)
    offsets = np.float32(0) if one.offsets is None else one.offsets[:, :, None].astype(np.float32)
    expected = (one.codes * one.scales[:, :, None].astype(np.float32) + offsets).astype(np.float16)
    np.testing.assert_array_equal(halves, expected[:, 32:96])

    without = Made(one.case, codec.encode(kind, one.codes, one.scales).payload, one.codes, one.scales, None, None, None)
    plain = "Q8_0" if kind is EntropyType.EQ8 else "Q4_0"
    assert kernels.decode(weights(one), plain).tobytes() == stock(without)[1]


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("n_used", [0, 2])
@pytest.mark.parametrize("offset", ["none", "one", "row"])
def test_offsets_after_a_batch(kernels, rng, kind, offset, n_used):
    """Codes alone give a product without offsets; a kernel adds what they contribute."""
    n_planes = 3 if n_used == 0 else 0
    case = Case(kind, 33, 96, 11, n_slabs=3, n_used=n_used, planes=max(1, n_planes), offset=offset)
    one = make(case, rng)
    without, _ = one.expected(one.codes * one.scales[:, :, None].astype(np.float64))
    got = without.astype(np.float32)
    kernels.add_offsets(weights(one), one.columns, got, one.ids)
    check(one, got)


def test_experts_that_are_used(kernels, rng):
    ids = rng.choice(np.array([0, 2, 3, 70, 99], np.int32), (40, 2))
    ids[3] = (-1, 100)  # none of ours
    assert set(np.flatnonzero(kernels.count_routes(100, ids))) == {0, 2, 3, 70, 99}


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("share", [1.0, 0.1, 0.2, 0.4])
def test_lanes_that_drift_apart(kernels, rng, kind, share, early):
    """Rows of one bit a symbol beside rows of escapes: more word rows between lanes than the ring
    has, so words come from global memory.

    With a share of such codes the lanes drift slowly, and the ring is as full as it can be for many
    units before that.
    """
    low, high = kind.code_range
    codes = np.full((1, 40, 1024), 1, np.int8)
    codes[:, 1::2] = np.where(rng.random((1, 20, 1024)) < share, rng.integers(low, high + 1, (1, 20, 1024)), 1)
    codes[:, 4::8, 512:] = rng.integers(low, high + 1, codes[:, 4::8, 512:].shape)  # and lanes that come back together
    scales = rng.uniform(0.001, 0.02, (1, 40)).astype(np.float16)
    columns = make_columns((1, 2, 1024), rng)
    case = Case(kind, 40, 1024, 2)
    one = Made(case, codec.encode(kind, codes, scales, None, tile_cols=1024).payload, codes, scales, None, columns, None)
    check(one, kernels.mat_vec(weights(one), columns, early=early))
    name, expected = stock(one)
    assert kernels.decode(weights(one), name, early=early).tobytes() == expected
    ids = np.array([[0, 1, 4, 39]], np.int32)
    np.testing.assert_array_equal(kernels.get_rows(weights(one), ids)[0], (codes[0] * scales[0][:, None].astype(np.float32))[ids[0]])


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("n_far", [48, 120])
def test_bursts_of_long_codes(kernels, rng, kind, n_far, early):
    """Columns in which all rows have the longest codes, among columns of short ones: a dozen words
    of every lane at a time."""
    low, high = kind.code_range
    # halves, quarters, ... of seven symbols take the short prefixes
    common = np.minimum(rng.geometric(0.5, (1, 32, 16384)), 7) - 4
    codes = (common if kind is EntropyType.EQ8 else np.repeat(common[..., ::2], 2, axis=-1)).astype(np.int8)
    codes[:, :, 2000 : 2000 + n_far] = rng.integers(low, high + 1, (1, 32, n_far))
    scales = np.full((1, 1), 0.01, np.float16)
    encoded = codec.encode(kind, codes, scales, None, tile_cols=1024)
    columns = make_columns((1, 1, 16384), rng)
    one = Made(Case(kind, 32, 16384, 1), encoded.payload, codes, scales, None, columns, None)
    assert weights(one).payload[256:768:2].max() >= 14  # lengths in the table
    check(one, kernels.mat_vec(weights(one), columns, early=early))
    name, expected = stock(one)
    assert kernels.decode(weights(one), name, early=early).tobytes() == expected


@pytest.mark.parametrize("kind", QUANTIZED)
def test_activations_that_are_not_exact(kernels, rng, kind):
    """int8 once without offsets, twice with them (docs/decisions.md): the errors of 8 and of some
    16 bits."""
    x = rng.normal(0, 1, (1, 3, 1024)).astype(np.float32)
    x[0, 1] = 0
    for offset, bound in (("none", 3e-3), ("row", 2e-5)):
        one = make(Case(kind, 64, 1024, 3, offset=offset), rng)
        one.columns = x
        got = kernels.mat_vec(weights(one), x)
        expected, size = one.expected(values(one))
        assert (np.abs(got - expected) / np.maximum(size, 1e-30)).max() < bound
        assert (got[0, 1] == 0).all()


@pytest.mark.parametrize("kind", QUANTIZED)
def test_damaged_streams_stay_in_bounds(kernels, rng, kind):
    """Any bits in the bitstream: every access is checked, and rows of other tiles are untouched."""
    one = make(Case(kind, 70, 576, 2, offset="row", codes="escapes", tile_cols=256), rng)
    sound = weights(one).payload
    begin, n_words = (int(number) for number in sound[96:112].view(np.uint64))
    assert begin + 4 * n_words < sound.size
    ids = np.array([[0, 31, 69]], np.int32)
    plain = "F16" if kind is EntropyType.EQ8 else "Q4_1"
    for fill in ("zeros", "ones", "random", "one bit"):
        payload = sound.copy()
        stream = payload[begin : begin + 4 * n_words]
        if fill == "one bit":
            stream[rng.integers(stream.size, size=20)] ^= 1
        else:
            stream[:] = {"zeros": 0, "ones": 255, "random": rng.integers(0, 256, stream.size)}[fill]
        damaged = Weights(kind, payload, 70, 576)
        for backwards in (False, True):
            kernels.mat_vec(damaged, one.columns, backwards=backwards)
            kernels.decode(damaged, plain, backwards=backwards)
            kernels.get_rows(damaged, ids, backwards=backwards)


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("offset", ["none", "row"])
@pytest.mark.parametrize("fill", [0, 255])
def test_experts_that_were_not_copied(kernels, rng, kind, offset, fill):
    """A scheduler may copy only the experts in use to a device: no kernel may look at others, not
    even for what all have in common."""
    case = Case(kind, 33, 64, 5, n_slabs=4, n_used=2, offset=offset)
    one, other = make(case, rng), make(replace(case, n_rows=40), rng)
    one.ids = rng.permuted(np.tile(np.array([1, 3], np.int32), (5, 1)), axis=1)
    other.columns, other.ids = one.columns, one.ids

    def copied(full: Made) -> Weights:
        there = weights(full)
        others = there.payload.reshape(4, -1)[::2]
        others[:] = fill
        others[:, 36] = 32  # the width of tiles, a division by which would end the test program
        return there

    check(one, kernels.mat_vec(copied(one), one.columns, one.ids))
    both = kernels.mat_vec_pair(copied(one), copied(other), one.columns, one.ids)
    check(one, both[0])
    check(other, both[1])

    # as many columns as in real models, where a missing second term shows
    one.columns = rng.normal(0, 1, one.columns.shape).astype(np.float32)
    expected, size = one.expected(values(one))
    error = np.abs(kernels.mat_vec(copied(one), one.columns, one.ids) - expected) / np.maximum(size, 1e-30)
    assert error.max() < (5e-3 if offset == "none" else 1e-4)

    without, _ = one.expected(one.codes * one.scales[:, :, None].astype(np.float64))
    got = without.astype(np.float32)
    kernels.add_offsets(copied(one), one.columns, got, one.ids)
    check(one, got)


def test_ids_out_of_range(kernels, rng):
    """An expert or row that does not exist gives nothing, and no access out of bounds."""
    one = make(Case(EntropyType.EQ8, 33, 64, 2, n_slabs=3, n_used=2), rng)
    ids = np.array([[0, 3], [-1, 2]], np.int32)
    got = kernels.mat_vec(weights(one), one.columns, ids)
    assert np.isnan(got[0, 1]).all() and np.isnan(got[1, 0]).all() and np.isfinite(got[0, 0]).all() and np.isfinite(got[1, 1]).all()
    first = weights(one).payload.reshape(3, -1)[0]
    rows = kernels.get_rows(Weights(EntropyType.EQ8, first, 33, 64), np.array([[33, -1, 5]], np.int32))
    assert (rows[0, :2] == 0).all() and (rows[0, 2] != 0).any()


def test_the_emulator_sees_mistakes(kernels, rng):
    """A lane length beyond the slab is an access out of bounds."""
    one = make(Case(EntropyType.EQ8, 32, 64, 1), rng)
    payload = weights(one).payload
    lane_words = int.from_bytes(payload[88:96].tobytes(), "little")
    payload[lane_words : lane_words + 32] = 255
    with pytest.raises(KernelError, match="global access out of bounds"):
        kernels.mat_vec(Weights(EntropyType.EQ8, payload, 32, 64), one.columns)
