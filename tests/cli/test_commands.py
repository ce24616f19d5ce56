# SPDX-License-Identifier: MIT
"""The commands as a user meets them: help, JSON, exit codes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml
from rewriting import key, rewrite, text

import entrollm_gguf
from entrollm_gguf import codec
from entrollm_gguf.cli import _COMMANDS, main
from entrollm_gguf.convert.recipes import RECIPES
from entrollm_gguf.gguf_io.patched import import_gguf
from entrollm_gguf.gguf_io.reader import open_model
from entrollm_gguf.inspect.card import card_of
from entrollm_gguf.inspect.report import inspect_file


def test_help_of_every_command(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in _COMMANDS:
        assert name in text
        assert main([name, "--help"]) == 0
        page = capsys.readouterr().out
        assert page.startswith("Usage: entrollm") and len(page.splitlines()) > 5
    main(["runtime", "--help"])
    assert "..." not in capsys.readouterr().out.partition("Commands:")[2]  # lines that click cut
    for sub in ("build", "info", "check", "tree", "export"):
        assert main(["runtime", sub, "--help"]) == 0


def test_every_export_is_there():
    for name in entrollm_gguf.__all__:
        assert getattr(entrollm_gguf, name)
    assert {"Calibration", "convert_model", "plot_file", "run_demo"} <= set(entrollm_gguf.__all__)


def test_recipes_have_whole_sentences():
    for recipe in RECIPES.values():
        assert recipe.summary == recipe.summary.strip(" ,;"), recipe.name


def test_top_level_help_imports_nothing_heavy():
    code = "import sys; from entrollm_gguf.cli import main; main(['--help']); sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert time.monotonic() - started < 20


def test_wrong_usage():
    assert main(["no-such-command"]) == 2
    assert main(["convert", "only-one-argument"]) == 2
    assert main(["convert", "a", "b", "--threads", "0"]) == 2


def test_inspect(converted, capsys):
    path = converted("qwen2_moe", "EQ8-mixed")
    assert main(["inspect", str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["recipe"] == "EQ8-mixed" and report["n_bytes"] == path.stat().st_size
    coded = [t for t in report["tensors"] if t["type"] == "EQ8"]
    assert sum(t["n_bytes"] for t in coded) * 8 / report["coded_n_weights"] == pytest.approx(report["coded_bits_per_weight"])
    for tensor in coded:
        assert 0 < tensor["entropy"] < tensor["bits_per_weight"]
        assert tensor["decodes_to"] in ("Q8_0", "F16") and tensor["scheme"] in ("symmetric", "asymmetric", "symmetric-unsigned")
        assert 1 <= tensor["raw_bits"] <= 8 and 0 <= tensor["far_percent"] <= tensor["tail_percent"] < 75
        assert (tensor["tail_planes"] == 0) == (tensor["raw_bits"] == 8)
    assert report["coded_device_bytes"] == sum(t["device_bytes"] for t in coded)
    assert 0.8 < report["coded_device_bytes"] / report["coded_bytes"] < 1.5
    stock = next(t for t in report["tensors"] if t["type"] == "F32")
    assert stock["raw_bits"] is None and stock["device_bytes"] is None
    assert main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    assert "blk.0.ffn_gate_exps.weight" in text and "entropy" in text
    assert "raw bits" in text and "far %" in text and "on a GPU" in text


def test_what_inspect_counts_is_what_the_file_holds(converted, capsys):
    """Raw bits, tails and far bytes add up to the bits per weight, except for the container."""
    from entrollm_gguf.codec import Payload

    path = converted("llama", "EQ8-mixed")
    assert main(["inspect", str(path), "--json"]) == 0
    told = {t["name"]: t for t in json.loads(capsys.readouterr().out)["tensors"]}
    for entry in open_model(path).tensors():
        if entry.kind is None:
            continue
        payload = Payload(entry.kind, entry.data, entry.shape, entry.name)
        (code,), counts = payload.code_parameters(), payload.counts()[0]
        bits = float(counts @ code.lengths()) / entry.n_elements
        assert told[entry.name]["entropy"] <= bits <= told[entry.name]["bits_per_weight"]
        assert told[entry.name]["raw_bits"] + told[entry.name]["far_percent"] / 100 * (code.n_planes + 8) <= bits + 1e-9


def test_verify_and_decode(converted, tmp_path, capsys):
    path = converted("mistral", "EQ4-mixed")
    assert main(["verify", str(path)]) == 0
    assert "sound" in capsys.readouterr().out
    plain = tmp_path / "plain.gguf"
    assert main(["decode", str(path), str(plain)]) == 0
    assert "decoded" in capsys.readouterr().out
    assert main(["decode", str(path), str(plain)]) == 1
    assert "--force" in capsys.readouterr().err
    assert main(["decode", str(path), str(path), "--force"]) == 1
    assert "same file" in capsys.readouterr().err
    assert main(["decode", str(plain), str(tmp_path / "again.gguf")]) == 1
    assert "nothing to decode" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plain.gguf"]
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(path.read_bytes()[:-1])
    assert main(["verify", str(cut)]) == 1
    assert "cut.gguf" in capsys.readouterr().err


def test_a_model_card(converted, tmp_path, capsys):
    path, card = str(converted("qwen2_moe", "EQ8-mixed")), tmp_path / "README.md"
    assert main(["inspect", path, "--card", str(card)]) == 0
    page = card.read_text(encoding="utf-8")
    front = yaml.safe_load(page.split("---")[1])
    assert front["library_name"] == "gguf" and "entropy-coded" in front["tags"]
    assert "EQ8-mixed" in page and os.path.basename(path) in page and "entrollm decode" in page
    assert main(["inspect", path, "--card", str(card)]) == 1  # not replaced
    assert main(["inspect", path, "--card", str(card), "--force"]) == 0
    capsys.readouterr()
    assert main(["inspect", path, "--card", str(tmp_path / "model.gguf")]) == 1
    assert "is an .md file" in capsys.readouterr().err
    plain = tmp_path / "plain.gguf"
    assert main(["decode", path, str(plain)]) == 0
    assert main(["inspect", str(plain), "--card", str(tmp_path / "b.md")]) == 1
    assert "no entropy-coded tensors" in capsys.readouterr().err and not (tmp_path / "b.md").exists()


def test_what_a_card_takes_from_the_file(tmp_path):
    """Names of the model and of its source take one line each, whatever the file says."""
    gguf = import_gguf()
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("A | name\nof two lines")
    writer.add_license("apache-2.0")
    writer.add_base_model_count(1)
    writer.add_base_model_repo_url(0, "https://huggingface.co/owner/base")
    weights = np.tile(np.arange(-32, 32, dtype=np.int8), (16, 1))
    encoded = codec.encode(codec.EntropyType.EQ8, weights, np.ones(1, np.float16), name="a.weight")
    writer.add_tensor("a.weight", encoded.payload, raw_shape=weights.shape, raw_dtype=gguf.GGMLQuantizationType.EQ8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    page = card_of(open_model(path), inspect_file(path))
    front = yaml.safe_load(page.split("---")[1])
    assert front["base_model"] == ["owner/base"] and front["license"] == "apache-2.0"
    assert "# A / name of two lines" in page


def test_plot(converted, tmp_path, capsys):
    path, picture = str(converted("llama", "EQ8-mixed")), tmp_path / "out.png"
    assert main(["inspect", path, "--plot", str(picture)]) == 0
    assert "ffn_down" in capsys.readouterr().err
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000
    assert main(["inspect", path, "--plot", str(picture)]) == 1
    assert "--force" in capsys.readouterr().err
    moe, drawing = str(converted("qwen2_moe", "EQ4-mixed")), tmp_path / "out.svg"
    assert main(["inspect", moe, "--plot", str(drawing), "--plot-tensor", "blk.1.ffn_up_exps.weight"]) == 0
    assert "<svg" in drawing.read_text()
    for more, reason in (
        (["--plot", str(tmp_path / "out.txt")], ".png"),
        (["--plot", str(tmp_path / "b.png"), "--plot-tensor", "x"], "no entropy-coded tensor x"),
    ):
        assert main(["inspect", path, *more]) == 1
        assert reason in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.png", "out.svg"]


@pytest.mark.parametrize("command", ["inspect", "verify", "chat"])
def test_missing_and_foreign_files(command, tmp_path, capsys):
    more = ["--prompt", "hi"] if command == "chat" else []
    assert main([command, str(tmp_path / "none.gguf"), *more]) == 1
    assert "none.gguf: no such file" in capsys.readouterr().err
    foreign = tmp_path / "foreign.gguf"
    foreign.write_bytes(b"not a model" * 100)
    assert main([command, str(foreign), *more]) == 1
    assert "foreign.gguf" in capsys.readouterr().err


def test_perplexity(converted, text_file, tmp_path, capsys):
    path = converted("llama", "EQ8-mixed")
    arguments = ["perplexity", str(path), "--text", str(text_file), "--ctx", "128", "--chunks", "4"]
    assert main([*arguments, "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert alone["ppl"] > 1 and alone["kld_mean"] is None
    assert main([*arguments, "--reference", str(converted("llama", "EQ4-mixed")), "--json"]) == 0
    compared = json.loads(capsys.readouterr().out)
    assert compared["ppl"] == pytest.approx(alone["ppl"], rel=1e-3)
    assert compared["kld_mean"] > 0 and 0 <= compared["same_top_percent"] < 100
    assert main([*arguments]) == 0
    assert capsys.readouterr().out.startswith("perplexity")
    short = tmp_path / "short.txt"
    short.write_text("too short")
    assert main(["perplexity", str(path), "--text", str(short)]) == 1
    assert "entrollm: error:" in capsys.readouterr().err
    assert main(["perplexity", str(path), "--text", str(tmp_path / "none.txt")]) == 1
    assert "none.txt" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content, reason",
    [
        ("A few words.".encode("utf-16"), "UTF-8"),
        ("A few words.".encode("utf-16-le"), "UTF-8"),
        ("caf\u00e9 au lait".encode("latin-1"), "UTF-8"),
        (b"\x7fELF\x02\x01\x00", "UTF-8"),
        (b" \n", "empty"),
    ],
    ids=["utf-16", "utf-16-le", "latin-1", "binary", "blank"],
)
def test_one_rule_for_texts(converted, tiny_model, tmp_path, content, reason, capsys):
    """Perplexity and calibration accept the same texts."""
    odd, out = tmp_path / "odd.txt", tmp_path / "out.gguf"
    odd.write_bytes(content)
    for command in (
        ["perplexity", str(converted("mistral", "EQ8-mixed")), "--text", str(odd)],
        ["convert", str(tiny_model("mistral").folder), str(out), "--bits", "4", "--calibration", str(odd)],
    ):
        assert main(command) == 1
        error = capsys.readouterr().err
        assert "odd.txt" in error and reason in error and "Traceback" not in error
    assert not out.exists()


def test_perplexity_of_odd_paths_in_any_locale(converted, text_file, tmp_path):
    """The tools' output has letters beyond ASCII, and so have the names."""
    folder = tmp_path / "odd {x} %s \u00e9"
    folder.mkdir()
    reference, text = folder / "100%n.gguf", folder / "text %d.txt"
    shutil.copy(converted("mistral", "EQ4-mixed"), reference)
    shutil.copy(text_file, text)
    model = converted("mistral", "EQ8-mixed")
    command = [sys.executable, "-m", "entrollm_gguf.cli", "perplexity", model, "--text", text, "--reference", reference]
    environment = {**os.environ, "LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    result = subprocess.run([*command, "--ctx", "128", "--chunks", "2", "--json"], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["kld_mean"] > 0


def test_too_few_tokens_for_a_divergence(converted, text_file, capsys):
    path = str(converted("mistral", "EQ8-mixed"))
    assert main(["perplexity", path, "--reference", path, "--text", str(text_file), "--ctx", "64", "--chunks", "2"]) == 1
    assert "fewer than 100 tokens" in capsys.readouterr().err


def test_perplexity_that_is_no_number(converted, text_file, tmp_path, capsys):
    sound, path = converted("mistral", "EQ8-mixed"), tmp_path / "nan.gguf"
    norm = next(t for t in open_model(sound).tensors() if t.name == "output_norm.weight")
    data, at = sound.read_bytes(), int(norm.reader_tensor.data_offset)
    path.write_bytes(data[:at] + b"\xff" * norm.n_bytes + data[at + norm.n_bytes :])
    arguments = ["perplexity", str(path), "--text", str(text_file), "--ctx", "128", "--chunks", "2"]
    for more in ([], ["--reference", str(sound)]):
        assert main([*arguments, *more]) == 1
        assert "nan.gguf: has no perplexity" in capsys.readouterr().err


@pytest.mark.parametrize(
    "architecture, extra",
    [("t5", []), ("bert", [key("bert.attention.causal", 7, b"\0")]), ("llama", [key("llama.attention.causal", 7, b"\0")])],
)
def test_perplexity_without_a_next_token(converted, text_file, tmp_path, architecture, extra, capsys):
    keys = [key("general.architecture", 8, text(architecture)), *extra]
    path = rewrite(converted("mistral", "EQ8-mixed"), tmp_path / "other.gguf", keys=keys, without="general.architecture")
    for arguments in ([str(path)], [str(converted("mistral", "EQ8-mixed")), "--reference", str(path)]):
        assert main(["perplexity", *arguments, "--text", str(text_file)]) == 1
        error = capsys.readouterr().err
        assert "other.gguf" in error and f"{architecture} models do not predict the next token" in error


def test_chat_one_question(converted, capsys):
    assert main(["chat", str(converted("llama", "EQ8-mixed")), "--prompt", "hello", "--max-tokens", "4"]) == 0


@pytest.mark.parametrize(
    "template, more, reason",
    [
        ("{{- if .System }}{{ .System }}{{ end }}", [], "chat template"),
        ("{% do messages.append(1) %}{{ messages[0].content }}", [], "'do'"),
        ("{{ now(messages) }}", [], "'now' is undefined"),
        ("{{ messages[0].content + 1 }}", [], "chat template"),
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('No system') }}{% endif %}hi",
            ["--system", "be brief"],
            "leave out the system",
        ),
    ],
)
def test_chat_templates_that_fail(converted, tmp_path, template, more, reason, capsys):
    keys = [key("tokenizer.chat_template", 8, text(template))]
    path = rewrite(converted("mistral", "EQ8-mixed"), tmp_path / "odd.gguf", keys=keys)
    assert main(["chat", str(path), "--prompt", "hi", "--max-tokens", "2", "--ctx", "128", *more]) == 1
    told = capsys.readouterr()
    error = told.err.strip().splitlines()[-1]
    assert error.startswith("entrollm: error: ") and "odd.gguf" in error and reason in error and "Traceback" not in told.err
    assert not told.out.strip()


