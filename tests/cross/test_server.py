# SPDX-License-Identifier: MIT
"""llama-server on entropy-coded files, through the standard OpenAI client; and models spread over
rpc-servers."""

from __future__ import annotations

import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from openai import OpenAI
from serving import llama_server, rpc_server

from entrollm_gguf import runtime

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


def ask(client: OpenAI, **more) -> str:
    answer = client.chat.completions.create(model="any", messages=MESSAGES, temperature=0, seed=1, max_tokens=12, **more)
    return answer.choices[0].message.content


@pytest.fixture(scope="module")
def smollm2(smollm2_hf, tmp_path_factory):
    """SmolLM2 as EQ8, which gives sensible answers."""
    from entrollm_gguf.convert.pipeline import convert_model

    out = tmp_path_factory.mktemp("server") / "smollm2.gguf"
    convert_model(smollm2_hf, out, recipe="EQ8-paper")
    return out


def test_chat_completions(smollm2, tmp_path):
    with llama_server(smollm2, tmp_path, "--parallel", "3") as (address, log):
        client = OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=300)
        assert [m.id for m in client.models.list()]
        answer = ask(client)
        assert "Paris" in answer
        chunks = client.chat.completions.create(model="any", messages=MESSAGES, temperature=0, seed=1, max_tokens=12, stream=True)
        pieces = [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]
        assert len(pieces) > 2 and "".join(pieces) == answer
        with ThreadPoolExecutor(3) as pool:
            parallel = list(pool.map(lambda _: ask(client), range(3)))
        assert all("Paris" in text for text in parallel)
        assert "stay as they are; computed by CPU" in log.read_text(errors="replace")


def test_speculative_decoding(converted, tmp_path):
    """A draft changes the speed of the answer, not the answer; target and draft are both fused."""
    target, draft = converted("llama", "EQ8-rows"), converted("llama", "EQ4-rows")

    def complete(*arguments: str) -> str:
        with llama_server(target, tmp_path, *arguments) as (address, _):
            client = OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=300)
            return client.completions.create(model="any", prompt="The python", temperature=0, max_tokens=24).choices[0].text

    alone = complete()
    assert alone and complete("--spec-draft-model", str(draft), "--spec-draft-n-max", "4") == alone


def perplexity(model, text_file, *arguments: str, mode: str = "load") -> subprocess.CompletedProcess:
    command = [runtime.tool("llama-perplexity"), "-m", model, "-f", text_file, "-c", "128", "--chunks", "4", "-t", "2", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, errors="replace", env={**os.environ, "GGML_ENTROPY_MODE": mode}, timeout=600
    )


def final(result: subprocess.CompletedProcess) -> float:
    assert result.returncode == 0, result.stderr[-2000:]
    return float(re.search(r"Final estimate: PPL = ([\d.]+)", result.stdout + result.stderr)[1])


def test_two_rpc_servers(converted, text_file, tmp_path):
    """For models that outgrow one machine: with the layers spread over two servers and decoded at
    load, the perplexity is the same. Mode fused is refused in one line."""
    model = converted("llama", "EQ8-rows")
    alone = final(perplexity(model, text_file, "--no-repack"))
    with rpc_server(tmp_path) as first, rpc_server(tmp_path) as second:
        spread = ["--rpc", f"{first},{second}", "-ngl", "99", "-ts", "1,2"]
        both = perplexity(model, text_file, *spread, "-v")
        assert final(both) == pytest.approx(alone, rel=1e-3)
        for address in (first, second):
            assert re.search(rf"RPC\d\[{address}\] model buffer size", both.stderr), both.stderr[-3000:]
        automatic = perplexity(model, text_file, *spread, mode="auto")
        assert final(automatic) == pytest.approx(alone, rel=1e-3)
        fused = perplexity(model, text_file, *spread, mode="fused")
        assert fused.returncode != 0
        assert re.search(r"mode fused \(GGML_ENTROPY_MODE\): device RPC\d does not compute on entropy-coded tensors", fused.stderr)
        # rows or tensors of a payload cannot be split; decoded at load they can
        split = perplexity(model, text_file, *spread, "-sm", "tensor", mode="fused")
        assert split.returncode != 0 and "does not compute on entropy-coded tensors" in split.stderr
