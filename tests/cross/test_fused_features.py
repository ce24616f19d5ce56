# SPDX-License-Identifier: MIT
"""In fused mode llama.cpp does everything that it does with stock types: adapters, contexts, state,
imatrix, overrides, benchmarks."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import gguf
import numpy as np
import pytest
from running import TOKENS, levels, logits

from entrollm_gguf import runtime
from entrollm_gguf.inspect.decode import decode_file

FUSED = {"entropy.mode": "fused"}


def run(name: str, *arguments, mode: str = "fused") -> subprocess.CompletedProcess:
    command = [runtime.tool(name), *map(str, arguments)]
    environment = {**os.environ, "GGML_ENTROPY_MODE": mode}
    return subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment, stdin=subprocess.DEVNULL, timeout=600)


@pytest.fixture(scope="module")
def pair(converted, tmp_path_factory) -> tuple[Path, Path]:
    """EQ8 without offsets, whose fused logits are those of Q8_0 except for rounding, and the Q8_0
    file."""
    coded, plain = converted("llama", "EQ8-rows"), tmp_path_factory.mktemp("plain") / "plain.gguf"
    decode_file(coded, plain)
    return coded, plain


@pytest.fixture
def no_repack(monkeypatch):
    """Llama() without weight repacking."""
    import llama_cpp

    defaults = llama_cpp.llama_model_default_params

    def without():
        params = defaults()
        params.use_extra_bufts = False
        return params

    monkeypatch.setattr(llama_cpp, "llama_model_default_params", without)
    monkeypatch.setattr(llama_cpp.llama_cpp, "llama_model_default_params", without)


def nmse(found: np.ndarray, expected: np.ndarray) -> float:
    """Error relative to what is expected."""
    return float(((found - expected) ** 2).sum() / (expected**2).sum())


# Sums are taken in another order than those of Q8_0. By itself this makes a difference of some
# 1e-14; where it makes an activation round to the other side, 1e-4.
SAME = 5e-4


def test_the_binding_forces_a_mode(pair, no_repack):
    coded, plain = pair
    assert nmse(logits(coded, kv_overrides=FUSED), logits(plain)) < SAME


def write_adapter(path: Path, width: int, rng: np.random.Generator) -> None:
    """A LoRA adapter of rank 4 for the first layer's attn_q and the last layer's ffn_down."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    for name, n_in, n_out in (("blk.0.attn_q", width, width), ("blk.1.ffn_down", 1056, width)):
        writer.add_tensor(f"{name}.weight.lora_a", (rng.standard_normal((4, n_in)) / n_in**0.5).astype(np.float32))
        writer.add_tensor(f"{name}.weight.lora_b", rng.standard_normal((n_out, 4)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_lora_on_top(pair, no_repack, tmp_path, rng):
    coded, plain = pair
    write_adapter(tmp_path / "lora.gguf", 576, rng)
    adapter = {"lora_path": str(tmp_path / "lora.gguf"), "lora_scale": 0.7}
    ours = logits(coded, kv_overrides=FUSED, **adapter)
    assert nmse(ours, logits(plain, **adapter)) < SAME
    assert nmse(ours, logits(plain)) > 10 * SAME


def test_several_contexts_on_one_model(pair):
    import llama_cpp

    params = llama_cpp.llama_model_default_params()
    override = (llama_cpp.llama_model_kv_override * 2)()
    override[0].tag = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_STR
    override[0].key = b"entropy.mode"
    override[0].value.val_str = b"fused"
    params.kv_overrides = override
    model = llama_cpp.llama_model_load_from_file(str(pair[0]).encode(), params)
    n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    contexts = []
    for n_threads in (1, 2, 1):
        context_params = llama_cpp.llama_context_default_params()
        context_params.n_ctx, context_params.n_threads, context_params.n_threads_batch = 64, n_threads, n_threads
        contexts.append(llama_cpp.llama_init_from_model(model, context_params))
    rows = [[] for _ in contexts]
    for token in TOKENS:  # turn by turn
        for context, row in zip(contexts, rows):
            one = (llama_cpp.llama_token * 1)(token)
            assert llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(one, 1)) == 0
            row.append(np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), (n_vocab,)).copy())
    for context in contexts:
        llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    assert np.isfinite(rows[0]).all() and np.array_equal(rows[0], rows[1]) and np.array_equal(rows[0], rows[2])


