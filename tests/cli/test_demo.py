# SPDX-License-Identifier: MIT
"""The demo with a tiny model in place of the real one, and the question that it asks the real
one."""

from __future__ import annotations

import json
import math

import pytest

from entrollm_gguf import runtime
from entrollm_gguf.cli import main
from entrollm_gguf.eval import demo
from entrollm_gguf.eval.demo_model import fetch_gguf


@pytest.mark.runtime
def test_demo(tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "_model_folder", lambda out, say: tiny_model("llama").folder)
    monkeypatch.setattr(
        demo, "SHORT", demo.Extent(("EQ8", "EQ8-4.5"), chunks=4, sequences=2, speed_rounds=1)
    )  # fewer than 100 tokens have no statistics
    monkeypatch.setattr(demo, "STOCK_TYPES", ("Q8_0",))
    monkeypatch.setattr(demo, "CONTEXT", 64)
    monkeypatch.setenv("ENTROLLM_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.partition(demo.QUESTION)[0].splitlines())) <= 100

    results = json.loads((out / "results.json").read_text())
    assert [row["name"] for row in results["rows"]] == ["F16", "Q8_0", "EQ8", "EQ8-4.5, calibrated"]
    for row in results["rows"]:
        assert (out / row["file"]).stat().st_size == row["file_bytes"]
        assert (row["perplexity"]["kld_mean"] is None) == (row["name"] == "F16")
        assert (row["fused_speed"] is not None) == row["name"].startswith("EQ8") == (row["seconds"] is not None)
        assert f"{row['file_bytes'] / 1e6:.1f}" in shown
    assert results["rows"][2]["fused_weight_bytes"] < results["rows"][2]["weight_bytes"] == results["rows"][1]["weight_bytes"]
    assert set(results["answers"]) == {"Q8_0", "EQ8"}
    assert "2 x 512 tokens" in shown and str(out / "report.html") in shown and f"chat {out / 'EQ8.gguf'}" in shown
    page = (out / "report.html").read_text()
    assert page.count("<img") == 3 and "EQ8-4.5, calibrated" in page and results["environment"]["cpu"] in page


def test_full_demo_has_every_recipe():
    from entrollm_gguf.convert.recipes import DEFAULT_FOR_INTEGERS, RECIPES

    # a float model has no codes to keep, and the demo's is no bf16
    fixed = {name for name, recipe in RECIPES.items() if recipe.bits is None and not recipe.exact} - {DEFAULT_FOR_INTEGERS}
    assert fixed | {"EQ8", "EQ8-4.5"} == set(demo.FULL.recipes) > set(demo.SHORT.recipes)


@pytest.mark.runtime
def test_the_model_is_sure_of_the_answer():
    """Otherwise a rounding error decides what the demo shows."""
    from llama_cpp import Llama

    model = Llama(str(fetch_gguf(runtime.cache_folder() / "models")), n_ctx=256, n_threads=2, logits_all=True, verbose=False)
    try:
        question = [{"role": "user", "content": demo.QUESTION}]
        (answer,) = model.create_chat_completion(question, max_tokens=32, temperature=0.0, logprobs=True, top_logprobs=1)["choices"]
    finally:
        model.close()
    assert answer["finish_reason"] == "stop" and "Tokyo" in answer["message"]["content"]
    assert min(math.exp(token["logprob"]) for token in answer["logprobs"]["content"]) > 0.6
