# SPDX-License-Identifier: MIT
"""Running the runtime's command-line tools: output captured, failures as one line."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from entrollm_gguf import runtime
from entrollm_gguf.errors import FormatError, ToolError

# llama.cpp first says what went wrong and then, several times, that something did.
_ERROR_LINE = re.compile(r"error|failed|invalid|refus|cannot|unable|must", re.IGNORECASE)


def run_tool(name: str, arguments: Sequence[str | Path], *, model: Path, mode: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a tool of the runtime on a model file.

    Args:
        mode: auto, load or fused (docs/runtime-modes.md); None leaves it to the environment.
    Returns:
        the completed process, with stdout and stderr as text.
    Raises:
        FormatError: the model file does not exist.
        ToolError: the tool failed; the message carries its first complaint.
        RuntimeMissingError: the runtime is not installed.
    """
    if not model.is_file():
        raise FormatError(f"{model}: no such file")
    command = [str(runtime.tool(name)), *map(str, arguments)]
    environment = os.environ if mode is None else {**os.environ, "GGML_ENTROPY_MODE": mode}
    # the tools write UTF-8 in every locale
    result = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", stdin=subprocess.DEVNULL, env=environment)
    if result.returncode != 0:
        raise ToolError(f"{model}: {name} failed: {_complaint(result)}")
    return result


def _complaint(result: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in (result.stderr + "\n" + result.stdout).splitlines() if line.strip()]
    complaints = [line for line in lines if _ERROR_LINE.search(line)]
    if result.returncode < 0:
        return f"ended by signal {-result.returncode}" + (f" after: {lines[-1]}" if lines else "")
    chosen = complaints or lines[-1:]
    return chosen[0] if chosen else f"exit code {result.returncode}"
