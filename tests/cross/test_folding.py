# SPDX-License-Identifier: MIT
"""Column equalisation before any quantization: the model computes the same, or nothing is
folded."""

from __future__ import annotations

import numpy as np
import pytest
from models import FOR_FOLDING
from running import logits

from entrollm_gguf.calibrate import Statistics, TensorStatistics
from entrollm_gguf.convert.fold import Folding, plan_folding
from entrollm_gguf.convert.llama_cpp import Output, SourceModel, evaluate
from entrollm_gguf.gguf_io.patched import import_gguf

EXACT = ("llama", "mistral", "phi3", "qwen2", "qwen2_moe", "gemma3", "qwen3", "mixtral", "granite", "olmo2", *FOR_FOLDING)
NOT_FOLDED = ("gpt2", "starcoder2", "gpt_neox", "mamba")


def random_statistics(shapes) -> Statistics:
    """Inputs of very different size for every matrix."""
    rng = np.random.default_rng(3)
    return Statistics(
        "random",
        {
            name: TensorStatistics(rng.lognormal(0, 2, (shape[0] if len(shape) == 3 else 1, shape[-1])).astype(np.float32))
            for name, shape in shapes.items()
            if len(shape) in (2, 3)
        },
    )


def plan(folder) -> tuple[Folding, dict]:
    source = SourceModel(folder)
    shapes = source.outline().shapes
    return plan_folding(source.architecture, shapes, source.heads(), random_statistics(shapes)), shapes


def write_floats(folder, path, folding) -> None:
    """The model as an F32 GGUF."""
    source, types = SourceModel(folder), import_gguf().GGMLQuantizationType
    tensors = {}
    source.each_tensor(lambda name, data, _: tensors.__setitem__(name, folding.apply(name, evaluate(data)).astype(np.float32)))
    outputs = [Output(name, np.ascontiguousarray(data), data.shape, types.F32) for name, data in tensors.items()]
    source.write_file(path, outputs, {}, 0)


@pytest.mark.parametrize("name", EXACT)
def test_logits_are_unchanged(tiny_model, tmp_path, name):
    folder = tiny_model(name).folder
    folding, shapes = plan(folder)
    write_floats(folder, tmp_path / "plain.gguf", Folding())
    write_floats(folder, tmp_path / "folded.gguf", folding)
    # keys and values in F32: rounding to f16 would differ
    plain, folded = (logits(tmp_path / f"{one}.gguf", type_k=0, type_v=0) for one in ("plain", "folded"))
    assert ((plain - folded) ** 2).sum() / (plain**2).sum() < 1e-8
    # everything that reads a norm, a product of gate and up, or values, was folded
    parts = {one.split(".", 2)[-1] for one in folding.columns}
    wanted = {"attn_output.weight"} | ({"ffn_down.weight"} if "blk.0.ffn_down.weight" in shapes else {"ffn_down_exps.weight"})
    if "blk.0.attn_norm.weight" in shapes:
        wanted |= {"attn_qkv.weight"} if "blk.0.attn_qkv.weight" in shapes else {"attn_q.weight", "attn_k.weight", "attn_v.weight"}
    if name in ("qwen2_moe", "mixtral", "qwen3_moe", "olmoe"):
        wanted |= {"ffn_gate_inp.weight", "ffn_up_exps.weight", "ffn_gate_exps.weight"}
    assert wanted <= parts
    assert "output.weight" not in folding.columns and "output_norm.weight" not in folding.rows


@pytest.mark.parametrize("name", NOT_FOLDED)
def test_where_it_would_not_be_exact_nothing_is_folded(tiny_model, tmp_path, name):
    folding, _ = plan(tiny_model(name).folder)
    assert not folding.columns and not folding.rows


def test_an_unknown_reader_of_the_norm_forbids_it(tiny_model, tmp_path):
    """With a router that does not fit, or a matrix without statistics, a norm is not folded at
    all."""
    folder = tiny_model("llama").folder
    shapes = SourceModel(folder).outline().shapes
    statistics = random_statistics(shapes)
    odd = {**shapes, "blk.0.ffn_gate_inp.weight": (4, 64)}
    folding = plan_folding("llama", odd, (9, 3), statistics)
    assert "blk.0.ffn_norm.weight" not in folding.rows and "blk.1.ffn_norm.weight" in folding.rows
    some = Statistics("some", {name: one for name, one in statistics.tensors.items() if "blk.0." not in name})
    assert not any("blk.0." in name for name in plan_folding("llama", shapes, (9, 3), some).columns)
    assert not plan_folding("llama", shapes, (9, 3), statistics, exponent=0).columns
    without_heads = plan_folding("llama", shapes, None, statistics)
    assert "blk.0.attn_output.weight" not in without_heads.columns and "blk.0.ffn_down.weight" in without_heads.columns


def test_weights_that_are_no_floats_are_not_folded(tiny_model, tmp_path):
    """Nothing can be multiplied into a quantized checkpoint's integers: neither what they read nor
    what they make is folded."""
    shapes = SourceModel(tiny_model("llama").folder).outline().shapes
    statistics = random_statistics(shapes)
    for name, unfolded in (
        ("blk.0.attn_q.weight", {"blk.0.attn_norm.weight", "blk.0.attn_q.weight", "blk.0.attn_k.weight"}),
        ("blk.0.attn_v.weight", {"blk.0.attn_norm.weight", "blk.0.attn_v.weight", "blk.0.attn_output.weight"}),
        ("blk.0.ffn_up.weight", {"blk.0.ffn_norm.weight", "blk.0.ffn_up.weight", "blk.0.ffn_down.weight"}),
    ):
        folding = plan_folding("llama", shapes, (9, 3), statistics, untouchable=frozenset([name]))
        assert unfolded.isdisjoint(folding.columns.keys() | folding.rows.keys())
        assert "blk.1.attn_q.weight" in folding.columns
    for stem, column in (("blk.0.attn_v", "blk.0.attn_output.weight"), ("blk.0.ffn_up", "blk.0.ffn_down.weight")):
        scaled = {**shapes, f"{stem}.scale": (1,)}
        assert column not in plan_folding("llama", scaled, (9, 3), statistics).columns
