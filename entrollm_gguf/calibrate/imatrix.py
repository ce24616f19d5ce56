# SPDX-License-Identifier: MIT
"""Importance matrices of llama-imatrix (GGUF): for every matrix the mean square of each of its
inputs."""

from __future__ import annotations

import hashlib
import math
import warnings
from pathlib import Path

import numpy as np

from entrollm_gguf.calibrate.statistics import Statistics, TensorStatistics
from entrollm_gguf.errors import ConversionError, ConversionWarning, FormatError
from entrollm_gguf.gguf_io.patched import import_gguf

_SUMS, _COUNTS = ".in_sum2", ".counts"


def read_imatrix(path: str | Path) -> Statistics:
    """Column statistics from an imatrix file.

    Raises:
        FormatError: no such file, not an imatrix in GGUF, or values that cannot be sums of squares.
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
        if counts is None or counts.size != len(sums) or not (_are_sums(sums) and _are_sums(counts)):
            raise FormatError(f"{path}: {stem} has no valid sums and counts (numbers from 0 on); make the file again")
        counts = counts.reshape(-1, 1).astype(np.float32)
        if (counts > 0).any():  # experts that no token reached get the others' mean
            mean = sums / np.maximum(counts, 1)
            found[stem] = TensorStatistics(np.where(counts > 0, mean, mean[counts[:, 0] > 0].mean(axis=0)))
    if not found:
        raise FormatError(f"{path}: holds no importance values; llama-imatrix makes such files")
    return Statistics(f"imatrix sha256:{digest[:16]}", found)


def _are_sums(values: np.ndarray) -> bool:
    return bool(np.isfinite(values).all() and (values >= 0).all())


def check_fit(path: Path, statistics: Statistics, shapes: dict[str, tuple[int, ...]]) -> None:
    """Check that an imatrix was made with the model that is converted.

    Args:
        path: of the imatrix, for messages.
        statistics: what `read_imatrix` found in it.
        shapes: of the model's tensors, by GGUF name, numpy order.
    Raises:
        ConversionError: it has a tensor that the model lacks, or one of another width or another
            number of experts.
    """
    other = "this imatrix belongs to another model"
    known = {name: one for name, one in statistics.tensors.items() if name in shapes}
    unknown = sorted(
        name for name in statistics.tensors if name not in shapes and name.endswith(".weight")
    )  # "... (view)" is a part of a weight
    if not known:
        raise ConversionError(f"{path}: knows none of this model's tensors; {other}")
    if unknown:
        raise ConversionError(f"{path}: has {unknown[0]} ({len(unknown)} in all), which the model lacks; {other}")
    for name, one in known.items():
        n_matrices, n_cols = math.prod(shapes[name][:-2]), shapes[name][-1]
        if one.columns.shape[1] != n_cols:
            raise ConversionError(f"{path}: {name} has {one.columns.shape[1]} columns in the imatrix and {n_cols} in the model; {other}")
        if one.columns.shape[0] != n_matrices:
            raise ConversionError(
                f"{path}: {name} has {one.columns.shape[0]} matrices in the imatrix and {n_matrices} in the model; {other}"
            )
    without = {_layer(name) for name in shapes} - {_layer(name) for name in known} - {None}
    if without:  # layers that predict several tokens ahead are not run by llama-imatrix
        warnings.warn(f"{path}: has no values for layers {', '.join(map(str, sorted(without)))}", ConversionWarning, stacklevel=2)


def _layer(name: str) -> int | None:
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "blk" and parts[1].isdecimal() else None
