# SPDX-License-Identifier: MIT
"""How the overlay and the patches fit another version of llama-cpp-python, which shows what has to
be done before the pin can move (docs/upgrading.md)."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from entrollm_gguf.errors import BuildError
from entrollm_gguf.runtime import tree
from entrollm_gguf.runtime.paths import patches_folder

# "error: patch failed: src/a.cpp:12", or what is wrong with a file: "error: src/a.cpp: No such file
# or directory"
_HUNK = re.compile(r"^error: patch failed: (.+:\d+)$", re.MULTILINE)
_FILE = re.compile(r"^error: (.+): (?!patch does not apply)(.+)$", re.MULTILINE)
_MOVED = re.compile(r"Hunk #\d+ succeeded at \d+ \(offset (-?\d+) lines?\)")


@dataclass(frozen=True)
class PatchResult:
    """What became of a patch."""

    name: str
    failures: tuple[str, ...]  # "src/llama.cpp:120"; empty: it applies
    offset: int = 0  # lines that its hunks moved by, at most


@dataclass(frozen=True)
class SourceCheck:
    """What became of all."""

    patches: tuple[PatchResult, ...]
    overwritten: tuple[str, ...]  # files of the overlay that upstream has as well

    @property
    def fits(self) -> bool:
        """Whether a build can be tried."""
        return not self.overwritten and all(not one.failures for one in self.patches)


def check_source(sdist: Path) -> SourceCheck:
    """Try every patch on another source distribution. One that fails is left out, and the others go
    on.

    Args:
        sdist: llama_cpp_python-*.tar.gz.
    Raises:
        BuildError: no such file, damaged, or git is missing.
    """
    if not sdist.is_file():
        raise BuildError(
            f"{sdist}: no such file; name a source distribution of llama-cpp-python (pip download --no-deps --no-binary :all: llama-cpp-python==VERSION)"
        )
    patches = patches_folder()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "source"
        tree.unpack(sdist, folder)
        llama_cpp = folder / tree.LLAMA_CPP
        overwritten = tree.add_overlay(patches, llama_cpp)
        results = tuple(_try(patch, llama_cpp) for patch in tree.series(patches))
    return SourceCheck(results, tuple(str(path) for path in overwritten))


def _try(patch: Path, folder: Path) -> PatchResult:
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.resolve().parent), "LC_ALL": "C"}
    command = [tree.git(), "apply", "--verbose", "--whitespace=nowarn", str(patch.resolve())]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if result.returncode == 0:
        return PatchResult(patch.name, (), max((abs(int(one)) for one in _MOVED.findall(result.stderr)), default=0))
    hunks = _HUNK.findall(result.stderr)
    files = [f"{name} ({why})" for name, why in _FILE.findall(result.stderr) if name not in ("patch failed", "while searching for")]
    return PatchResult(patch.name, tuple(dict.fromkeys(hunks + files)) or ("no reason given",))
