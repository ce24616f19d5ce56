# SPDX-License-Identifier: MIT
"""llama-server under eight streams that break off, malformed requests and prompts beyond the
context: no crash, no stuck slot, no growing memory. `make test-soak`; SOAK_MINUTES each (5)."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import threading
import time
import urllib.request
from collections import Counter

import psutil
import pytest
from serving import llama_server

from entrollm_gguf.convert.pipeline import convert_model

MINUTES = float(os.environ.get("SOAK_MINUTES", "5"))
STREAMS = 8
WORDS = [
    "the",
    "a",
    "python",
    "list",
    "of",
    "statement",
    "object",
    "function",
    "names",
    "value",
    "with",
    "class",
    "and",
    "expression",
    "module",
]


def _request(address: str, body: bytes) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=300)
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    return connection.getresponse()


def _one(address: str, chance: random.Random) -> str:
    """One request of a random kind; returns what became of it."""
    prompt = " ".join(chance.choices(WORDS, k=chance.randrange(1, 60)))
    kind = chance.choices(("whole", "broken off", "malformed", "too long", "no numbers"), (3, 6, 2, 1, 1))[0]
    if kind == "malformed":
        body = chance.choice([b"", b"{", b'{"prompt": }', b"\xff\xfe{}", b'{"prompt": "x", "max_tokens": 1e999}', b"[" * 2000])
    elif kind == "too long":
        body = json.dumps({"prompt": prompt * 200, "max_tokens": 4}).encode()
    elif kind == "no numbers":
        body = json.dumps({"prompt": prompt, "max_tokens": "many", "temperature": []}).encode()
    else:
        body = json.dumps({"prompt": prompt, "max_tokens": 24, "stream": kind == "broken off"}).encode()
    answer = _request(address, body)
    with contextlib.closing(answer):
        if kind == "broken off":
            answer.read(chance.randrange(1, 2000))  # and the connection is closed
        else:
            answer.read()
    return f"{kind}: {answer.status}"


@pytest.mark.parametrize("mode", ["load", "fused"])
def test_server_stays_up(smollm2_hf, tmp_path, mode):
    model = tmp_path / "model.gguf"
    convert_model(smollm2_hf, model, recipe="EQ8-rows")
    seed, ends, problems = int(time.time()), Counter(), []
    # its prompt cache grows to gigabytes by design; without that cache, whatever grows is a leak
    with llama_server(model, tmp_path, "--parallel", str(STREAMS), "--slots", "--cache-ram", "0") as (address, log):
        (process,) = [one for one in psutil.process_iter(["cmdline"]) if str(model) in (one.info["cmdline"] or [])]
        until = time.monotonic() + 60 * MINUTES

        def stream(number: int) -> None:
            chance = random.Random(seed + number)
            while time.monotonic() < until:
                try:
                    ends[_one(address, chance)] += 1
                except (OSError, http.client.HTTPException) as error:
                    problems.append(repr(error))
                    return

        threads = [threading.Thread(target=stream, args=(number,)) for number in range(STREAMS)]
        for thread in threads:
            thread.start()
        time.sleep(60 * MINUTES / 4)  # until all slots were used
        warm = process.memory_info().rss
        for thread in threads:
            thread.join()
        rss = process.memory_info().rss
        assert problems == [] and process.is_running(), (seed, problems, log.read_text(errors="replace")[-3000:])
        time.sleep(2)
        slots = json.load(urllib.request.urlopen(f"{address}/slots", timeout=30))
        assert len(slots) == STREAMS and not any(slot["is_processing"] for slot in slots), (seed, slots)
        assert json.load(_request(address, b'{"prompt": "The", "max_tokens": 4}'))["choices"][0]["text"]
    assert all(status.endswith(("200", "400", "500")) for status in ends), ends
    print(f"mode {mode}, seed {seed}, {sum(ends.values())} requests: {dict(ends)}; {warm / 2**20:.0f} -> {rss / 2**20:.0f} MiB")
    assert rss < warm + 64 * 2**20, (seed, warm, rss)
