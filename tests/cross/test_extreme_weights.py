# SPDX-License-Identifier: MIT
"""Weights that do not fit f16: every recipe keeps them in a type that holds them, and says so;
file, decoded file, load mode and fused mode agree."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from running import logits

from entrollm_gguf import codec
from entrollm_gguf.cli import main
from entrollm_gguf.codec import EntropyType
from entrollm_gguf.convert.pipeline import convert_model, plan_model
from entrollm_gguf.convert.recipes import RECIPES
from entrollm_gguf.gguf_io.patched import import_gguf
from entrollm_gguf.inspect.decode import decode_file

# What is done to which matrix, by the checkpoint's name and the GGUF's. None of them is permuted on
# its way into the GGUF, and no activation becomes too large for an f16, to which llama.cpp rounds
# those of F16 weights.
_DAMAGE = [
    ("model.layers.0.mlp.down_proj", "blk.0.ffn_down", lambda w: w.__setitem__((3, 7), 1e5)),
    ("model.layers.1.mlp.down_proj", "blk.1.ffn_down", lambda w: w.mul_(1e6)),
    ("model.layers.1.self_attn.o_proj", "blk.1.attn_output", lambda w: w.add_(70_000)),
    ("model.layers.0.self_attn.v_proj", "blk.0.attn_v", lambda w: w.mul_(1e-7)),
    ("lm_head", "output", lambda w: w.add_(1000)),  # an f16 of this size has steps of 0.5
    ("model.layers.0.mlp.up_proj", "blk.0.ffn_up", lambda w: w[::40].mul_(1e-20)),  # a few rows that nobody uses
]


@pytest.fixture(scope="module")
def extreme(tiny_model, tmp_path_factory):
    """A folder with f32 weights, and the matrices in question by GGUF name."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("extreme") / "model"
    shutil.copytree(tiny_model("mistral").folder, folder)
    path = folder / "model.safetensors"
    tensors = {name: weight.float() for name, weight in load_file(path).items()}
    matrices = {}
    for name, gguf_name, damage in _DAMAGE:
        weight = tensors[f"{name}.weight"]
        damage(weight)
        matrices[f"{gguf_name}.weight"] = weight.numpy().copy()
    save_file(tensors, path, metadata={"format": "pt"})
    return folder, matrices


def weights_of(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a plain GGUF, f32."""
    gguf = import_gguf()
    return {t.name: gguf.dequantize(t.data, t.tensor_type).astype(np.float32) for t in gguf.GGUFReader(path).tensors}


def nmse(found: np.ndarray, right: np.ndarray) -> float:
    return float(np.square(found - right, dtype=np.float64).sum() / np.square(right, dtype=np.float64).sum())


@pytest.mark.parametrize("recipe", ["EQ8", "EQ8-4.5", "EQ8-paper", "EQ8-mixed", "EQ8-rows", "EQ4-paper", "EQ4-mixed", "EQ4-rows"])
def test_every_recipe(extreme, tmp_path, recipe):
    folder, matrices = extreme
    out, plain = tmp_path / "out.gguf", tmp_path / "plain.gguf"
    report = convert_model(folder, out, recipe=recipe)
    decode_file(out, plain)
    found = weights_of(plain)
    # 4.5 bits lose half a percent of a row, 4 bits over the range of a matrix a third
    allowed = 0.4 if recipe.startswith("EQ4") else 0.01 if recipe == "EQ8-4.5" else 1e-3
    for name, right in matrices.items():
        assert np.isfinite(found[name]).all() and nmse(found[name], right) < allowed, name
    records = {t.name: t for t in report.tensors}
    small = records["blk.0.attn_v.weight"]
    assert small.type_name == "F32" and "f16" in small.scheme
    assert records["blk.1.ffn_down.weight"].type_name == ("EQ8" if recipe in ("EQ8-mixed", "EQ8-rows") else "F32")
    unused = records["blk.0.ffn_up.weight"]
    assert unused.type_name == RECIPES[recipe].kind.name and unused.coarse_rows == (
        6 if "rows" in unused.scheme or "step" in unused.scheme else 0
    )
    in_file = {mode: logits(out, kv_overrides={"entropy.mode": mode}) for mode in ("load", "fused")}
    assert all(np.isfinite(one).all() for one in in_file.values())
    # weights around 1000 multiply what 8-bit activations lose
    assert nmse(in_file["fused"], in_file["load"]) < 0.05 and nmse(logits(plain), in_file["load"]) < 1e-6


def test_the_plan_and_the_summary_tell(extreme, tmp_path, capsys):
    folder, _ = extreme
    out = tmp_path / "out.gguf"
    planned = {t.name: t for t in plan_model(folder, recipe="EQ8-4.5").tensors}
    assert main(["convert", str(folder), str(out), "--recipe", "EQ8-4.5"]) == 0
    summary = capsys.readouterr().out
    assert "blk.0.attn_v.weight stays F32: an f16 is too coarse for steps of" in summary
    assert "blk.0.ffn_up.weight: 6 of 224 rows have weights too small" in summary
    assert "not coded" in summary and "32.0 bits each" in summary
    written = {t.name: t for t in import_gguf().GGUFReader(out).tensors}
    assert {n: t.type_name for n, t in planned.items()} == {n: t.tensor_type.name for n, t in written.items()}
    assert main(["convert", str(folder), "--recipe", "EQ8-4.5", "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert any(t["scheme"].startswith("kept: an f16") for t in plan["tensors"])


def test_promises_count_what_stays_plain(extreme, tmp_path, capsys):
    """The same model by bits of the whole file: F32 tensors leave less for the rest, and a target
    that is too small is refused, naming the least."""
    folder, _ = extreme
    report = convert_model(folder, tmp_path / "bits.gguf", bits=8)
    assert 7.8 < sum(t.n_bytes for t in report.tensors) * 8 / report.n_weights <= 8
    assert main(["convert", str(folder), str(tmp_path / "small.gguf"), "--bits", "4.5"]) == 1
    assert "the least is" in capsys.readouterr().err and not (tmp_path / "small.gguf").exists()


@pytest.fixture
def overflowing(converted, tmp_path, monkeypatch):
    """A file such as this converter does not make: one offset is so large that weights are infinite
    as F16."""
    source = converted("mistral", "EQ8-paper")
    gguf = import_gguf()
    tensor = next(t for t in gguf.GGUFReader(source).tensors if t.name == "blk.0.ffn_down.weight")
    shape = tuple(int(n) for n in reversed(tensor.shape))
    payload = codec.Payload(EntropyType.EQ8, np.array(tensor.data).reshape(-1), shape)
    scales, offsets = payload.scales_and_offsets()
    changed = codec.encode(EntropyType.EQ8, payload.codes(), scales, offsets + np.float32(70_000), name=tensor.name).payload
    path = tmp_path / "overflowing.gguf"
    data = bytearray(source.read_bytes())
    assert changed.size == tensor.data.nbytes
    data[int(tensor.data_offset) : int(tensor.data_offset) + changed.size] = changed.tobytes()
    path.write_bytes(data)
    return path


def test_a_file_that_would_overflow_is_refused(overflowing, tmp_path, capsys):
    out = tmp_path / "plain.gguf"
    assert main(["decode", str(overflowing), str(out)]) == 1
    error = capsys.readouterr().err
    assert "blk.0.ffn_down.weight" in error and "infinite as F16" in error and "fused" in error
    assert not out.exists()
    assert main(["verify", str(overflowing)]) == 1
    assert np.isfinite(logits(overflowing, kv_overrides={"entropy.mode": "fused"})).all()
