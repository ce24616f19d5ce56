# SPDX-License-Identifier: MIT
"""The source tree of a build: pinned source, overlay and patch series, updated in such a way that a
small change rebuilds little."""

from __future__ import annotations

import filecmp
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from filelock import FileLock

from entrollm_gguf.errors import BuildError
from entrollm_gguf.runtime.paths import cache_folder
from entrollm_gguf.runtime.pin import Pin

LLAMA_CPP = Path("vendor") / "llama.cpp"

# None of these is compiled or installed; leaving them out halves the copying.
# The file .git points to a superproject that is not there, which makes git fail.
_UNUSED = (".git", "media/", "models/", "docs/", "benches/", "pocs/", "ci/", ".devops/")


def series(patches: Path) -> list[Path]:
    """The patches in order."""
    return sorted((patches / "series").glob("*.patch"))


def overlay_files(patches: Path) -> list[Path]:
    """Files of the overlay, relative to it, in order."""
    root = patches / "overlay"
    return sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file())


def unpacked_source(sdist: Path, pin: Pin) -> Path:
    """The pristine source, unpacked once into the cache. Callers must not change it.

    Raises:
        BuildError: the archive is damaged.
    """
    target = cache_folder() / "sources" / f"{pin.package}-{pin.version}-{pin.sha256[:12]}"
    target.parent.mkdir(parents=True, exist_ok=True)
    # builds of different kinds run side by side and share this folder
    with FileLock(cache_folder() / "sources.lock"):
        if not target.is_dir():
            unpack(sdist, target)
    return target


def unpack(sdist: Path, target: Path) -> None:
    """Unpack a source distribution, without the parts that no build needs.

    Args:
        target: folder that does not exist yet, in one that does.
    Raises:
        BuildError: the archive is damaged, or holds no llama.cpp.
    """
    # Python 3.11.2, which Debian 12 ships, has no filters yet; _wanted itself refuses what could
    # leave the folder
    filtering = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        try:
            with tarfile.open(sdist) as archive:
                archive.extractall(folder, members=_wanted(archive), **filtering)
        except (tarfile.TarError, OSError, EOFError) as error:
            raise BuildError(f"{sdist}: cannot be unpacked ({error}); delete it and try again") from error
        roots = [path for path in Path(folder).iterdir() if (path / LLAMA_CPP).is_dir()]
        if len(roots) != 1:
            raise BuildError(f"{sdist}: holds no llama.cpp tree")
        roots[0].replace(target)


def _wanted(archive: tarfile.TarFile):
    for member in archive:
        if member.name.startswith("/") or ".." in member.name.split("/"):
            raise tarfile.TarError(f"{member.name} lies outside")
        if not (member.isfile() or member.isdir()):
            continue  # links and devices: the build needs none
        inside = member.name.partition("/")[2]
        if inside.startswith(f"{LLAMA_CPP.as_posix()}/"):
            if not inside.removeprefix(f"{LLAMA_CPP.as_posix()}/").startswith(_UNUSED):
                yield member
        elif inside.startswith("llama_cpp/") or inside in ("LICENSE.md", "README.md"):
            yield member


def assemble(source: Path, patches: Path, target: Path) -> None:
    """Overlay and patches on top of a copy of the source.

    Args:
        source: pristine unpacked source (hard links are made to its files).
        target: folder that does not exist yet.
    Raises:
        BuildError: a patch does not apply; names it.
    """
    shutil.copytree(source, target, copy_function=_link, symlinks=True)
    llama_cpp = target / LLAMA_CPP
    add_overlay(patches, llama_cpp)
    for patch in series(patches):
        apply_patch(patch, llama_cpp)


def add_overlay(patches: Path, llama_cpp: Path) -> list[Path]:
    """Copy the overlay into a tree of llama.cpp; returns files that were there before."""
    there = []
    for relative in overlay_files(patches):
        destination = llama_cpp / relative
        destination.parent.mkdir(parents=True, exist_ok=True)
        if destination.exists():
            there.append(relative)
            destination.unlink()  # never write through a hard link
        shutil.copyfile(patches / "overlay" / relative, destination)
    return there


def _link(source: str, destination: str) -> None:
    try:
        os.link(source, destination)
    except OSError:  # another file system
        shutil.copy2(source, destination)


def git() -> str:
    """Path of the git program.

    Raises:
        BuildError: it is missing.
    """
    found = shutil.which("git")
    if found is None:
        raise BuildError("git is missing; it applies the patches (apt-get install git)")
    return found


def apply_patch(patch: Path, folder: Path) -> None:
    """Apply one git patch to a folder that is no repository.

    Raises:
        BuildError: git is missing or the patch does not apply.
    """
    # without the ceiling, git would find a repository around the folder and silently skip the files
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.resolve().parent)}
    command = [git(), "apply", "--whitespace=nowarn", str(patch.resolve())]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or ["no output"])[0]
        raise BuildError(f"{patch.name}: does not apply ({reason}); the series and the pinned source do not belong together")


def sync(source: Path, target: Path) -> None:
    """Make target equal to source, leaving files with equal content and their times alone, so that
    ninja rebuilds only what changed."""
    target.mkdir(parents=True, exist_ok=True)
    wanted = {path.relative_to(source) for path in source.rglob("*")}
    for path in sorted(target.rglob("*"), reverse=True):
        relative = path.relative_to(target)
        if relative not in wanted:
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    for relative in sorted(wanted):
        new, old = source / relative, target / relative
        if new.is_dir():
            old.mkdir(exist_ok=True)
        elif not old.is_file() or not _same(new, old):
            old.unlink(missing_ok=True)
            shutil.copyfile(new, old)
            shutil.copymode(new, old)


def _same(a: Path, b: Path) -> bool:
    return a.stat().st_size == b.stat().st_size and filecmp.cmp(a, b, shallow=False)
