# SPDX-License-Identifier: MIT
"""Checkpoints whose weights are integers with a scale for each row: codes come out bit by bit.
Scales for groups of columns cannot be kept, and the user is told so."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from entrollm_gguf.cli import main
from entrollm_gguf.codec import EntropyType, Payload
from entrollm_gguf.convert.pipeline import convert_model
from entrollm_gguf.convert.recipes import DEFAULT_FOR_INTEGERS, DEFAULT_RECIPE
from entrollm_gguf.errors import ConversionWarning
from entrollm_gguf.gguf_io.reader import open_model
from entrollm_gguf.inspect.verify import verify_file
from entrollm_gguf.quant import quantize_kept, quantize_rows
from entrollm_gguf.quant.base import NotFiniteError

# matrices whose rows llama.cpp's converter leaves in their order
NAMES = {
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def quantize(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 and scales f32 (n_rows, 1) that a bf16 holds."""
    top = 2 ** (bits - 1) - 1
    scale = (weight.float().abs().amax(1, keepdim=True) / top).bfloat16().float()
    return torch.clamp(torch.round(weight.float() / scale), -top - 1, top).to(torch.int8), scale


def packed(codes: torch.Tensor, bits: int, axis: int) -> torch.Tensor:
    """Unsigned codes in words of 32 bits along an axis, the first in the lowest bits."""
    wide = codes.to(torch.int64).movedim(axis, 0)
    words = torch.zeros(wide.shape[0] * bits // 32, *wide.shape[1:], dtype=torch.int64)
    for i in range(32 // bits):
        words |= wide[i :: 32 // bits] << bits * i
    return words.to(torch.int32).movedim(0, axis).contiguous()


def int_quantized(name: str, codes: torch.Tensor, scale: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
    """W8A8 of compressed-tensors."""
    return {f"{name}.weight": codes, f"{name}.weight_scale": scale.bfloat16()}


def pack_quantized(name: str, codes: torch.Tensor, scale: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
    """W8A16 and W4A16 of compressed-tensors."""
    words = packed(codes.to(torch.int64) + 2 ** (bits - 1), bits, 1)
    return {f"{name}.weight_packed": words, f"{name}.weight_scale": scale.bfloat16(), f"{name}.weight_shape": torch.tensor(codes.shape)}


def gptq(name: str, codes: torch.Tensor, scale: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
    """GPTQ with group size -1: columns are inputs last, zeros are stored less 1."""
    n_rows, n_cols = codes.shape
    zeros = torch.full((1, n_rows), 2 ** (bits - 1) - 1, dtype=torch.int64)
    return {
        f"{name}.qweight": packed(codes.T.to(torch.int64) + 2 ** (bits - 1), bits, 0),
        f"{name}.qzeros": packed(zeros, bits, 1),
        f"{name}.scales": scale.T.contiguous().half(),
        f"{name}.g_idx": torch.zeros(n_cols, dtype=torch.int32),
    }


def compressed(fmt: str, bits: int) -> dict:
    weights = {"num_bits": bits, "type": "int", "strategy": "channel", "symmetric": True, "group_size": None}
    return {"quant_method": "compressed-tensors", "format": fmt, "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


FORMATS = {
    "W8A8": (int_quantized, 8, compressed("int-quantized", 8)),
    "W8A16": (pack_quantized, 8, compressed("pack-quantized", 8)),
    "W4A16": (pack_quantized, 4, compressed("pack-quantized", 4)),
    "GPTQ-8": (gptq, 8, {"quant_method": "gptq", "bits": 8, "group_size": -1, "desc_act": False, "sym": True}),
    "GPTQ-4": (gptq, 4, {"quant_method": "gptq", "bits": 4, "group_size": -1, "desc_act": False, "sym": True}),
}


@pytest.fixture
def make(tiny_model, tmp_path):
    """Function: name of FORMATS -> (folder, codes and scales by module)."""

    def get(name: str) -> tuple[Path, dict]:
        store, bits, config = FORMATS[name]
        folder = shutil.copytree(tiny_model("mistral").folder, tmp_path / "in")
        weights = load_file(folder / "model.safetensors")
        known, new = {}, {}
        for key, weight in weights.items():
            if "_proj.weight" not in key:
                new[key] = weight
                continue
            module = key.removesuffix(".weight")
            known[module] = quantize(weight, bits)
            new |= store(module, *known[module], bits)
        save_file(new, folder / "model.safetensors", metadata={"format": "pt"})
        data = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**data, "quantization_config": config}))
        return folder, known

    return get


@pytest.mark.parametrize("name", FORMATS)
def test_codes_are_kept(make, tmp_path, capsys, name):
    folder, known = make(name)
    out = tmp_path / "out.gguf"
    assert main(["convert", str(folder), str(out)]) == 0
    assert "by bit, with their scales" in " ".join(capsys.readouterr().out.split())
    assert verify_file(out).problems == ()
    assert open_model(out).text("entrollm.recipe") == DEFAULT_FOR_INTEGERS
    tensors = {one.name: one for one in open_model(out).tensors()}
    kind = EntropyType.EQ4 if FORMATS[name][1] == 4 else EntropyType.EQ8
    for layer in range(2):
        for module, part in NAMES.items():
            codes = known[f"model.layers.{layer}.{module}"][0]
            one = tensors[f"blk.{layer}.{part}.weight"]
            payload = Payload(one.kind, one.data, one.shape, one.name)
            assert one.kind is kind and np.array_equal(payload.codes(), codes.numpy()), one.name
        # their rows in another order
        for module, part in (("self_attn.q_proj", "attn_q"), ("self_attn.k_proj", "attn_k")):
            codes, one = known[f"model.layers.{layer}.{module}"][0].numpy(), tensors[f"blk.{layer}.{part}.weight"]
            ours = Payload(one.kind, one.data, one.shape, one.name).codes()
            assert sorted(map(bytes, ours)) == sorted(map(bytes, codes)), one.name


def test_groups_are_quantized_again(make, tmp_path):
    """GPTQ in groups: the user is told, and the recipe is that of other models."""
    folder, _ = make("GPTQ-4")
    data = json.loads((folder / "config.json").read_text())
    data["quantization_config"]["group_size"] = 128
    (folder / "config.json").write_text(json.dumps(data))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        report = convert_model(folder, tmp_path / "out.gguf")
    assert report.recipe == DEFAULT_RECIPE
    assert report.bits_before == 8 * (folder / "model.safetensors").stat().st_size / report.n_weights
    assert all(0 < record.added_error < 0.01 for record in report.coded())
    assert any(issubclass(one.category, ConversionWarning) and "a scale for each group" in str(one.message) for one in said)


def test_what_the_weights_show(rng):
    codes = rng.integers(-127, 128, (6, 96)).astype(np.int8)
    scales = np.array([0.01, 1e-3, 0.5, 0.02, 3.0, 0.1], np.float32).astype(np.float16)
    weights = codes * scales.astype(np.float32)[:, None]
    weights[3] = 0
    found = quantize_kept(weights, EntropyType.EQ8)
    assert found.scheme == "as-in-checkpoint" and found.kind is EntropyType.EQ8 and found.scale_error == 0
    assert np.array_equal(found.codes[[0, 1, 2, 4, 5]], codes[[0, 1, 2, 4, 5]]) and not found.codes[3].any()
    assert np.array_equal(found.codes * found.scales.reshape(-1, 1).astype(np.float32), weights)
    # scales in f32 are rounded, and the report says so
    odd = codes * np.float32(0.0123456)
    rounded = quantize_kept(odd, EntropyType.EQ8)
    assert np.array_equal(rounded.codes, codes) and 0 < rounded.scale_error <= 2.0**-11
    # codes of which none is 1: multiples of the smallest
    sparse = (rng.integers(2, 6, (4, 64)) * np.float32(0.25)).astype(np.float32)
    assert np.array_equal(
        quantize_kept(sparse, EntropyType.EQ8).codes * quantize_kept(sparse, EntropyType.EQ8).scales.reshape(-1, 1), sparse
    )
    # one weight off the grid, or none on it
    off = weights.copy()
    off[5, 7] += np.float32(0.03)
    for other in (off, rng.standard_normal((6, 96)).astype(np.float32)):
        kept, rows = quantize_kept(other, EntropyType.EQ8), quantize_rows(other, EntropyType.EQ8)
        assert kept.scheme == rows.scheme and np.array_equal(kept.codes, rows.codes)
    # scales that a subnormal f16 would round by more
    assert quantize_kept(codes * np.float32(3e-7), EntropyType.EQ8).scheme != "as-in-checkpoint"
    off[0, 0] = np.nan
    with pytest.raises(NotFiniteError):
        quantize_kept(off, EntropyType.EQ8)
