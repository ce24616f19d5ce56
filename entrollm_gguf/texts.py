# SPDX-License-Identifier: MIT
"""The texts that perplexity and calibration read: one rule for both."""

from __future__ import annotations

from pathlib import Path

from entrollm_gguf.errors import TextError


def read_text(path: str | Path) -> str:
    """The content of a text file in UTF-8. It is a plain file, since llama-perplexity reads it
    again.

    Raises:
        TextError: missing, unreadable, empty, in another encoding, or no text.
    """
    path = Path(path)
    if not path.is_file():
        raise TextError(f"{path}: no such text file")
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise TextError(f"{path}: cannot be read ({error.strerror}); name a text file") from error
    except UnicodeDecodeError as error:
        raise TextError(f"{path}: is no UTF-8 text ({error.reason} at byte {error.start}); convert it to UTF-8") from error
    if not text.strip():
        raise TextError(f"{path}: is empty; name a text file")
    if "\0" in text:  # UTF-16 of plain English is valid UTF-8, too
        raise TextError(f"{path}: is no UTF-8 text (a zero at byte {text.index(chr(0))}); convert it to UTF-8")
    return text
