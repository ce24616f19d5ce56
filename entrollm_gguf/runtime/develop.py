# SPDX-License-Identifier: MIT
"""Editing the patch series: the tree as a git repository, and back. Patches are numbered in tens
and exported without anything that changes between machines."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from entrollm_gguf.errors import BuildError
from entrollm_gguf.runtime import tree
from entrollm_gguf.runtime.fetch import fetch_sdist
from entrollm_gguf.runtime.paths import patches_folder
from entrollm_gguf.runtime.pin import read_pin

_AUTHOR = (
    "-c",
    "user.name=EntroLLM-GGUF contributors",
    "-c",
    "user.email=contributors@entrollm-gguf.invalid",
    "-c",
    "commit.gpgsign=false",
)
_FROM = "From: EntroLLM-GGUF contributors <contributors@entrollm-gguf.invalid>"
_NAME_LENGTH = 59  # of the subject in a file name
_OVERLAY_TAG = "entrollm-overlay"


def _git(folder: Path, *arguments: str) -> str:
    result = subprocess.run(["git", *_AUTHOR, *arguments], cwd=folder, capture_output=True, text=True)
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or ["no output"])[-1]
        raise BuildError(f"{folder}: git {arguments[0]} failed: {reason}")
    return result.stdout


def make_tree(folder: Path) -> None:
    """Pinned source, overlay and one commit per patch.

    Raises:
        BuildError: the folder exists, or a patch does not apply.
    """
    if folder.exists():
        raise BuildError(f"{folder}: already exists; name a new folder")
    patches, pin = patches_folder(), read_pin()
    source = tree.unpacked_source(fetch_sdist(pin), pin)
    shutil.copytree(source / tree.LLAMA_CPP, folder)
    _git(folder, "init", "-q")
    _git(folder, "add", "-A", "-f")
    _git(folder, "commit", "-q", "-m", f"llama.cpp {pin.llama_cpp_commit}")
    shutil.copytree(patches / "overlay", folder, dirs_exist_ok=True)
    _git(folder, "add", "-A", "-f")
    _git(folder, "commit", "-q", "--allow-empty", "-m", "overlay")
    _git(folder, "tag", _OVERLAY_TAG)
    if tree.series(patches):
        _git(folder, "am", "-3", "-q", *(str(path.resolve()) for path in tree.series(patches)))


def export_tree(folder: Path) -> list[str]:
    """Write series/ and overlay/ from a tree that make_tree made; returns the names of the patches.

    A patch keeps its number as long as its subject does; new ones take the next ten.
    """
    patches = patches_folder()
    commits = _git(folder, "rev-list", "--reverse", f"{_OVERLAY_TAG}..HEAD").split()
    overlay = patches / "overlay"
    for relative in tree.overlay_files(patches):
        shutil.copyfile(folder / relative, overlay / relative)
    # overlay files go back to the overlay; in a patch as well they would be changed twice
    others = ["--", ".", *(f":(exclude){path.as_posix()}" for path in tree.overlay_files(patches))]
    numbers = {path.name.split("-", 1)[1]: int(path.name[:4]) for path in tree.series(patches)}
    exported: list[tuple[str, str]] = []
    last = 0
    for commit in commits:
        subject = _git(folder, "show", "-s", "--format=%f", commit).strip()[:_NAME_LENGTH].rstrip("-")
        text = _git(folder, "format-patch", "--zero-commit", "--no-signature", "--stdout", f"{commit}^..{commit}", *others)
        if not text:
            continue  # changed overlay files only
        text = re.sub(r"^From: .*(\n .*)*$", _FROM, text, count=1, flags=re.MULTILINE)
        text = re.sub(r"^Date: .*$", "Date: Thu, 1 Jan 2026 00:00:00 +0000", text, count=1, flags=re.MULTILINE)
        number = max(numbers.get(f"{subject}.patch", 0), last // 10 * 10 + 10)
        last = number
        exported.append((f"{number:04}-{subject}.patch", text))
    for path in tree.series(patches):
        path.unlink()
    for name, text in exported:
        (patches / "series" / name).write_text(text)
    return [name for name, _ in exported]
