# SPDX-License-Identifier: MIT
"""How long-running work reports what it does."""

from collections.abc import Callable

Progress = Callable[[int, int, str, str], None]  # done, total, the name of what was done, the unit: weights, bytes or sequences
Say = Callable[[str], None]  # told what is going on, a line at a time
