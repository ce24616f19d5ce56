# SPDX-License-Identifier: MIT
"""Whether llama.cpp loads a file, told without its weights: metadata, vocabulary, and every tensor that the architecture asks for, with its shape.

The file runs as a program of its own, because llama.cpp aborts on some files.
"""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import types
from pathlib import Path

_REFUSED = 3  # exit code
_ABORTS = {-signal.SIGABRT, -signal.SIGFPE, -signal.SIGSEGV}


def why_it_does_not_load(path: Path) -> str | None:
    """What llama.cpp says of a GGUF that it does not load, or None where it loads it, or where that cannot be found out.

    Args:
        path: the weights may be anything; they are not read.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("GGML_", "LLAMA_"))}
    environment = {**kept, "CUDA_VISIBLE_DEVICES": "", "GGML_NO_BACKTRACE": "1"}
    command = [sys.executable, "-P", __file__, str(path)]  # -P: this folder has a module llama_cpp, too
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment, cwd=path.parent)
    if result.returncode == _REFUSED:
        return " ".join(result.stdout.split())
    if result.returncode in _ABORTS:
        failed = re.search(r"GGML_ASSERT\(.*\) failed", result.stderr)
        return failed[0] if failed else f"it ends with {signal.Signals(-result.returncode).name}"
    return None


def _load(path: str) -> int:
    """Load without weights; what llama.cpp complains of is printed."""
    # the module of the C functions alone: the package's own __init__ takes longer than all else
    spec = importlib.util.find_spec("llama_cpp")
    package = types.ModuleType("llama_cpp")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["llama_cpp"] = package
    from llama_cpp import llama_cpp as library

    errors: list[str] = []

    @library.llama_log_callback
    def log(level: int, text: bytes, _: object) -> None:
        if level == 4:  # GGML_LOG_LEVEL_ERROR
            errors.append(text.decode(errors="replace"))

    library.llama_log_set(log, None)
    library.llama_backend_init()
    parameters = library.llama_model_default_params()
    parameters.no_alloc = True
    parameters.load_mode = library.LLAMA_LOAD_MODE_NONE
    parameters.n_gpu_layers = 0
    if library.llama_model_load_from_file(os.fsencode(path), parameters):
        return 0
    said = "".join(errors)
    reason = re.search(r"error loading model[^:\n]*: (.*)", said)
    print(reason[1] if reason else said)
    return _REFUSED


if __name__ == "__main__":
    sys.exit(_load(sys.argv[1]))
