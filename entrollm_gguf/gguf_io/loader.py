# SPDX-License-Identifier: MIT
"""What llama.cpp's own loader says about a file, so that its checks need not be repeated here.

It runs in a process of its own, which is this file as a program: on some files upstream aborts.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

_REFUSED = 3  # exit code of the program; Python's own failures have 1


def why_not_loaded(path: Path, *, is_model: bool = True) -> str | None:
    """Load everything of a model except its weights: metadata, vocabulary, and types, shapes and
    places of all tensors.

    Args:
        path: a GGUF file, or the first part of a split one. Its weights may be anything; they are
            not read.
        is_model: False for an adapter and the like: then ggml only reads the file, as it does for
            every loader.
    Returns:
        what llama.cpp does and why, "refuses it: ..." or "ends by SIGABRT", one line, or None if it
            takes the file.
    Raises:
        RuntimeMissingError: the runtime is not installed.
        ToolError: it cannot be started.
    """
    from entrollm_gguf import runtime  # imported here, since this file as a program does without the package
    from entrollm_gguf.errors import ToolError

    runtime.info()  # raises if there is none
    # switches in the user's environment are not part of the file, and every backend has load mode
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("GGML_", "LLAMA_"))}
    environment = {**kept, "GGML_ENTROPY_MODE": "load", "GGML_NO_BACKTRACE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONIOENCODING": "utf-8"}
    library = [] if is_model else [str(runtime.library("ggml-base"))]
    command = [sys.executable, "-P", __file__, str(path.absolute()), *library]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", stdin=subprocess.DEVNULL, env=environment)
    if result.returncode == 0:
        return None
    said = [line for line in (result.stdout + result.stderr).splitlines() if line.strip()]
    if result.returncode < 0:
        return f"ends by {signal.Signals(-result.returncode).name}" + (f" after: {said[0]}" if said else "")
    if result.returncode != _REFUSED:
        raise ToolError(f"{path}: llama.cpp's loader cannot be started: {said[-1] if said else f'exit code {result.returncode}'}")
    return f"refuses it: {said[0] if said else 'without a word'}"


def _load_model(path: str) -> bool:
    """Whether the model loads; prints the errors of the log."""
    # only the module with the C functions: the package's own __init__ takes longer than everything
    # else
    package = types.ModuleType("llama_cpp")
    package.__path__ = list(importlib.util.find_spec("llama_cpp").submodule_search_locations)
    sys.modules["llama_cpp"] = package
    from llama_cpp import llama_cpp

    error_level = 4  # GGML_LOG_LEVEL_ERROR

    @llama_cpp.llama_log_callback
    def log(level: int, text: bytes, _: object) -> None:
        if level == error_level:
            # "function: what is wrong"; the function says nothing to a user
            line = text.decode(errors="replace").strip()
            print(line.partition(": ")[2].removeprefix("error loading model: ") or line, flush=True)

    llama_cpp.llama_log_set(log, None)
    llama_cpp.llama_backend_init()  # in a portable runtime, backends are libraries that nobody has loaded yet
    parameters = llama_cpp.llama_model_default_params()
    parameters.no_alloc, parameters.load_mode, parameters.n_gpu_layers = True, llama_cpp.LLAMA_LOAD_MODE_NONE, 0
    return bool(llama_cpp.llama_model_load_from_file(os.fsencode(path), parameters))


class _InitParams(ctypes.Structure):
    """struct gguf_init_params."""

    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]


def _load_gguf(path: str, library: str) -> bool:
    """Whether ggml reads the file; it prints its errors itself."""
    ggml = ctypes.CDLL(library)
    ggml.gguf_init_from_file.argtypes = [ctypes.c_char_p, _InitParams]
    ggml.gguf_init_from_file.restype = ctypes.c_void_p
    return bool(ggml.gguf_init_from_file(os.fsencode(path), _InitParams(True, None)))


if __name__ == "__main__":
    sys.exit(0 if (_load_gguf if len(sys.argv) > 2 else _load_model)(*sys.argv[1:]) else _REFUSED)
