# SPDX-License-Identifier: MIT
"""Where tables go."""

from __future__ import annotations

import sys

from rich.console import Console


def output_console() -> Console:
    """Standard output. A pipe has no width of its own: tables are then as wide as they want, so that names are not folded."""
    return Console() if sys.stdout.isatty() else Console(width=240)
