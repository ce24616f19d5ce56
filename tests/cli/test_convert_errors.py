# SPDX-License-Identifier: MIT
"""Bad input and bad luck: one clear line that names the culprit, a non-zero exit code, nothing left
behind."""

from __future__ import annotations

import errno
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from entrollm_gguf.cli import _terminated_like_ctrl_c, main
from entrollm_gguf.convert import tensor
from entrollm_gguf.convert.encode import Unquantizable
from entrollm_gguf.errors import ConversionError
from entrollm_gguf.gguf_io.output import SpillFile

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def model(tiny_model, tmp_path) -> Path:
    """A copy of a small model that a test may damage, alone in its folder."""
    folder = tmp_path / "in" / "model"
    shutil.copytree(tiny_model("mistral").folder, folder)
    return folder


@pytest.fixture
def out(tmp_path) -> Path:
    """An output path in an empty folder."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder / "model.gguf"


def expect_error(capsys, arguments: list, *parts: str, code: int = 1) -> str:
    """Run the command line; check exit code and that it complains in one line with all parts."""
    assert main([str(a) for a in arguments]) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("entrollm: error:")]
    assert len(lines) == 1
    for part in parts:
        assert part in lines[0], lines[0]
    return lines[0]


def nothing_left(out: Path) -> bool:
    return list(out.parent.iterdir()) == []


def damage_weights(model: Path, tensor_part: str, value: float) -> str:
    """Put a value into one tensor; returns the tensor's GGUF name."""
    import torch
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    path = model / "model.safetensors"
    tensors = load_torch(path)
    name = next(n for n in tensors if tensor_part in n)
    tensors[name].view(-1)[5] = torch.tensor(value)
    save_torch(tensors, path)
    return name


def test_success_leaves_one_file(model, out, capsys):
    assert main(["convert", str(model), str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["file_bytes"] == out.stat().st_size
    assert list(out.parent.iterdir()) == [out]
    assert report["coded_bits_per_weight"] > report["entropy_bits_per_weight"] > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part, gguf_name", [("layers.1.mlp.down_proj", "blk.1.ffn_down.weight"), ("embed_tokens", "token_embd.weight")])
def test_not_finite_weights(model, out, capsys, value, part, gguf_name):
    damage_weights(model, part, value)
    expect_error(capsys, ["convert", model, out], gguf_name, "NaN")
    assert nothing_left(out)


@pytest.mark.parametrize("value, said", [(float("nan"), "NaN"), (float("-inf"), "infinite")])
def test_not_finite_norms(model, out, capsys, value, said):
    damage_weights(model, "layers.0.input_layernorm", value)
    expect_error(capsys, ["convert", model, out], "blk.0.attn_norm.weight", said)
    assert nothing_left(out)


def test_infinities_are_legal_in_masks_alone():
    data = np.array([0, -np.inf], np.float32)
    _, record, _ = tensor._as_is("rope_factors.weight", data, None)
    assert record.n_bytes == data.nbytes
    for name in ("blk.0.attn_q.bias", "blk.0.attn_q_norm.weight", "output_norm.bias"):
        with pytest.raises(ConversionError, match=rf"{name}.*infinite"):
            tensor._as_is(name, data, None)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_truncated_safetensors(model, out, capsys, keep):
    path = model / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    expect_error(capsys, ["convert", model, out], "model.safetensors", "download")
    assert nothing_left(out)


def test_missing_weights(model, out, capsys):
    (model / "model.safetensors").unlink()
    expect_error(capsys, ["convert", model, out], str(model))
    assert nothing_left(out)


def test_missing_part_of_a_sharded_checkpoint(model, out, capsys):
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model.safetensors", "lm_head.weight": "model-2.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    expect_error(capsys, ["convert", model, out], str(model))
    assert nothing_left(out)


def test_unknown_architecture(model, out, capsys):
    config = json.loads((model / "config.json").read_text())
    config["architectures"] = ["NoSuchForCausalLM"]
    (model / "config.json").write_text(json.dumps(config))
    expect_error(capsys, ["convert", model, out], "NoSuchForCausalLM", "not known")
    assert nothing_left(out)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_damaged_config(model, out, capsys, text):
    (model / "config.json").write_text(text)
    expect_error(capsys, ["convert", model, out], str(model))
    assert nothing_left(out)


def test_no_model_folder(tmp_path, out, capsys):
    expect_error(capsys, ["convert", tmp_path / "nowhere", out], "nowhere", "no such folder")
    expect_error(capsys, ["convert", tmp_path, out], "config.json")
    assert nothing_left(out)


def test_missing_tokenizer(model, out, capsys):
    (model / "tokenizer.model").unlink()
    (model / "tokenizer_config.json").unlink()
    expect_error(capsys, ["convert", model, out], str(model))
    assert nothing_left(out)


def test_existing_output(model, out, capsys):
    out.write_bytes(b"mine")
    expect_error(capsys, ["convert", model, out], str(out), "--force")
    assert out.read_bytes() == b"mine"
    damage_weights(model, "embed_tokens", float("nan"))
    expect_error(capsys, ["convert", model, out, "--force"], "NaN")
    assert out.read_bytes() == b"mine"  # a failure does not replace a good file
    assert list(out.parent.iterdir()) == [out]


def test_force_replaces(model, out, capsys):
    out.write_bytes(b"mine")
    assert main(["convert", str(model), str(out), "--force"]) == 0
    assert out.read_bytes()[:4] == b"GGUF"


def test_output_folder_is_missing(model, tmp_path, capsys):
    expect_error(capsys, ["convert", model, tmp_path / "none" / "a.gguf"], "none", "create it")
    expect_error(capsys, ["convert", model, tmp_path], str(tmp_path), "folder")


def test_unknown_recipe(model, out, capsys):
    expect_error(capsys, ["convert", model, out, "--recipe", "EQ9"], "EQ9", "EQ8-paper")
    assert nothing_left(out)


def test_full_disk(model, out, capsys, monkeypatch):
    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SpillFile, "append", full)
    expect_error(capsys, ["convert", model, out], str(out), "no space left")
    assert nothing_left(out)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounting needs root")
def test_really_full_disk(model, tmp_path, capsys):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", small], capture_output=True).returncode != 0:
        pytest.skip("cannot mount a tmpfs here")
    try:
        expect_error(capsys, ["convert", model, small / "a.gguf"], "a.gguf", "no space left")
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", small], check=True)


@pytest.mark.parametrize(
    "number, said", [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "ended by SIGTERM"), (signal.SIGHUP, "ended by SIGHUP")]
)
def test_signals(tiny_model, out, number, said):
    """A real signal in the middle of a conversion: nothing half-written stays, an older output
    does."""
    out.write_bytes(b"mine")
    slow = (
        "import sys, time\n"
        "import entrollm_gguf.convert.tensor as p\n"
        "encode = p.encode_tensor\n"
        "def waiting(*a, **k):\n    print('encoding', flush=True)\n    time.sleep(1)\n    return encode(*a, **k)\n"
        "p.encode_tensor = waiting\n"
        "from entrollm_gguf.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", slow, "convert", str(tiny_model("mistral").folder), str(out), "--recipe", "EQ8-rows", "--force"]

    # a test run in the background of a shell inherits an ignored SIGINT, one under nohup an ignored
    # SIGHUP
    listen = functools.partial(signal.signal, number, signal.SIG_DFL)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, **pipes, text=True, cwd=REPOSITORY, preexec_fn=listen)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("encoding")  # two threads may print at once
    time.sleep(0.2)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert f"entrollm: error: {said}" in errors and "Traceback" not in errors
    assert list(out.parent.iterdir()) == [out] and out.read_bytes() == b"mine"


