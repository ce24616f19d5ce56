# SPDX-License-Identifier: MIT
"""Statistics on the disk: whole files or none, believed only as far as they can be read."""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock, Timeout

from entrollm_gguf.errors import ConversionError
from entrollm_gguf.progress import Progress

# What reading a file of the cache raises if it is missing, cut short or something else.
DAMAGE = (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile)


@dataclass(frozen=True)
class ModuleStatistics:
    """Of one linear layer; names and orders are the checkpoint's."""

    columns: np.ndarray  # f32 (n_in,); zeros if no token reached it
    rows: np.ndarray  # f32 (n_out,)
    hessian: Path | None  # .npy, f32 (n_in, n_in); layers that share their input share the file; None if no token reached it


@dataclass(frozen=True)
class Gathered:
    """What `gather` found."""

    source: str  # for the file's metadata
    modules: dict[str, ModuleStatistics]  # by the name of the weight, "model.layers.0.mlp.up_proj.weight"


def cannot_keep(folder: Path, error: OSError) -> ConversionError:
    reason = error.strerror or " ".join(str(error).split())
    return ConversionError(f"{folder}: statistics cannot be kept there ({reason}); free its disk, or name another folder by ENTROLLM_CACHE")


@contextmanager
def locked(folder: Path, n_sequences: int, progress: Progress | None) -> Iterator[None]:
    """One process at a time gathers into a folder; others wait, and find the statistics."""
    lock = FileLock(folder.with_name(folder.name + ".lock"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if progress:
                progress(0, n_sequences, "waiting for another calibration of the model", "sequences")
            lock.acquire()
    except OSError as error:
        raise cannot_keep(folder, error) from error
    try:
        yield
    finally:
        lock.release()


def save(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """A file of the cache, whole or not at all.

    Raises:
        ConversionError: the disk is full or cannot be written.
    """
    part = path.with_name(f"part-{os.getpid()}-{path.name}")
    try:
        with open(part, "wb") as file:
            write(file)
        part.replace(path)
    except OSError as error:
        raise cannot_keep(path.parent, error) from error
    finally:
        part.unlink(missing_ok=True)


def hessian_file(folder: Path, site: str) -> Path:
    """Named after the layer, not numbered: whichever run made it, it belongs to this layer."""
    return folder / f"hessian-{re.sub(r'[^A-Za-z0-9._-]', '_', site.removesuffix('.weight'))}.npy"


def hessian_is_whole(path: Path, width: int) -> bool:
    try:
        return np.load(path, mmap_mode="r").shape == (width, width)
    except DAMAGE:
        return False


def read_complete(folder: Path, what: str) -> Gathered:
    """Complete statistics; raises one of DAMAGE if they are not."""
    complete = json.loads((folder / "complete.json").read_text(encoding="utf-8"))
    n, length = complete["tokens"]
    modules = {}
    with np.load(folder / "diagonals.npz") as arrays:
        for name, site in complete["hessians"].items():
            columns, path = arrays[f"columns/{name}"], None if site is None else hessian_file(folder, site)
            if path is not None and not hessian_is_whole(path, len(columns)):
                raise ValueError(f"{path} is damaged")
            modules[name] = ModuleStatistics(columns, arrays[f"rows/{name}"], path)
    return Gathered(f"{what}, {n} x {length} tokens", modules)


def load_complete(folder: Path, what: str) -> Gathered | None:
    """Complete statistics, or None. If they are not complete, the folder's mark of completeness is
    removed."""
    try:
        return read_complete(folder, what)
    except DAMAGE:
        try:
            (folder / "complete.json").unlink(missing_ok=True)
        except OSError as error:
            raise cannot_keep(folder, error) from error
        return None


def kept_tokens(path: Path, vocabulary: int) -> np.ndarray | None:
    """Tokens of an interrupted calibration, i64 (n, length)."""
    try:
        tokens = np.load(path)
        return tokens if tokens.ndim == 2 and tokens.size and tokens.min() >= 0 and tokens.max() < vocabulary else None
    except DAMAGE:
        return None


def kept_diagonals(path: Path, names: Collection[str]) -> dict[str, np.ndarray] | None:
    """Diagonals of an interrupted calibration."""
    try:
        with np.load(path) as arrays:
            return {f"{part}/{name}": arrays[f"{part}/{name}"] for part in ("columns", "rows") for name in names}
    except DAMAGE:
        return None


def check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ConversionError(
            f"{folder}: statistics take {needed * 1e-9:.1f} GB, {free * 1e-9:.1f} are free there; "
            "name a folder on a larger disk by ENTROLLM_CACHE, or use an importance matrix instead (--imatrix)"
        )
