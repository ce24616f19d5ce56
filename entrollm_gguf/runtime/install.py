# SPDX-License-Identifier: MIT
"""Installing the packed runtime into the environment that runs this."""

from __future__ import annotations

import importlib
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from entrollm_gguf.errors import BuildError


def is_installed(short_hash: str) -> bool:
    """Whether both packages of this hash are installed."""
    try:
        return all(version(name).endswith(f"+entrollm.{short_hash}") for name in ("llama_cpp_python", "gguf"))
    except PackageNotFoundError:
        return False


def install(wheels: list[Path]) -> None:
    """pip install, replacing what is there. Dependencies are those of entrollm-gguf itself, so none
    is fetched.

    Raises:
        BuildError: pip failed.
    """
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", *map(str, wheels)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        reason = ([line for line in result.stderr.splitlines() if "ERROR" in line] or ["no output"])[0]
        raise BuildError(f"{wheels[0].name}: pip cannot install it ({reason})")
    importlib.invalidate_caches()
