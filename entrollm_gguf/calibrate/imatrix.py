# SPDX-License-Identifier: MIT
"""Importance matrices of llama-imatrix (GGUF): for every matrix the mean square of each of its inputs."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from entrollm_gguf.calibrate.statistics import Statistics, TensorStatistics
from entrollm_gguf.errors import FormatError
from entrollm_gguf.gguf_io.patched import import_gguf

_SUMS, _COUNTS = ".in_sum2", ".counts"


def read_imatrix(path: str | Path) -> Statistics:
    """Column statistics from an imatrix file.

    Raises:
        FormatError: no such file, not an imatrix in GGUF, or values that are no numbers.
    """
    path = Path(path)
    if not path.is_file():
        raise FormatError(f"{path}: no such file; llama-imatrix -m MODEL.gguf -f TEXT -o {path} makes it")
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise FormatError(f"{path}: not a GGUF; llama-imatrix --in-file {path} -o NEW.gguf converts old imatrix files")
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    try:
        reader = import_gguf().GGUFReader(path)
        arrays = {tensor.name: np.array(tensor.data) for tensor in reader.tensors if tensor.name.endswith((_SUMS, _COUNTS))}
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise FormatError(f"{path}: damaged or cut short ({' '.join(str(error).split())}); make it again") from error
    found: dict[str, TensorStatistics] = {}
    for name, sums in arrays.items():
        if not name.endswith(_SUMS):
            continue
        stem = name.removesuffix(_SUMS)
        counts = arrays.get(stem + _COUNTS)
        sums = np.atleast_2d(sums).astype(np.float32)
        if counts is None or counts.size != len(sums) or not (np.isfinite(sums).all() and np.isfinite(counts).all()):
            raise FormatError(f"{path}: {stem} has no valid sums and counts; make the file again")
        counts = counts.reshape(-1, 1).astype(np.float32)
        if (counts > 0).any():  # experts that no token came to have the others' mean
            mean = sums / np.maximum(counts, 1)
            found[stem] = TensorStatistics(np.where(counts > 0, mean, mean[counts[:, 0] > 0].mean(axis=0)))
    if not found:
        raise FormatError(f"{path}: holds no importance values; llama-imatrix makes such files")
    return Statistics(f"imatrix sha256:{digest[:16]}", found)
