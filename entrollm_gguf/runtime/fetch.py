# SPDX-License-Identifier: MIT
"""The source distribution: downloaded once by pip, checked against its hash, kept in the cache."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

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
