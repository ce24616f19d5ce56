# SPDX-License-Identifier: MIT
"""What is wrong with a model is said before any weight is encoded; what no model needs is left
out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
from safetensors.torch import load_file, save_file

from entrollm_gguf.cli import main
from entrollm_gguf.convert import tensor
from entrollm_gguf.gguf_io.loader import why_not_loaded
from entrollm_gguf.gguf_io.output import atomic_output


@pytest.fixture
def model(tiny_model, tmp_path) -> Path:
    """A copy of a small model that a test may damage."""
    return shutil.copytree(tiny_model("mistral").folder, tmp_path / "in" / "model")


@pytest.fixture
def out(tmp_path) -> Path:
    """An output path in an empty folder."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "model.gguf"


@pytest.fixture
def refused(out, capsys, monkeypatch):
    """Function: a folder -> the one line that refuses it, with nothing encoded and nothing left."""

    def encode(name, *arguments, **keywords):
        raise AssertionError(f"{name} was encoded")

    monkeypatch.setattr(tensor, "encode_tensor", encode)

    def run(folder: Path) -> str:
        assert main(["convert", str(folder), str(out), "--recipe", "EQ8-rows"]) == 1
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("entrollm: error: ")]
        assert os.listdir(out.parent) == []
        return line

    return run


def data_of(path: Path) -> dict[str, bytes]:
    return {t.name: t.data.tobytes() for t in gguf.GGUFReader(path).tensors}


def configure(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, edit) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_layers_without_weights(model, refused):
    configure(model, num_hidden_layers=3)
    assert "config.json says 3 layers, there are weights for 2: blk.2.attn_norm.weight is missing" in refused(model)


@pytest.mark.parametrize(
    "name, gguf_name", [("model.layers.1.mlp.up_proj.weight", "blk.1.ffn_up.weight"), ("model.norm.weight", "output_norm.weight")]
)
def test_a_tensor_is_missing(model, refused, name, gguf_name):
    edit_weights(model, lambda weights: weights.pop(name))
    line = refused(model)
    assert f"{model}: {gguf_name} is missing; download" in line


def test_a_tensor_of_another_shape(model, refused):
    edit_weights(model, lambda weights: weights.update({"model.norm.weight": weights["model.norm.weight"][:-1].clone()}))
    line = refused(model)
    assert str(model) in line and "output_norm.weight" in line and "wrong shape" in line


def test_two_weights_of_one_name(model, refused):
    edit_weights(model, lambda weights: weights.update({"tok_embeddings.weight": weights["model.embed_tokens.weight"].clone()}))
    assert "model.embed_tokens.weight, tok_embeddings.weight all become token_embd.weight" in refused(model)


def test_more_tokens_than_rows(tiny_model, tmp_path, refused):
    folder = shutil.copytree(tiny_model("qwen2").folder, tmp_path / "model")
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    tokenizer["added_tokens"] += [{"id": 49152 + i, "content": f"<x{i}>", **flags} for i in range(8)]
    path.write_text(json.dumps(tokenizer))
    line = refused(folder)
    assert "49160 tokens" in line and "49152 rows" in line and "resize" in line

    tokenizer["added_tokens"] = tokenizer["added_tokens"][:-8]
    tokenizer["pre_tokenizer"]["pretokenizers"][-1]["add_prefix_space"] = True
    path.write_text(json.dumps(tokenizer))
    assert "tokenizer.json: llama.cpp's converter does not know its pre-tokenizer" in refused(folder)


def test_a_damaged_file_that_nothing_reads(model, tmp_path):
    """Beside a whole file, and beside shards with an index."""
    plain = tmp_path / "plain.gguf"
    assert main(["convert", str(model), str(plain), "--recipe", "EQ8-rows"]) == 0
    (model / "consolidated.safetensors").write_bytes(bytes(64))
    assert main(["convert", str(model), str(tmp_path / "beside.gguf"), "--recipe", "EQ8-rows"]) == 0

    weights = load_file(model / "model.safetensors")
    names = sorted(weights)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, held in shards.items():
        save_file({name: weights[name] for name in held}, model / shard, metadata={"format": "pt"})
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (model / "model.safetensors").unlink()
    assert main(["convert", str(model), str(tmp_path / "shards.gguf"), "--recipe", "EQ8-rows"]) == 0

    told = {name: data_of(tmp_path / f"{name}.gguf") for name in ("plain", "beside", "shards")}
    assert told["beside"] == told["plain"] == told["shards"]


def test_fewer_rows_than_the_configuration_says(model, refused):
    edit_weights(
        model,
        lambda weights: weights.update({name: weights[name][:480].clone() for name in ("model.embed_tokens.weight", "lm_head.weight")}),
    )
    line = refused(model)
    assert "500 tokens" in line and "480 rows" in line


def test_no_tokenizer(model, refused):
    (model / "tokenizer.model").unlink()
    assert "has no tokenizer" in refused(model)


@pytest.mark.parametrize("content", ["x", "", "[]"])
def test_damaged_tokenizer_config(model, refused, content):
    (model / "tokenizer_config.json").write_text(content)
    assert f"{model / 'tokenizer_config.json'}: " in refused(model)


@pytest.mark.parametrize("method", ["awq", "bitsandbytes"])
def test_quantized_in_a_way_nobody_can_undo(model, refused, method):
    configure(model, quantization_config={"quant_method": method})
    line = refused(model)
    assert f"quantized by {method}" in line and "convert the model that it was made from" in line


def test_limits_of_the_converter_say_where_they_are(model, refused):
    configure(model, rope_scaling={"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": "many"})
    line = refused(model)
    assert "llama.cpp" in line and str(model) in line


def test_a_model_card_of_no_use(model, out, capsys):
    (model / "README.md").write_bytes(b"---\ntags: [a, b: c\n---\n")
    assert main(["convert", str(model), str(out), "--recipe", "EQ8-rows"]) == 0
    warned = [line for line in capsys.readouterr().err.splitlines() if line.startswith("entrollm: warning: ")]
    assert len(warned) == 1 and "README.md: cannot be read" in warned[0]


def test_unusual_names(model, tmp_path):
    """llama.cpp's converter takes braces for fields; a shell without a locale knows only ASCII."""
    folder = model.rename(model.with_name("odd {x} name %s \u00e9"))
    out = tmp_path / "out \u00e9 {x} {ftype} %s.gguf"
    environment = {**os.environ, "LC_ALL": "C"}
    command = [sys.executable, "-m", "entrollm_gguf.cli", "convert", folder, out, "--recipe", "EQ8-rows"]
    result = subprocess.run(command, capture_output=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert out.is_file() and why_not_loaded(out) is None


def test_another_conversion_to_the_same_output(model, out, capsys):
    with atomic_output(out, False) as temporary:
        assert main(["convert", str(model), str(out), "--recipe", "EQ8-rows", "--force"]) == 1
        assert "is being written by another process" in capsys.readouterr().err
        temporary.write_bytes(b"first")
    assert out.read_bytes() == b"first"
