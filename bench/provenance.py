# SPDX-License-Identifier: MIT
"""What every file of results begins with.

Only bench/gpu/run.py has a block of its own: it runs on machines that have neither this package nor
its repository.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from entrollm_gguf.eval.compare import environment


def provenance(command: str) -> dict[str, Any]:
    """How figures came about: command, commit, machine. To be asked before the measurement, during
    which a commit may come.

    The commit ends with -dirty where files differed from it.
    """
    describe = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    commit = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout.strip()
    return {"command": command, "commit": commit, "environment": environment()}
