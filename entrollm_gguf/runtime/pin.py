# SPDX-License-Identifier: MIT
"""The pinned upstream source: `patches/llama.cpp/UPSTREAM`."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

from entrollm_gguf.errors import BuildError
from entrollm_gguf.runtime.paths import patches_folder


@dataclass(frozen=True)
class Pin:
    """Package, version and hash of the source distribution, and the llama.cpp commit inside it."""

    package: str
    version: str
    sha256: str
    llama_cpp_commit: str

    @property
    def sdist_name(self) -> str:
        """File name of the source distribution."""
        return f"{self.package.replace('-', '_')}-{self.version}.tar.gz"


def read_pin(folder: Path | None = None) -> Pin:
    """Read UPSTREAM.

    Raises:
        BuildError: it is damaged.
    """
    path = (folder or patches_folder()) / "UPSTREAM"
    try:
        return Pin(**tomllib.loads(path.read_text()))
    except (OSError, TypeError, tomllib.TOMLDecodeError) as error:
        raise BuildError(f"{path}: cannot be read ({error}); restore it from the repository") from error
