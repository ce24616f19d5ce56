# SPDX-License-Identifier: MIT
"""Folders: the patches that belong to this package, and the user's cache."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

from entrollm_gguf.errors import BuildError


def patches_folder() -> Path:
    """`patches/llama.cpp` of the checkout, or its copy inside an installed package.

    Raises:
        BuildError: neither is there.
    """
    package = Path(__file__).resolve().parent.parent
    for candidate in (package.parent / "patches" / "llama.cpp", package / "_patches" / "llama.cpp"):
        if (candidate / "UPSTREAM").is_file():
            return candidate
    raise BuildError(f"{package}: comes without its patches; install entrollm-gguf again")


def cache_folder() -> Path:
    """Where downloads and built runtimes are kept; ENTROLLM_CACHE names another folder."""
    chosen = os.environ.get("ENTROLLM_CACHE")
    return Path(chosen).expanduser().resolve() if chosen else Path(platformdirs.user_cache_dir("entrollm-gguf"))