def test_which_signals_are_handled():
    """SIGHUP is handled like SIGTERM, except where it is ignored (nohup)."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with pytest.raises(KeyboardInterrupt), _terminated_like_ctrl_c() as received:
            signal.raise_signal(signal.SIGHUP)
        assert received == [signal.SIGHUP] and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with _terminated_like_ctrl_c():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_weights_too_large_for_the_grid_stay_plain(model, out, monkeypatch, capsys):
    def refuse(name, *arguments, **keywords):
        raise Unquantizable("the weights are too large for an f16 scale")

    monkeypatch.setattr(tensor, "encode_tensor", refuse)
    assert main(["convert", str(model), str(out), "--recipe", "EQ8-rows"]) == 0
    assert "token_embd.weight stays BF16: the weights are too large" in capsys.readouterr().out


def test_odd_widths_stay_plain(tmp_path, out, smollm2_hf, capsys, monkeypatch):
    import models

    config, model_class, tokenizer, arguments = models._SPECS["mistral"]
    odd = {**arguments, "intermediate_size": 100}
    monkeypatch.setitem(models._SPECS, "odd", (config, model_class, tokenizer, odd))
    folder = tmp_path / "odd"
    models.build_tiny_model("odd", folder, smollm2_hf)
    assert main(["convert", str(folder), str(out)]) == 0
    summary = capsys.readouterr().out
    assert "blk.0.ffn_down.weight stays BF16: 100 columns are no multiple of 32" in summary
    assert "not coded" in summary and "16.0 bits each" in summary
    from running import logits

    assert np.isfinite(logits(out)).all()


def test_convert_script_is_the_command(model, out):
    command = [sys.executable, str(REPOSITORY / "convert.py"), str(model), str(out), "--recipe", "eq4-paper"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "EQ4-paper" in result.stdout and out.is_file()
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 1 and "--force" in again.stderr


def test_f16_and_f32_checkpoints_keep_their_precision(tmp_path, smollm2_hf, out):
    """The grid is laid over the weights as they are, not over their bf16 rounding."""
    import models

    from entrollm_gguf import codec
    from entrollm_gguf.gguf_io.reader import open_model

    folder = tmp_path / "f32"
    models.build_tiny_model("mistral", folder, smollm2_hf, dtype="float32")
    weights = load_file(folder / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    assert main(["convert", str(folder), str(out), "--recipe", "EQ8-paper"]) == 0
    entry = next(t for t in open_model(out).tensors() if t.name == "blk.0.ffn_down.weight")
    payload = codec.Payload(entry.kind, entry.data, entry.shape)
    codes = payload.codes()
    scales, offsets = payload.scales_and_offsets()
    error = np.abs(codes * np.float32(scales[0, 0]) + offsets[0, 0] - weights)
    assert error.max() <= 0.5001 * float(scales[0, 0])
