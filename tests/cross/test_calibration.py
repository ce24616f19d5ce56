# SPDX-License-Identifier: MIT
"""Statistics of tiny models: against what autograd and numpy give by themselves, under GGUF names, from the cache, and what is said when there are none."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from entrollm_gguf import codec, runtime
from entrollm_gguf.calibrate import gather, read_imatrix
from entrollm_gguf.calibrate.gather import CONTEXT, Gathered, ModuleStatistics
from entrollm_gguf.cli import main
from entrollm_gguf.convert.calibrated import to_gguf
from entrollm_gguf.convert.llama_cpp import SourceModel, evaluate
from entrollm_gguf.convert.pipeline import convert_model
from entrollm_gguf.convert.rate import Calibration
from entrollm_gguf.errors import ConversionError, FormatError
from entrollm_gguf.gguf_io.patched import import_gguf
from entrollm_gguf.gguf_io.reader import open_model

gather_module = sys.modules[gather.__module__]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Nothing from earlier runs."""
    monkeypatch.setattr(gather_module, "cache_folder", lambda: tmp_path / "cache")


@pytest.fixture
def text(tmp_path, text_file):
    """A short text."""
    path = tmp_path / "text.txt"
    path.write_text(text_file.read_text(encoding="utf-8")[:40_000], encoding="utf-8")
    return path


def load(folder):
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_against_autograd(tiny_model, text, tmp_path, name):
    """Inputs by hooks of our own; gradients by a bias for every token."""
    import torch

    folder = tiny_model(name).folder
    found = gather(folder, text, n_sequences=2)
    tokens = torch.from_numpy(np.load(next((tmp_path / "cache").rglob("tokens.npy"))))
    assert tokens.shape == (2, CONTEXT) and found.source.endswith(f"2 x {CONTEXT} tokens")
    model = load(folder)
    layer, weight = model.model.layers[1].mlp.down_proj, "model.layers.1.mlp.down_proj.weight"
    seen = []
    layer.register_forward_hook(lambda module, args, output: seen.append(args[0].detach()[0]))
    generator, total = torch.Generator().manual_seed(0), torch.zeros(layer.out_features)
    for sequence in tokens:
        logits = model(sequence[None]).logits[0]
        drawn = torch.multinomial(torch.softmax(logits.detach(), -1), 1, generator=generator)[:, 0]
        # the gradient by the outputs is that by a bias
        bias = torch.nn.Parameter(torch.zeros(CONTEXT, layer.out_features))
        handle = layer.register_forward_hook(lambda module, args, output, bias=bias: output + bias)
        loss = torch.nn.functional.cross_entropy(model(sequence[None]).logits[0], drawn, reduction="sum")
        loss.backward()
        total += bias.grad.square().sum(0)
        handle.remove()
    x = torch.cat([seen[0], seen[2]])  # the runs without the bias
    one = found.modules[weight]
    assert np.allclose(one.columns, x.square().mean(0), rtol=1e-4, atol=1e-9)
    assert np.allclose(np.load(one.hessian), (x.T @ x / len(x)).numpy(), rtol=1e-3, atol=1e-5)
    assert np.allclose(one.rows, total.numpy() / len(x), rtol=1e-2, atol=1e-9)
    # what reads the same input shares its Hessian
    q, k, o = (found.modules[f"model.layers.0.self_attn.{part}_proj.weight"].hessian for part in "qko")
    assert q == k != o
    embedding = found.modules["model.embed_tokens.weight"]
    tied = name == "gemma3"
    assert (embedding.hessian == found.modules["lm_head.weight"].hessian) == tied
    mentioned = np.zeros(len(embedding.rows), bool)
    mentioned[tokens.unique().numpy()] = True
    assert (embedding.rows[mentioned] > 0).all() and (tied or not embedding.rows[~mentioned].any())


