# SPDX-License-Identifier: MIT
"""How long-running work reports its progress."""

from collections.abc import Callable

Progress = Callable[[int, int, str], None]  # done, total, the name of what was done: weights, bytes or sequences, as the function says
