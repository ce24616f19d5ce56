# SPDX-License-Identifier: MIT
"""Text on the terminal: how wide tables are, and how names and words from files are shown."""

from __future__ import annotations

import sys
import unicodedata

from rich.console import Console

# Control characters, halves of surrogate pairs (bytes that are no UTF-8), and characters that
# reorder or break lines.
_UNPRINTABLE = {"Cc", "Cs", "Cf", "Zl", "Zp"}
_JOINERS = "\u200c\u200d"  # format characters that words and emoji need


def output_console() -> Console:
    """Standard output. A pipe has no width of its own: tables are then as wide as they want, so
    that names are not folded.

    Brackets and colons in names are no markup.
    """
    return Console(markup=False, emoji=False) if sys.stdout.isatty() else Console(width=240, markup=False, emoji=False)


def printable(text: str, keep: str = "") -> str:
    """The text, with every character that a terminal would act on spelled out as an escape
    sequence: names in files are hostile.

    Args:
        keep: control characters that may stay.
    """
    allowed = keep + _JOINERS
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) in _UNPRINTABLE and c not in allowed else c for c in text)
