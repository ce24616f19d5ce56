# SPDX-License-Identifier: MIT
"""Matrices that are not entropy-coded get the smallest stock type that holds them; and what the
plain type of a coded one holds."""

from __future__ import annotations

import numpy as np
import pytest

from entrollm_gguf import codec
from entrollm_gguf.codec import EntropyType
from entrollm_gguf.convert.eligibility import reason_to_keep
from entrollm_gguf.convert.fold import Folding
from entrollm_gguf.convert.tensor import Treatment, code_tensor, keep, leave_tensor
from entrollm_gguf.convert.walk import Fate, Task, decide
from entrollm_gguf.errors import ConversionError, FormatError
from entrollm_gguf.gguf_io.patched import import_gguf
from entrollm_gguf.quant import quantize_rows

EMBEDDING = "per_layer_token_embd.weight"  # read row by row: not coded, but Q8_0 in llama-quantize


def truncated(weights: np.ndarray) -> np.ndarray:
    """Weights that a bf16 holds."""
    return (weights.view(np.uint32) & 0xFFFF0000).view(np.float32)


def spike(weights: np.ndarray, value: float) -> np.ndarray:
    weights = weights.copy()
    weights[3, 7] = value
    return weights


@pytest.mark.parametrize(
    "name, change, type_name",
    [
        ("a.weight", lambda w: w, "F16"),
        ("a.weight", truncated, "BF16"),
        ("a.weight", lambda w: truncated(w * np.float32(1e-6)), "BF16"),
        ("a.weight", lambda w: w * np.float32(1e-6), "F32"),
        ("a.weight", lambda w: spike(w, 1e5), "F32"),
        ("a.weight", lambda w: spike(w, 65504), "F16"),
        ("a.weight", lambda w: w.astype(np.float16), "F16"),
        ("a.weight", lambda w: w[:0], "F32"),
        (EMBEDDING, lambda w: w, "Q8_0"),
        (EMBEDDING, truncated, "Q8_0"),
        (EMBEDDING, lambda w: spike(w, 1e5), "Q8_0"),
        (EMBEDDING, lambda w: spike(w, 1e7), "F32"),
        (EMBEDDING, lambda w: w * np.float32(1e-6), "F32"),
        (EMBEDDING, lambda w: w[:, :90], "F16"),
        ("blk.0.attn_k_b.weight", lambda w: w.reshape(4, 16, 96), "Q8_0"),
        ("blk.0.hc_ffn_fn.weight", truncated, "BF16"),
    ],
)
def test_the_smallest_type_that_holds_it(rng, name, change, type_name):
    weights = change(rng.normal(0, 0.02, (64, 96)).astype(np.float32))
    payload, record, ggml_type = keep(name, weights, "why")
    assert (
        record.type_name == ggml_type.name == type_name
        and record.scheme == "kept: why"
        and record.kept == "why"
        and record.shape == weights.shape
    )
    assert payload.nbytes == record.n_bytes and record.coarse_rows == 0
    if weights.size == 0:
        return
    gguf = import_gguf()
    quantized = payload.reshape(*weights.shape[:-1], -1)
    back = gguf.dequantize(quantized.view({"F16": np.float16, "F32": np.float32}.get(type_name, np.uint8)), ggml_type)
    error = np.linalg.norm(back.reshape(weights.shape) - weights.astype(np.float32), axis=-1)
    assert (error <= {"Q8_0": 0.03, "F16": 2**-9}.get(type_name, 0) * np.linalg.norm(weights.astype(np.float32), axis=-1)).all()


@pytest.mark.parametrize(
    "name, is_coded",
    [
        ("blk.0.ffn_up.weight", True),
        ("blk.0.ssm_a", False),
        ("blk.0.ffn_up_exps.scale", False),
        *((f"blk.0.time_mix_{part}.weight", True) for part in ("key", "value", "receptance", "gate", "output")),
        *((f"blk.0.time_mix_{part}.weight", False) for part in ("w1", "v2", "a1", "g2", "decay_w1", "first", "lerp_fused")),
    ],
)
def test_which_matrices_are_coded(name, is_coded):
    assert (reason_to_keep(name, (64, 96)) is None) == is_coded


def test_rows_that_nobody_uses(rng):
    """A few such rows may lose their digits; they are counted."""
    weights = rng.normal(0, 0.02, (64, 96)).astype(np.float32)
    weights[5] *= np.float32(1e-12)
    assert {keep(name, weights, "why")[1].coarse_rows for name in ("a.weight", EMBEDDING)} == {1}
    weights[5:8] = weights[5]
    assert {keep(name, weights, "why")[1].type_name for name in ("a.weight", EMBEDDING)} == {"F32"}


def test_not_finite():
    with pytest.raises(ConversionError, match=r"tensor a\.weight: a weight is NaN or infinite"):
        keep("a.weight", np.full((2, 32), np.nan, np.float32), "why")


def test_what_the_converter_makes_of_it(rng):
    """The reason and the type come out of the whole path, for a matrix by its name and for one by
    its weights."""
    types = import_gguf().GGMLQuantizationType
    treatment = Treatment(EntropyType.EQ8, quantize_rows)
    weights = rng.normal(0, 0.02, (64, 96)).astype(np.float32)
    made = {}
    for name, data in ((EMBEDDING, weights), ("blk.0.ffn_down.weight", weights * np.float32(1e-7)), ("blk.1.ffn_down.weight", weights)):
        task = Task(name, data, types.BF16, decide(name, data, types.BF16), 1)
        if task.decision.fate is Fate.CODED:
            _, made[name], _ = code_tensor(task, treatment, Folding(), None)
        else:
            _, made[name], _ = leave_tensor(task, Folding())
    assert [(one.type_name, one.scheme) for one in made.values()][::2] == [
        ("Q8_0", "kept: read row by row from disk"),
        ("EQ8", "symmetric-rows"),
    ]
    small = made["blk.0.ffn_down.weight"]
    assert small.type_name == "F32" and small.scheme.startswith("kept: an f16 is too coarse for steps of")


@pytest.mark.parametrize("largest, held", [(65504, True), (65519, True), (65520, False), (1e5, False)])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("per_row", [False, True])
def test_f16_holds_every_code_or_is_refused(largest, held, sign, per_row):
    """Whatever codes the body has: all are 0 here."""
    codes = np.zeros((20, 32), np.int8)
    scales = np.float16([[sign * 2.0]])
    offsets = np.zeros((1, 20 if per_row else 1), np.float32)
    offsets[0, -1] = largest - 254
    if sign < 0:  # the last code is then the smallest
        offsets[0, -1] = largest - 256
    payload = codec.encode(EntropyType.EQ8, codes, scales, offsets).payload
    opened = codec.Payload(EntropyType.EQ8, payload, codes.shape, label="tensor a")
    for check in (opened.check_plain, opened.plain, opened.verify):
        if held:
            check()
        else:
            with pytest.raises(FormatError, match=r"tensor a: has weights up to .* infinite as F16"):
                check()
    assert not opened.codes().any()  # fused mode does not need F16
