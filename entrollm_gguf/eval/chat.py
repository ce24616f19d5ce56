# SPDX-License-Identifier: MIT
"""A chat with a GGUF through llama-cpp-python, with the chat template that stands in the file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from entrollm_gguf.errors import FormatError, RuntimeMissingError, ToolError


class Chat:
    """One conversation.

    Args:
        model: GGUF file.
        system: system message, or None for the template's own.
        context: tokens of context.
        seed: of the sampler; the same seed, model and words give the same answer.
        temperature: 0 for the most likely token always.
    Raises:
        FormatError: the file is missing.
        ToolError: llama.cpp cannot load it.
        RuntimeMissingError: the runtime is not installed.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        system: str | None = None,
        context: int = 4096,
        threads: int | None = None,
        seed: int = 0,
        temperature: float = 0.2,
        gpu_layers: int = 0,
        verbose: bool = False,
    ) -> None:
        path = Path(model)
        if not path.is_file():
            raise FormatError(f"{path}: no such file")
        try:
            from llama_cpp import Llama
        except ImportError as error:
            raise RuntimeMissingError("llama-cpp-python is not installed; run `entrollm runtime build`") from error
        try:
            self._llama = Llama(str(path), n_ctx=context, n_threads=threads, n_gpu_layers=gpu_layers, seed=seed, verbose=verbose)
        except ValueError as error:  # what Llama raises for every failure to load
            raise ToolError(f"{path}: llama.cpp cannot load it; `entrollm verify` may tell why, --verbose shows its log") from error
        self._temperature = temperature
        self._messages = [{"role": "system", "content": system}] if system else []

    def ask(self, text: str, max_tokens: int | None = None) -> Iterator[str]:
        """Send a message; yields the answer piece by piece and remembers both."""
        self._messages.append({"role": "user", "content": text})
        stream = self._llama.create_chat_completion(self._messages, stream=True, max_tokens=max_tokens, temperature=self._temperature)
        answer = []
        try:
            for chunk in stream:
                piece = chunk["choices"][0]["delta"].get("content")
                if piece:
                    answer.append(piece)
                    yield piece
        finally:
            # an interrupted answer stays in the conversation as far as it got
            self._messages.append({"role": "assistant", "content": "".join(answer)})

    def close(self) -> None:
        """Free the model."""
        self._llama.close()
