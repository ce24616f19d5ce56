# SPDX-License-Identifier: MIT
"""Running a GGUF inside the test process, for its logits; kernel levels."""

from __future__ import annotations

import functools
import os
import shlex
import subprocess
from pathlib import Path

import numpy as np

from entrollm_gguf import runtime

TOKENS = (1, 17, 99, 256, 31, 300, 42, 8, 411, 77, 123, 5)


def ops_program() -> list[str]:
    """The command that runs test-entropy-ops; ENTROLLM_OPS_COMMAND names another build of it
    (tests/neon/run.py)."""
    given = os.environ.get("ENTROLLM_OPS_COMMAND")
    return shlex.split(given) if given else [str(runtime.tool("test-entropy-ops"))]


@functools.cache
def levels() -> list[str]:
    """Kernel levels of fused mode that can run here, best first."""
    return subprocess.run([*ops_program(), "--levels"], capture_output=True, text=True, check=True).stdout.split()


def refusal_of_level(name: str) -> str:
    """The line that refuses a level of that name."""
    *others, last = levels()
    return f"unknown value '{name}' of GGML_ENTROPY_KERNEL: use {', '.join(others)} or {last}"


def logits(path: Path, tokens: tuple[int, ...] = TOKENS, **arguments) -> np.ndarray:
    """Logits of every position, f32 (n_tokens, n_vocab): the first tokens as one batch, the last
    four one by one."""
    from llama_cpp import Llama

    model = Llama(str(path), n_ctx=64, n_batch=64, n_threads=2, n_threads_batch=2, logits_all=True, verbose=False, **arguments)
    try:
        model.eval(list(tokens[:-4]))
        for token in tokens[-4:]:
            model.eval([token])
        return np.array(model.scores[: len(tokens)], copy=True)
    finally:
        model.close()