def test_chat_with_no_chat_model(converted, tmp_path, capsys):
    path = rewrite(converted("mistral", "EQ8-mixed"), tmp_path / "encoder.gguf", keys=[key("llama.attention.causal", 7, b"\0")])
    assert main(["chat", str(path), "--prompt", "hi"]) == 1
    assert "nothing to chat with" in capsys.readouterr().err


@pytest.mark.parametrize("tokenizer", ["no_vocab", "none"])
def test_a_model_without_a_vocabulary(converted, text_file, tmp_path, tokenizer):
    """llama.cpp aborts where it is given a text: in processes of their own, which end by
    themselves."""
    keys = [key("tokenizer.ggml.model", 8, text(tokenizer))]
    path = rewrite(converted("mistral", "EQ8-mixed"), tmp_path / "mute.gguf", keys=keys, without="tokenizer.ggml.model")
    for command in (["chat", path, "--prompt", "hi", "--ctx", "128"], ["perplexity", path, "--text", text_file]):
        result = subprocess.run([sys.executable, "-m", "entrollm_gguf.cli", *command], capture_output=True, text=True)
        assert result.returncode == 1 and result.stderr.rstrip().splitlines()[-1].startswith(f"entrollm: error: {path}: has no vocabulary")


def test_chat_beyond_the_context(converted, monkeypatch, capsys):
    path = str(converted("mistral", "EQ8-mixed"))
    assert main(["chat", path, "--prompt", "word " * 2000, "--ctx", "128"]) == 1
    assert "longer than the context of" in capsys.readouterr().err
    questions = iter(["word " * 2000, "hi", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(questions))
    assert main(["chat", path, "--max-tokens", "2", "--ctx", "128"]) == 0
    told = capsys.readouterr()
    assert told.err.count("longer than the context") == 1 and told.out.strip()  # the long question is not part of the conversation


def test_runtime_info(capsys):
    assert main(["runtime", "info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["matches_checkout"] is True
    assert "llama-server" in report["programs"] and "test-backend-ops" in report["programs"]
    for tool in ("llama-completion", "llama-cli", "llama-server", "llama-bench", "llama-perplexity", "llama-quantize", "llama-imatrix"):
        assert tool in report["programs"]
