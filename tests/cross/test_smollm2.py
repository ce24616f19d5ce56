# SPDX-License-Identifier: MIT
"""A real model through all recipes: sizes against entropy, perplexity in both modes against the decoded file, the tokenizer, a chat."""

from __future__ import annotations

import pytest

from entrollm_gguf import runtime
from entrollm_gguf.convert.pipeline import convert_model
from entrollm_gguf.convert.recipes import RECIPES
from entrollm_gguf.eval.chat import Chat
from entrollm_gguf.eval.demo_model import fetch_gguf
from entrollm_gguf.eval.perplexity import measure_perplexity
from entrollm_gguf.gguf_io.reader import open_model
from entrollm_gguf.inspect.decode import decode_file
from entrollm_gguf.inspect.report import inspect_file
from entrollm_gguf.inspect.verify import verify_file

CHUNKS = 2


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory, smollm2_hf):
    """Function: recipe -> converted file."""
    folder = tmp_path_factory.mktemp("smollm2-gguf")

    def get(recipe: str):
        path = folder / f"{recipe}.gguf"
        if not path.is_file():
            convert_model(smollm2_hf, path, recipe=recipe)
        return path

    return get


@pytest.mark.slow
@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_perplexity_of_both_modes_is_that_of_the_decoded_file(smollm2, text_file, tmp_path, monkeypatch, recipe):
    path = smollm2(recipe)
    assert verify_file(path).problems == ()
    decode_file(path, tmp_path / "plain.gguf")
    monkeypatch.setenv("LLAMA_ARG_REPACK", "0")  # repacked rows are summed in another order
    ours = measure_perplexity(path, text_file, chunks=CHUNKS)
    plain = measure_perplexity(tmp_path / "plain.gguf", text_file, chunks=CHUNKS)
    assert f"{ours.ppl:.4g}" == f"{plain.ppl:.4g}"
    assert ours.ppl > 1
    monkeypatch.setenv("GGML_ENTROPY_MODE", "fused")
    fused = measure_perplexity(path, text_file, chunks=CHUNKS)
    if recipe.endswith("-rows"):  # without offsets: the very sums of Q8_0 and Q4_0
        assert f"{fused.ppl:.4g}" == f"{plain.ppl:.4g}"
    else:  # a collapsed model (10^8) amplifies rounding
        assert fused.ppl == pytest.approx(plain.ppl, rel=0.002 if plain.ppl < 1000 else 0.02)


@pytest.mark.slow
def test_size_is_close_to_the_entropy(smollm2):
    report = inspect_file(smollm2("EQ8-paper"))
    assert report.coded_n_weights > 0.999 * report.n_weights - 100_000
    assert report.coded_entropy < report.coded_bits_per_weight <= 1.025 * report.coded_entropy
    assert 5.0 < report.coded_entropy < 5.7  # the paper: 5.6 to 5.9 bits at uint8


@pytest.mark.slow
def test_tokenizer_is_the_original_one(smollm2):
    original, ours = open_model(fetch_gguf(runtime.cache_folder() / "models")), open_model(smollm2("EQ8-mixed"))
    for key in ("ggml.model", "ggml.pre", "ggml.tokens", "ggml.merges", "ggml.eos_token_id", "chat_template"):
        assert ours.field(f"tokenizer.{key}") == original.field(f"tokenizer.{key}"), key


@pytest.mark.slow
def test_metadata(smollm2):
    model = open_model(smollm2("EQ8-paper"))
    assert model.field("entrollm.recipe") == "EQ8-paper"
    assert model.field("entrollm.format_version") == 1
    schemes = dict(zip(model.field("entrollm.tensor.names"), model.field("entrollm.tensor.schemes")))
    assert schemes["blk.0.attn_q.weight"] == "asymmetric"
    assert set(schemes) == {t.name for t in model.tensors()}
    assert model.field("general.file_type") == 500


@pytest.mark.slow
def test_chat_answers(smollm2):
    chat = Chat(smollm2("EQ8-mixed"), temperature=0.0)
    answer = "".join(chat.ask("What is the capital of France?", max_tokens=32))
    chat.close()
    assert "Paris" in answer
