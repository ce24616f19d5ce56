# SPDX-License-Identifier: MIT
"""Running a GGUF inside the test process, for its logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np

TOKENS = (1, 17, 99, 256, 31, 300, 42, 8, 411, 77, 123, 5)


def logits(path: Path, tokens: tuple[int, ...] = TOKENS, **arguments) -> np.ndarray:
    """Logits of every position, f32 (n_tokens, n_vocab): the first tokens as one batch, the last four one by one."""
    from llama_cpp import Llama

    model = Llama(str(path), n_ctx=64, n_batch=64, n_threads=2, n_threads_batch=2, logits_all=True, verbose=False, **arguments)
    try:
        model.eval(list(tokens[:-4]))
        for token in tokens[-4:]:
            model.eval([token])
        return np.array(model.scores[: len(tokens)], copy=True)
    finally:
        model.close()
