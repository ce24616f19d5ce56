# SPDX-License-Identifier: MIT
"""Tokens per second of a GGUF, by llama-bench."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from entrollm_gguf.errors import ToolError
from entrollm_gguf.eval.tools import run_tool


@dataclass(frozen=True)
class Speed:
    """Tokens per second: mean and standard deviation over the repetitions.

    >>> Speed(300.0, 4.0, 70.0, 1.0).best(Speed(290.0, 2.0, 75.0, 2.0))
    Speed(prompt=300.0, prompt_std=4.0, generation=75.0, generation_std=2.0)
    """

    prompt: float
    prompt_std: float
    generation: float
    generation_std: float

    def best(self, other: Speed) -> Speed:
        """The faster prompt and the faster generation of two measurements: whatever else runs on a
        machine only slows them down."""
        p = self if self.prompt >= other.prompt else other
        g = self if self.generation >= other.generation else other
        return Speed(p.prompt, p.prompt_std, g.generation, g.generation_std)


def measure_speed(
    model: str | Path,
    *,
    prompt_tokens: int = 256,
    generated_tokens: int = 64,
    repetitions: int = 3,
    threads: int | None = None,
    mode: str | None = None,
) -> Speed:
    """Prompt processing and token generation speed.

    Args:
        mode: auto, load or fused (docs/runtime-modes.md); None leaves it to the environment.
    Raises:
        FormatError: the file is missing.
        ToolError: llama-bench failed.

    >>> from entrollm_gguf import measure_speed
    >>> speed = measure_speed("model.gguf", prompt_tokens=16, generated_tokens=4, mode="fused")
    >>> speed.prompt > 0 and speed.generation > 0
    True
    """
    model = Path(model)
    arguments = ["-m", model, "-p", str(prompt_tokens), "-n", str(generated_tokens), "-r", str(repetitions), "-o", "json"]
    if threads:
        arguments += ["-t", str(threads)]
    output = run_tool("llama-bench", arguments, model=model, mode=mode)
    try:
        tests = json.loads(output.stdout)
        prompt = next(t for t in tests if t["n_prompt"] > 0 and t["n_gen"] == 0)
        generation = next(t for t in tests if t["n_gen"] > 0 and t["n_prompt"] == 0)
        return Speed(prompt["avg_ts"], prompt["stddev_ts"], generation["avg_ts"], generation["stddev_ts"])
    except (ValueError, KeyError, StopIteration) as error:
        raise ToolError(f"{model}: llama-bench printed something else than its JSON records") from error
