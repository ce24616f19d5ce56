# SPDX-License-Identifier: MIT
"""What every file of results begins with."""

from __future__ import annotations

import subprocess
from typing import Any

from entrollm_gguf.eval.compare import environment


def provenance(command: str) -> dict[str, Any]:
    """How figures came about: command, commit, machine. To be asked before the measurement, during which a commit may come."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    return {"command": command, "commit": commit, "environment": environment()}
