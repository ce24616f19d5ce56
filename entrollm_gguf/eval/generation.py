# SPDX-License-Identifier: MIT
"""Which models predict the next token of a text, and which know texts at all: only they can chat,
and only they have a perplexity."""

from __future__ import annotations

# Architectures that do not: encoders of all kinds, models that draft for another one, and diffusion
# models, which fill in masked tokens. llama.cpp tells them by the architecture alone.
_OTHERS = {"t5", "t5encoder", "gemma-embedding", "eagle3", "dflash", "dream", "llada", "llada-moe", "rnd1", "wavtokenizer-dec", "clip"}


def predicts_next_token(architecture: str, causal: bool) -> bool:
    """Whether a model continues a text token by token.

    Args:
        architecture: general.architecture of the file.
        causal: what it says of attention.causal; True where it says nothing.
    """
    return causal and architecture not in _OTHERS


def has_vocabulary(tokenizer: str) -> bool:
    """Whether a model takes texts; llama.cpp aborts where one without tokens is given any.

    Args:
        tokenizer: tokenizer.ggml.model of the file.
    """
    return tokenizer not in ("no_vocab", "none")
