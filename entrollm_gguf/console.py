# SPDX-License-Identifier: MIT
"""How text comes to the terminal: where tables go, and how words are shown that a file or a name brought along."""

from __future__ import annotations

import sys
import unicodedata

from rich.console import Console

# Control characters, half of a surrogate pair (bytes that are no UTF-8), and what reorders or breaks lines.
_UNPRINTABLE = {"Cc", "Cs", "Cf", "Zl", "Zp"}
_JOINERS = "\u200c\u200d"  # format characters that words and emoji need


def output_console() -> Console:
    """Standard output. A pipe has no width of its own: tables are then as wide as they want, so that names are not folded.

    Brackets and colons in names are no markup.
    """
    return Console(markup=False, emoji=False) if sys.stdout.isatty() else Console(width=240, markup=False, emoji=False)


def printable(text: str, keep: str = "") -> str:
    """The text with everything that a terminal would act on as an escape sequence in letters: names in files are hostile until shown so.

    Args:
        keep: control characters that may stay.
    """
    allowed = keep + _JOINERS
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) in _UNPRINTABLE and c not in allowed else c for c in text)
