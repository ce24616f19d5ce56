# SPDX-License-Identifier: MIT
"""A chat with a GGUF through llama-cpp-python, with the chat template that stands in the file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from entrollm_gguf.errors import FormatError, RuntimeMissingError, ToolError
from entrollm_gguf.eval.generation import has_vocabulary, predicts_next_token

_OTHER_TEMPLATE = "put another one into the file (gguf-new-metadata --chat-template)"


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
        ToolError: llama.cpp cannot load it, it is no model that generates text, or its chat
            template is none.
        RuntimeMissingError: the runtime is not installed.

    >>> from entrollm_gguf import Chat
    >>> chat = Chat("model.gguf", context=64)
    >>> pieces = list(chat.ask("What is the capital of France?", max_tokens=4))
    >>> len("".join(pieces).split()) <= 4
    True
    >>> chat.close()
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
            from jinja2 import TemplateError
            from llama_cpp import Llama
        except ImportError as error:
            raise RuntimeMissingError("llama-cpp-python is not installed; run `entrollm runtime build`") from error
        try:
            self._llama = Llama(str(path), n_ctx=context, n_threads=threads, n_gpu_layers=gpu_layers, seed=seed, verbose=verbose)
        except TemplateError as error:
            raise ToolError(f"{path}: its chat template is none that jinja reads ({error}); {_OTHER_TEMPLATE}") from error
        except ValueError as error:  # what Llama raises for every failure to load
            raise ToolError(f"{path}: llama.cpp cannot load it; `entrollm verify` may tell why, --verbose shows its log") from error
        metadata = self._llama.metadata
        architecture = metadata.get("general.architecture", "")
        if not predicts_next_token(architecture, causal=metadata.get(f"{architecture}.attention.causal") != "false"):
            self.close()
            raise ToolError(f"{path}: {architecture} models do not generate text token by token; there is nothing to chat with")
        if not has_vocabulary(metadata.get("tokenizer.ggml.model", "")):
            self.close()
            raise ToolError(f"{path}: has no vocabulary, so that it takes no text; convert the model together with its tokenizer")
        self._path = path
        self._context = self._llama.n_ctx()
        self._temperature = temperature
        self._messages = [{"role": "system", "content": system}] if system else []

    def ask(self, text: str, max_tokens: int | None = None) -> Iterator[str]:
        """Send a message; yields the answer piece by piece and remembers both. A question that got
        no answer is forgotten.

        Raises:
            ToolError: the file's chat template fails, or the conversation is longer than the
                context.
        """
        self._messages.append({"role": "user", "content": text})
        answer = ""
        try:
            for chunk in self._completion(max_tokens):
                piece = chunk["choices"][0]["delta"].get("content")
                if piece:
                    answer += piece
                    yield piece
        except BaseException:
            # of an interrupted answer, the part that was made stays in the conversation
            if answer:
                self._messages.append({"role": "assistant", "content": answer})
            else:
                self._messages.pop()
            raise
        self._messages.append({"role": "assistant", "content": answer})

    def _completion(self, max_tokens: int | None) -> Iterator[dict[str, Any]]:
        try:
            stream = self._llama.create_chat_completion(self._messages, stream=True, max_tokens=max_tokens, temperature=self._temperature)
        except Exception as error:  # a template is a program that came with the file and can raise anything
            remedy = f"leave out the system message, or {_OTHER_TEMPLATE}" if self._messages[0]["role"] == "system" else _OTHER_TEMPLATE
            raise ToolError(f"{self._path}: its chat template fails ({type(error).__name__}: {error}); {remedy}") from error
        try:
            yield from stream
        except ValueError as error:
            if "exceed context window" not in str(error):
                raise ToolError(f"{self._path}: llama.cpp cannot go on ({error})") from error
            raise ToolError(
                f"{self._path}: the conversation is longer than the context of {self._context} tokens; ask for less or give a larger --ctx"
            ) from error
        except RuntimeError as error:
            raise ToolError(f"{self._path}: llama.cpp cannot go on ({error})") from error

    def close(self) -> None:
        """Free the model."""
        self._llama.close()