def test_state_save_and_restore(pair):
    from llama_cpp import Llama

    model = Llama(str(pair[0]), n_ctx=64, n_threads=2, n_threads_batch=2, logits_all=True, verbose=False, kv_overrides=FUSED)
    model.eval(list(TOKENS[:6]))
    state = model.save_state()
    model.eval(list(TOKENS[6:]))
    first = np.array(model.scores[6 : len(TOKENS)], copy=True)
    model.load_state(state)
    model.eval(list(TOKENS[6:]))
    assert np.array_equal(first, model.scores[6 : len(TOKENS)])
    model.close()


def test_imatrix(pair, text_file, tmp_path):
    """Activations seen by llama-imatrix are those of the Q8_0 file."""
    found = []
    for name, path in zip(("coded", "plain"), pair):
        out = tmp_path / f"{name}.gguf"
        result = run("llama-imatrix", "-m", path, "-f", text_file, "-o", out, "--chunks", "2", "-c", "128", "-t", "2", "--no-repack")
        assert result.returncode == 0, result.stderr[-2000:]
        found.append({t.name: np.array(t.data) for t in gguf.GGUFReader(out).tensors})
    coded, plain = found
    assert coded.keys() == plain.keys() and len(coded) >= 14
    for name, values in coded.items():
        assert nmse(values, plain[name]) < SAME, name


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("llama", ["-ot", r"blk\.0\.ffn.*=CPU"]),
        ("llama", ["-ngl", "1", "--load-mode", "none"]),
        ("qwen2_moe", ["--n-cpu-moe", "1"]),
        ("qwen2_moe", ["--cpu-moe", "--load-mode", "mlock"]),
        ("gemma3", ["--check-tensors"]),
    ],
)
def test_placement_flags(converted, name, arguments):
    model = converted(name, "EQ8-rows")
    result = run("llama-completion", "-m", model, "-p", "a", "-n", "4", "-no-cnv", "--temp", "0", "-t", "2", "-v", *arguments)
    assert result.returncode == 0, result.stderr[-2000:]
    said = rf"llama_entropy: \d+ entropy-coded tensors, .* stay as they are; computed by CPU, CPU kernel {levels()[0]} \(mode fused"
    assert re.search(said, result.stderr)
    assert "llama_entropy: decoded" not in result.stderr


@pytest.mark.parametrize("mode, said", [("fused", "stay as they are"), ("load", "decoded"), ("auto", "decoded")])
def test_llama_bench(pair, mode, said):
    result = run("llama-bench", "-m", pair[0], "-p", "16", "-n", "4", "-r", "1", "-t", "2", "-o", "json", "-v", mode=mode)
    assert result.returncode == 0, result.stderr[-2000:]
    assert said in result.stderr
    report = json.loads(result.stdout)
    assert len(report) == 2 and all(row["avg_ts"] > 0 for row in report) and "EQ8" in report[0]["model_type"]


def test_auto_names_its_reason(pair, monkeypatch):
    monkeypatch.setenv("GGML_ENTROPY_MEMORY_MIB", "4")
    arguments = ("llama-completion", "-m", pair[0], "-p", "a", "-n", "1", "-no-cnv", "-v")
    assert re.search(
        r"stay as they are.*auto: decoded, the model of \d+ MiB does not fit in 80 % of 4 MiB", run(*arguments, mode="auto").stderr
    )
    monkeypatch.setenv("GGML_ENTROPY_MEMORY_MIB", "1000")
    assert re.search(r"decoded \d+ .*auto: decoded, the model of \d+ MiB fits", run(*arguments, mode="").stderr)


def test_kernel_levels_agree(pair, monkeypatch):
    """All levels decode the same codes; only the order of float sums differs."""
    values = {}
    for level in levels():
        monkeypatch.setenv("GGML_ENTROPY_KERNEL", level)
        arguments = ("-m", pair[0], "-f", Path(__file__), "-c", "64", "--chunks", "2", "-t", "2", "-v")
        result = run("llama-perplexity", *arguments)
        assert f"CPU kernel {level} " in result.stderr
        values[level] = float(re.search(r"PPL = ([\d.]+)", result.stdout + result.stderr)[1])
    assert max(values.values()) == pytest.approx(min(values.values()), rel=5e-3)
