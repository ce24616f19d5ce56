# SPDX-License-Identifier: MIT
"""Measurements and the chat: llama.cpp's own tools underneath, numbers and errors in Python on
top."""

from entrollm_gguf.eval.bench import Speed, measure_speed
from entrollm_gguf.eval.chat import Chat
from entrollm_gguf.eval.perplexity import PerplexityResult, ReferenceLogits, measure_perplexity

__all__ = ["Chat", "PerplexityResult", "ReferenceLogits", "Speed", "measure_perplexity", "measure_speed"]
