# SPDX-License-Identifier: MIT
"""From statistics by the checkpoint's names to statistics by GGUF names, whatever the converter
class does with names, rows and stacks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from entrollm_gguf.calibrate.cache import Gathered
from entrollm_gguf.calibrate.statistics import Statistics, TensorStatistics
from entrollm_gguf.convert.llama_cpp import SourceModel
from entrollm_gguf.errors import ConversionError


def to_gguf(gathered: Gathered, source: SourceModel) -> Statistics:
    """Statistics by GGUF names. The converter class rearranges stand-ins for the weights: first
    each row is filled with the row's value, then each column, and then the whole matrix with the
    number of its Hessian.

    Args:
        source: the folder that the statistics are of.
    Raises:
        ConversionError: no matrix of the GGUF has statistics.
    """
    modules = gathered.modules
    columns: dict[str, np.ndarray] = {}
    rows: dict[str, np.ndarray] = {}
    numbers: dict[str, np.ndarray] = {}
    paths = sorted({one.hessian for one in modules.values() if one.hessian is not None})
    number_of = {None: -1} | {path: i for i, path in enumerate(paths)}

    def keep(into: dict[str, np.ndarray], axis: int) -> Callable[[str, np.ndarray], None]:
        def handle(name: str, array: np.ndarray) -> None:
            if array.ndim in (2, 3) and np.isfinite(array).all():
                line = array.take(0, axis)
                if np.array_equal(line, array.take(-1, axis)):  # otherwise rows of different inputs were put together
                    into[name] = np.atleast_2d(line).copy()

        return handle

    source.rearranged({name: one.columns[None, :] for name, one in modules.items()}, keep(columns, -2))
    source.rearranged({name: one.rows[:, None] for name, one in modules.items()}, keep(rows, -1))
    source.rearranged(
        {name: np.full((1, 1), number_of[one.hessian], np.float32) for name, one in modules.items()},
        keep(numbers, -1),
    )
    tensors = {
        name: TensorStatistics(values, rows.get(name), _hessians(values, numbers.get(name), paths)) for name, values in columns.items()
    }
    if not tensors:
        raise ConversionError("the names of the weights are not those that transformers uses: no statistics fit; use --imatrix")
    return Statistics(gathered.source, tensors)


def _hessians(columns: np.ndarray, numbers: np.ndarray | None, paths: list[Path]) -> tuple[Path | None, ...] | None:
    """A file for each slab, None for one without; None for all where no slab has one, or where
    columns were rearranged so that they no longer fit.

    Args:
        columns: f32 (n_slabs, n_cols), in the GGUF's order.
        numbers: f32 (n_slabs, n_rows), of the paths; -1 for none.
    """
    if numbers is None or (numbers != numbers[:, :1]).any() or (numbers < 0).all():
        return None
    found = tuple(None if one < 0 else paths[int(one)] for one in numbers[:, 0])
    for path, values in zip(found, columns, strict=True):
        if path is None:
            continue
        diagonal = np.diagonal(np.load(path, mmap_mode="r"))
        if diagonal.shape != values.shape or not np.allclose(diagonal, values, rtol=1e-3, atol=1e-6 * float(values.max())):
            return None
    return found