def test_rows_and_columns_under_gguf_names(tiny_model, tmp_path):
    """Each weight tells where it stands: llama.cpp's order of rows is not the checkpoint's (rotary halves)."""
    folder = tiny_model("llama").folder
    scratch = tmp_path / "scratch.gguf"
    weights: dict[str, np.ndarray] = {}
    SourceModel(folder, scratch).each_tensor(lambda name, data, _: weights.__setitem__(name, evaluate(data).astype(np.float32)))
    state = load(folder).state_dict()
    hessian = tmp_path / "h.npy"
    modules = {}
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"):
        w = state[name].numpy()
        modules[name] = ModuleStatistics(np.abs(w).mean(axis=0), np.abs(w).mean(axis=1), hessian)
    np.save(hessian, np.diag(modules["model.layers.0.self_attn.q_proj.weight"].columns))
    statistics = to_gguf(Gathered("test", modules), lambda: SourceModel(folder, scratch))
    assert statistics.tensors.keys() == {"blk.0.attn_q.weight", "blk.1.ffn_up.weight"}
    for name, one in statistics.tensors.items():
        assert np.allclose(one.rows[0], np.abs(weights[name]).mean(axis=1), rtol=1e-5)
        assert np.allclose(one.columns[0], np.abs(weights[name]).mean(axis=0), rtol=1e-5)
    changed = np.abs(state["model.layers.0.self_attn.q_proj.weight"].numpy()).mean(axis=1)
    assert not np.allclose(statistics.tensors["blk.0.attn_q.weight"].rows[0], changed)  # the order did change
    assert statistics.tensors["blk.0.attn_q.weight"].hessians == (hessian,)
    assert statistics.tensors["blk.1.ffn_up.weight"].hessians is None  # a Hessian of other inputs
    with pytest.raises(ConversionError, match="names of the weights"):
        to_gguf(Gathered("test", {"other": next(iter(modules.values()))}), lambda: SourceModel(folder, scratch))


def test_experts_are_stacked(tiny_model, text, tmp_path):
    folder = tiny_model("qwen2_moe").folder
    statistics = to_gguf(gather(folder, text, n_sequences=1), lambda: SourceModel(folder, tmp_path / "scratch.gguf"))
    one = statistics.tensors["blk.1.ffn_down_exps.weight"]
    assert one.columns.shape == (4, 96) and one.rows.shape == (4, 64) and len(set(one.hessians)) == 4


def test_experts_that_no_token_came_to(tiny_model, text, tmp_path, monkeypatch):
    """They have no statistics of their own, and are quantized as the others are."""
    import torch

    folder = tiny_model("qwen2_moe").folder
    opened = gather_module._open

    def without_the_last_expert(model_dir):
        model, tokenizer, device = opened(model_dir)
        for layer in model.model.layers:
            layer.mlp.gate.register_forward_hook(lambda module, args, output: output.index_fill(-1, torch.tensor([3]), -1e9))
        return model, tokenizer, device

    monkeypatch.setattr(gather_module, "_open", without_the_last_expert)
    out = tmp_path / "out.gguf"
    report = convert_model(folder, out, bits=5, calibration=Calibration(text=text, n_sequences=1))
    statistics = to_gguf(gather(folder, text, n_sequences=1), lambda: SourceModel(folder, tmp_path / "scratch.gguf"))
    one = statistics.tensors["blk.0.ffn_up_exps.weight"]
    assert not one.columns[3].any() and one.columns[:3].any(axis=1).all()
    scheme = next(t.scheme for t in report.tensors if t.name == "blk.0.ffn_up_exps.weight")
    assert "feedback" in scheme
    coded = next(t for t in open_model(out).tensors() if t.name == "blk.0.ffn_up_exps.weight")
    codes = codec.decode(coded.kind, coded.data, coded.shape)
    assert codes[3].std() > 0.5 * codes[:3].std()


def test_own_text_cache_and_resumption(tiny_model, tmp_path, monkeypatch):
    folder = tiny_model("llama").folder
    monkeypatch.setattr(gather_module, "_GROUP_BYTES", 2_000_000)  # several runs
    runs = []

    class Stopped(Exception):
        pass

    def stop_later(done, total, what):
        runs.append(what)
        if what.startswith("calibrating") and done > total // 2:
            raise Stopped

    with pytest.raises(Stopped):
        gather(folder, None, n_sequences=2, seed=5, progress=stop_later)
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("hessian-*.npy")}
    assert kept and "writing text (sequences)" in runs
    monkeypatch.setattr(gather_module, "_own_text", None)  # the text is there
    resumed = gather(folder, None, n_sequences=2, seed=5)
    assert all(path.stat().st_mtime_ns == kept[path.name] for path in (tmp_path / "cache").rglob("hessian-*.npy") if path.name in kept)
    monkeypatch.setattr(gather_module, "_open", None)  # no model is loaded any more
    again = gather(folder, None, n_sequences=2, seed=5)
    assert again.modules.keys() == resumed.modules.keys()
    monkeypatch.undo()
    monkeypatch.setattr(gather_module, "cache_folder", lambda: tmp_path / "other")
    fresh = gather(folder, None, n_sequences=2, seed=5)  # in one run
    for name, one in fresh.modules.items():
        assert np.allclose(one.columns, resumed.modules[name].columns) and np.allclose(one.rows, resumed.modules[name].rows, rtol=1e-3)
        assert one.hessian is None or np.allclose(np.load(one.hessian), np.load(resumed.modules[name].hessian))


