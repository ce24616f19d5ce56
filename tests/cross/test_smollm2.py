# SPDX-License-Identifier: MIT
"""A real model through recipes of every kind: sizes against entropy, perplexity in both modes
against the decoded file, the tokenizer, a chat."""

from __future__ import annotations

import math

import pytest

from entrollm_gguf import runtime
from entrollm_gguf.convert.pipeline import convert_model
from entrollm_gguf.eval.chat import Chat
from entrollm_gguf.eval.demo_model import english_text, fetch_gguf
from entrollm_gguf.eval.perplexity import measure_perplexity
from entrollm_gguf.eval.tools import run_tool
from entrollm_gguf.gguf_io.reader import open_model
from entrollm_gguf.inspect.decode import decode_file
from entrollm_gguf.inspect.report import inspect_file
from entrollm_gguf.inspect.verify import verify_file

# every grid there is, the default, and a recipe with steps by rate at few bits; the other recipes
# differ from these in a number only
RECIPES = ("EQ8-paper", "EQ8-mixed", "EQ8-rows", "EQ4-paper", "EQ4-mixed", "EQ4-rows", "EQ8", "EQ8-4.0")


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


@pytest.fixture(scope="module")
def short_text(tmp_path_factory):
    """Enough for two chunks: the tool reads all of its text first."""
    path = tmp_path_factory.mktemp("text") / "short.txt"
    path.write_text(english_text()[:8000], encoding="utf-8")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_perplexity_of_both_modes_is_that_of_the_decoded_file(smollm2, short_text, tmp_path, monkeypatch, recipe):
    def perplexity(file, mode: str) -> float:
        monkeypatch.setenv("GGML_ENTROPY_MODE", mode)
        return measure_perplexity(file, short_text, context=256, chunks=2).ppl

    path = smollm2(recipe)
    assert verify_file(path).problems == ()
    types = set(decode_file(path, tmp_path / "plain.gguf").types)
    monkeypatch.setenv("LLAMA_ARG_REPACK", "0")  # repacked rows are summed in another order
    plain = perplexity(tmp_path / "plain.gguf", "auto")
    assert plain > 1
    assert f"{perplexity(path, 'load'):.4g}" == f"{plain:.4g}"
    if recipe != "EQ4-paper":  # for that one, see the next test
        # Without offsets products are those of Q8_0 and Q4_0 in another order, and such a type's
        # perplexity itself changes by half a percent with the size of batches (docs/decisions.md).
        # With offsets activations are rounded finely enough. What is compared are mean negative log
        # likelihoods: EQ4-mixed leaves a model with a perplexity of 4e8, a number that says
        # nothing.
        within = 0.006 if types <= {"Q8_0", "Q4_0"} else 0.001
        assert math.log(perplexity(path, "fused")) == pytest.approx(math.log(plain), rel=within)
    (tmp_path / "plain.gguf").unlink()  # hundreds of megabytes


@pytest.mark.slow
def test_perplexity_of_uint4_is_that_of_its_weights(smollm2, text_file, tmp_path, monkeypatch):
    """A collapsed model amplifies rounding, even that of Q4_1's own kernels to some 2 %. So fused
    mode is compared with the weights in F32."""
    plain, exact = tmp_path / "plain.gguf", tmp_path / "f32.gguf"
    assert set(decode_file(smollm2("EQ4-paper"), plain).types) == {"Q4_1"}
    run_tool("llama-quantize", ["--allow-requantize", plain, exact, "F32"], model=plain)

    def perplexity(file, mode: str) -> float:
        monkeypatch.setenv("GGML_ENTROPY_MODE", mode)
        return measure_perplexity(file, text_file, context=256, chunks=8).ppl

    expected = perplexity(exact, "auto")
    assert perplexity(smollm2("EQ4-paper"), "fused") == pytest.approx(expected, rel=0.002)
    exact.unlink()  # hundreds of megabytes


@pytest.mark.slow
def test_size_is_close_to_the_entropy(smollm2):
    report = inspect_file(smollm2("EQ8-paper"))
    assert report.coded_n_weights > 0.999 * report.n_weights - 100_000
    assert report.coded_entropy < report.coded_bits_per_weight <= 1.032 * report.coded_entropy
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
    assert model.field("entrollm.format_version") == 2
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
