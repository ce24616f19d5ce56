# SPDX-License-Identifier: MIT
"""Where the installed runtime is and what it is made of; imports neither llama_cpp nor gguf."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from entrollm_gguf.errors import RuntimeMissingError
from entrollm_gguf.runtime.wheels import MANIFEST, TOOLS

_REMEDY = "run `entrollm runtime build`"


@dataclass(frozen=True)
class RuntimeInfo:
    """The runtime of this environment."""

    hash: str  # of everything that went into the build
    version: str  # of llama-cpp-python
    llama_cpp_commit: str
    cuda: bool
    cuda_arch: str  # as CMAKE_CUDA_ARCHITECTURES takes it; empty without CUDA
    compiler: str
    build_seconds: float
    folder: Path  # the llama_cpp package
    programs: tuple[str, ...]  # in folder/bin
    portable: bool = False  # made for other machines, too, by `entrollm runtime wheel`
    https: bool = False  # llama.cpp's tools download over HTTPS (`-hf`)


def info() -> RuntimeInfo:
    """The installed runtime.

    Raises:
        RuntimeMissingError: none is installed, or the stock llama-cpp-python is.

    >>> from entrollm_gguf import runtime_info
    >>> "llama-server" in runtime_info().programs
    True
    """
    return read_manifest(_package_folder())


def read_manifest(folder: Path) -> RuntimeInfo:
    """The runtime whose llama_cpp package lies in `folder`."""
    try:
        data = json.loads((folder / MANIFEST).read_text())
        return RuntimeInfo(
            data["hash"], data["version"], data["llama_cpp_commit"], data["cuda"], data["cuda_arch"], data["compiler"],
            data["build_seconds"], folder, tuple(data["programs"]), data.get("portable", False),
            data.get("https", False),
        )  # fmt: skip
    except FileNotFoundError as error:
        raise RuntimeMissingError(f"the installed llama-cpp-python is the stock one; {_REMEDY} to replace it") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RuntimeMissingError(f"{folder / MANIFEST}: damaged; {_REMEDY}") from error


def tool(name: str) -> Path:
    """Path of a program: a command as in `llama-bench`, or one of upstream's tests.

    Raises:
        RuntimeMissingError: no runtime, or one without it.
    """
    path = _package_folder() / "bin" / TOOLS.get(name, name)
    if not path.is_file():
        remedy = "run `entrollm runtime build --tests`" if name.startswith("test-") else _REMEDY
        raise RuntimeMissingError(f"the installed runtime has no {name}; {remedy}")
    return path


def library(stem: str) -> Path:
    """Path of a shared library, e.g. "ggml-base".

    Raises:
        RuntimeMissingError: no runtime, or one without it.
    """
    suffix = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
    prefix = "" if sys.platform == "win32" else "lib"
    path = _package_folder() / "lib" / f"{prefix}{stem}{suffix}"
    if not path.is_file():
        raise RuntimeMissingError(f"the installed runtime has no library {stem}; {_REMEDY}")
    return path


def conversion_path() -> Path:
    """Folder with llama.cpp's `conversion` package and convert_hf_to_gguf.py.

    Raises:
        RuntimeMissingError: no patched runtime.
    """
    path = _package_folder() / "convert"
    if not path.is_dir():
        raise RuntimeMissingError(f"the installed llama-cpp-python is the stock one; {_REMEDY} to replace it")
    return path


def _package_folder() -> Path:
    spec = importlib.util.find_spec("llama_cpp")  # does not import a top-level package
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeMissingError(f"the patched llama.cpp is not installed; {_REMEDY}")
    return Path(next(iter(spec.submodule_search_locations)))