def test_what_cannot_be_calibrated(tiny_model, text, tmp_path, monkeypatch, capsys):
    folder, out = str(tiny_model("llama").folder), str(tmp_path / "out.gguf")
    short = tmp_path / "short.txt"
    short.write_text("A few words.")
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    for arguments, words in (
        (["--bits", "4", "--calibration", str(short)], "tokens"),
        (["--bits", "4", "--calibration", str(binary)], "UTF-8"),
        (["--bits", "4", "--calibration", str(tmp_path / "none")], "none"),
        (["--recipe", "EQ8-paper", "--calibration", str(text)], "fixed grid"),
        (["--recipe", "EQ8-paper", "--dry-run"], "fixed grid"),
        (["--bits", "4", "--calibration", str(text), "--imatrix", str(text)], "not both"),
        (["--bits", "4", "--imatrix", str(text)], "not a GGUF"),
        (["--bits", "4", "--imatrix", str(tmp_path / "none")], "no such file"),
    ):
        assert main(["convert", folder, out, *arguments]) != 0
        error = capsys.readouterr().err
        assert words in error and "Traceback" not in error
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(ConversionError, match="free memory"):
        gather(tiny_model("llama").folder, text)
    monkeypatch.undo()
    assert not (tmp_path / "out.gguf").exists()


def test_imatrix_files(tiny_model, converted, tmp_path, text_file, capsys):
    """Made by llama-imatrix on our own file, read by the converter; experts that no token came to do no harm."""
    source, folder = converted("qwen2_moe", "EQ8-rows"), str(tiny_model("qwen2_moe").folder)
    imatrix = tmp_path / "imatrix.gguf"
    command = [runtime.tool("llama-imatrix"), "-m", source, "-f", text_file, "-o", imatrix, "-c", "64", "--chunks", "3"]
    subprocess.run(command, check=True, capture_output=True)
    statistics = read_imatrix(imatrix)
    assert statistics.tensors["blk.0.ffn_down_exps.weight"].columns.shape == (4, 96)
    assert all(np.isfinite(one.columns).all() for one in statistics.tensors.values())
    out = tmp_path / "out.gguf"
    report = convert_model(folder, out, bits=5, calibration=Calibration(imatrix=imatrix))
    assert 0.99 * 5 <= sum(t.n_bytes for t in report.tensors) * 8 / report.n_weights <= 5
    fields = import_gguf().GGUFReader(out).fields
    assert fields["entrollm.calibration"].contents() == statistics.source and "entrollm.fold_exponent" in fields
    # cut short, and of another model
    (tmp_path / "cut.gguf").write_bytes(imatrix.read_bytes()[:-500])
    with pytest.raises(FormatError, match="cut short"):
        read_imatrix(tmp_path / "cut.gguf")
    with pytest.raises(FormatError, match="no importance values"):
        read_imatrix(source)
    for other, words in (("llama", "another model"), ("gpt2", "another model")):
        assert main(["convert", str(tiny_model(other).folder), str(tmp_path / "x.gguf"), "--bits", "5", "--imatrix", str(imatrix)]) != 0
        assert words in capsys.readouterr().err


def divergence(reference, other) -> float:
    """Mean KL divergence of predictions, from logits, nats."""
    p, q = (x - np.logaddexp.reduce(x.astype(np.float64), axis=1, keepdims=True) for x in (reference, other))
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2"])
def test_calibration_makes_it_better(tiny_model, text, text_file, tmp_path, name):
    """Closer to the float model, on such text, than the same size without; the same bytes each time; the bits that were asked for."""
    import torch
    import transformers
    from running import logits

    folder = tiny_model(name).folder
    ids = transformers.AutoTokenizer.from_pretrained(folder)(text_file.read_text(encoding="utf-8")[50_000:51_000]).input_ids
    tokens = tuple(ids[:48])
    with torch.inference_mode():
        reference = load(folder)(torch.tensor([tokens])).logits[0].numpy()
    errors = {}
    for kind, calibration in (("without", None), ("with", Calibration(text=text, n_sequences=4)), ("again", Calibration(text=text, n_sequences=4))):
        out = tmp_path / f"{kind}.gguf"
        report = convert_model(folder, out, bits=4, calibration=calibration)
        assert 0.985 * 4 <= sum(t.n_bytes for t in report.tensors) * 8 / report.n_weights <= 4
        errors[kind] = divergence(reference, logits(out, tokens)[:, : reference.shape[1]])
    assert errors["with"] < errors["without"]
    assert (tmp_path / "with.gguf").read_bytes() == (tmp_path / "again.gguf").read_bytes()
    assert any("feedback" in t.scheme for t in report.tensors)
