# SPDX-License-Identifier: MIT
"""`entrollm convert --bits` and `--size`: the size that is asked for comes out, from below, and a
plan predicts it."""

from __future__ import annotations

import json

import pytest

from entrollm_gguf.cli import main
from entrollm_gguf.convert import pipeline
from entrollm_gguf.convert.cli import SizeType
from entrollm_gguf.convert.recipes import DEFAULT_RECIPE, RECIPES
from entrollm_gguf.gguf_io.patched import import_gguf


def tensor_bits(report) -> float:
    return sum(t.n_bytes for t in report.tensors) * 8 / report.n_weights


@pytest.mark.parametrize("architecture, bits", [("llama", 4.25), ("llama", 6.5), ("qwen2_moe", 3.5)])
def test_bits_are_met_from_below(tiny_model, tmp_path, architecture, bits):
    folder = tiny_model(architecture).folder
    report = pipeline.convert_model(folder, tmp_path / "a.gguf", bits=bits)
    assert 0.99 * bits <= tensor_bits(report) <= bits
    assert {t.scheme[:5] for t in report.coded()} == {"step-"}
    again = pipeline.convert_model(folder, tmp_path / "b.gguf", bits=bits)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes() and again.recipe == "EQ8-rate"


def test_size_is_met_from_below(tiny_model, tmp_path, capsys):
    folder = str(tiny_model("llama").folder)
    out = tmp_path / "out.gguf"
    wanted = 3_200_000
    assert main(["convert", folder, str(out), "--size", "3.2MB"]) == 0
    size = out.stat().st_size
    assert 0.985 * wanted < size <= wanted
    capsys.readouterr()
    assert main(["convert", folder, "--size", "3200000", "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["file_bytes"] == pytest.approx(size, rel=0.01)
    written = {tensor.name: tensor.n_bytes for tensor in import_gguf().GGUFReader(out).tensors}
    planned = {tensor["name"]: tensor["n_bytes"] for tensor in plan["tensors"]}
    assert planned.keys() == written.keys()
    assert all(planned[name] == pytest.approx(n_bytes, rel=0.05) for name, n_bytes in written.items())
    assert main(["convert", folder, "--size", "3.2MB", "--dry-run"]) == 0
    assert "blk.0.attn_q.weight" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [out]


def test_what_cannot_be_met(tiny_model, tmp_path, capsys):
    folder, out = str(tiny_model("llama").folder), str(tmp_path / "out.gguf")
    for arguments, words in (
        (["--bits", "1.05"], "too small"),
        (["--size", "100kB"], "too small"),
        (["--bits", "4", "--size", "1MB"], "not both"),
        (["--bits", "4", "--recipe", "EQ8-4.0"], "each says how large"),
        (["--bits", "9"], "9"),
        (["--size", "much"], "is no size"),
        (["--dry-run", "--recipe", "EQ8-rows"], "fixed grid"),
    ):
        target = [] if "--dry-run" in arguments else [out]
        assert main(["convert", folder, *target, *arguments]) != 0
        error = capsys.readouterr().err
        assert words in error and "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_recipes_with_bits(tiny_model, tmp_path, capsys):
    """The default is one of them. The file names its recipe; with calibration its bits can differ.
    They count the coded matrices only."""
    folder = str(tiny_model("llama").folder)
    named = {name: recipe for name, recipe in RECIPES.items() if recipe.bits is not None}
    assert DEFAULT_RECIPE in named and len(named) >= 6
    assert all(2.9 <= recipe.bits <= 7.3 and recipe.bits_for(True) <= recipe.bits for recipe in named.values())
    for name in (DEFAULT_RECIPE, "eq8-4.0"):
        report = pipeline.convert_model(folder, tmp_path / f"{name}.gguf", recipe=name)
        bits = RECIPES[report.recipe].bits
        # 127 codes to a side and rows with weights of 20 times their size: at most 6.6 bits come
        # out of this model
        coded = report.coded()
        assert min(0.99 * bits, 6.5) <= sum(t.n_bytes for t in coded) * 8 / sum(t.n_elements for t in coded) <= bits
        assert import_gguf().GGUFReader(tmp_path / f"{name}.gguf").fields["entrollm.recipe"].contents() == report.recipe
    assert main(["convert", folder, "--recipe", "EQ8-3.5", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bits_per_weight"] == pytest.approx(3.5, rel=0.01)


def test_sizes_as_people_write_them():
    for text, n_bytes in (("80MB", 80_000_000), ("1.5 GiB", 3 << 29), ("7k", 7000), ("12", 12), ("2KiB", 2048), ("3b", 3)):
        assert SizeType().convert(text, None, None) == n_bytes


def test_the_file_runs(tiny_model, tmp_path, text_file):
    from entrollm_gguf import measure_perplexity

    out = tmp_path / "out.gguf"
    pipeline.convert_model(tiny_model("llama").folder, out, bits=5)
    assert measure_perplexity(out, text_file, context=128, chunks=2).ppl > 1
