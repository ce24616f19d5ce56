# SPDX-License-Identifier: MIT
"""What llama.cpp's converter classes raise, in words for users: what, where, and what to do.

They meet arbitrary files with bare indexing, asserts and library calls, so that every exception
type is possible.
"""

from __future__ import annotations

import contextlib
import re
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from entrollm_gguf.convert.checkpoint import damaged_tokenizer_file, has_tokenizer, n_tokens
from entrollm_gguf.errors import ConversionError, EntroLLMError

_FETCH_TOKENIZER = "download the tokenizer of the original model"


@contextlib.contextmanager
def one_line_errors(folder: Path, hparams: dict[str, Any] | None = None) -> Iterator[None]:
    """Any exception becomes a ConversionError that names the model folder.

    Args:
        hparams: the model's configuration, where it is known.
    """
    try:
        yield
    except (EntroLLMError, KeyboardInterrupt, MemoryError):
        raise
    except OSError as error:
        if error.errno is not None and error.filename is None:
            raise  # trouble with the disk of our own output is worded where the output is written
        raise ConversionError(f"{folder}: {_reason(error)}; download the model again") from error
    except Exception as error:
        quantized = ((hparams or {}).get("quantization_config") or {}).get("quant_method")
        if quantized and isinstance(error, NotImplementedError):
            raise ConversionError(
                f"{folder}: its weights are quantized by {quantized}, in a way that llama.cpp's converter cannot undo ({_reason(error)}); "
                "convert the model that it was made from, or save a copy with 16-bit weights by transformers"
            ) from error
        raise ConversionError(
            f"{folder}: llama.cpp's converter does not take this model ({type(error).__name__}: {_reason(error)}{_place(error)}); "
            "if its files are whole, that is a limit of the converter: compare config.json with that of a model which converts"
        ) from error


@contextlib.contextmanager
def tokenizer_errors(folder: Path, hparams: dict[str, Any]) -> Iterator[None]:
    """The same for what reads the tokenizer."""
    try:
        yield
    except (EntroLLMError, KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:
        raise ConversionError(_tokenizer_trouble(folder, hparams, error)) from error


def _tokenizer_trouble(folder: Path, hparams: dict[str, Any], error: Exception) -> str:
    damaged = damaged_tokenizer_file(folder)
    if damaged is not None:
        return damaged
    if not has_tokenizer(folder):
        return f"{folder}: has no tokenizer (tokenizer.json or tokenizer.model); {_FETCH_TOKENIZER}"
    tokens, rows = n_tokens(folder), hparams.get("vocab_size")
    if isinstance(error, AssertionError) and tokens is not None and isinstance(rows, int) and tokens > rows:
        return more_tokens_than_rows(folder, tokens, rows)
    if "pre-tokenizer was not recognized" in str(error):
        return f"{folder / 'tokenizer.json'}: llama.cpp's converter does not know its pre-tokenizer; {_FETCH_TOKENIZER} if this one was changed"
    return f"{folder}: llama.cpp's converter cannot read the tokenizer ({type(error).__name__}: {_reason(error)}{_place(error)}); {_FETCH_TOKENIZER}"


def more_tokens_than_rows(folder: Path, tokens: int, rows: int) -> str:
    """Words for a tokenizer that does not fit the embedding, in either direction."""
    return (
        f"{folder}: the tokenizer has {tokens} tokens, the embedding has {rows} rows; "
        "resize it with transformers (resize_token_embeddings) and save the model again, or take the tokenizer that belongs to it"
    )


def why_not_loadable(folder: Path, reason: str, shapes: dict[str, tuple[int, ...]], n_tokens: int, n_layers: int) -> str:
    """Words for a model whose file llama.cpp would not load.

    Args:
        reason: of `gguf_io.loader.why_not_loaded`.
        shapes: of all tensors, by GGUF name, numpy order.
        n_tokens: in the vocabulary; 0 for none.
        n_layers: as config.json has it.
    """
    rows = shapes.get("token_embd.weight", (n_tokens,))[0]
    if "token_embd.weight" in reason and n_tokens not in (0, rows):
        return more_tokens_than_rows(folder, n_tokens, rows)
    missing = re.search(r"missing tensor '([^']+)'|tensor '([^']+)' not found", reason)
    if missing:
        layers = len({name.split(".")[1] for name in shapes if name.startswith("blk.")})
        several = f"config.json says {n_layers} layers, there are weights for {layers}: " if 0 < layers < n_layers else ""
        return f"{folder}: {several}{missing[1] or missing[2]} is missing; download all files of the model again, or correct config.json"
    return f"{folder}: llama.cpp would not load the converted file (it {reason}); config.json and weights do not fit, or it is a limit of llama.cpp"


def _reason(error: Exception) -> str:
    """The message, or for an assert without one what was asserted."""
    said = " ".join(str(error).split())
    if not said and isinstance(error, AssertionError):
        said = traceback.extract_tb(error.__traceback__)[-1].line or ""
    return said[:300] or "no further message"


def _place(error: Exception) -> str:
    """Where in the converter it happened, ", conversion/qwen.py line 12"."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).parent.name == "conversion"]
    return f", conversion/{Path(frames[-1].filename).name} line {frames[-1].lineno}" if frames else ""
