# SPDX-License-Identifier: MIT
"""A look at all tensors before any is coded, where a size decides the steps."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from entrollm_gguf.convert.basis import Basis
from entrollm_gguf.convert.budget import Sensitivity, Survey, sensitivity
from entrollm_gguf.convert.encode import TensorRecord
from entrollm_gguf.convert.metadata import metadata
from entrollm_gguf.convert.recipes import RATE
from entrollm_gguf.convert.source import Source
from entrollm_gguf.convert.tensor import Treatment, keep, leave_tensor
from entrollm_gguf.convert.walk import Fate, Task, walk
from entrollm_gguf.errors import ConversionError
from entrollm_gguf.progress import Progress
from entrollm_gguf.quant import NotFiniteError, Profile, QuantizeError, profile, quantize_step
from entrollm_gguf.quant.feedback import workspace
from entrollm_gguf.quant.step import step_scheme

_LONGEST_SCHEME = step_scheme(0, rows=True, feedback=True)  # stands for all of a survey


def treatments(survey: Survey, basis: Basis, step: float) -> Callable[[str], Treatment]:
    """What is done with each tensor, by GGUF name, for the model's step."""

    def find(name: str) -> Treatment:
        if name not in survey.profiles:  # it stays in a stock type, since no step suits it
            return Treatment(RATE.kind, functools.partial(quantize_step, step=step))
        sensitive, hessian = survey.sensitivities.get(name), _hessian(name, basis)
        quantizer = functools.partial(
            quantize_step,
            step=step * survey.factor(name),
            row_factors=None if sensitive is None else sensitive.row_factors,
            hessian=hessian,
        )
        room = 0 if hessian is None else workspace(survey.profiles[name].shape[-1])
        return Treatment(RATE.kind, quantizer, room)

    return find


def _hessian(name: str, basis: Basis) -> Callable[[int], np.ndarray] | None:
    """The Hessian of a slab's inputs as they are after folding."""
    statistics = None if basis.statistics is None else basis.statistics.tensors.get(name)
    if statistics is None or statistics.hessians is None:
        return None
    factors = basis.folding.columns.get(name)

    def load(slab: int) -> np.ndarray:
        h = np.array(statistics.hessian(slab))
        return h if factors is None else h / factors[slab][:, None] / factors[slab][None, :]

    return load


def survey_model(source: Source, basis: Basis, *, threads: int | None = None, progress: Progress | None = None) -> Survey:
    """Look at every tensor once, to learn what matrices cost at any step and what everything else
    takes.

    Args:
        basis: from `prepare`.
    Raises:
        ConversionError, UnsupportedModelError: as for convert_model.
    """
    total, done = source.n_elements(), 0
    profiles: dict[str, Profile] = {}
    kept: dict[str, TensorRecord] = {}
    sensitivities: dict[str, Sensitivity] = {}

    def look(task: Task) -> tuple[str, Profile | TensorRecord, Sensitivity | None]:
        if task.decision.fate is not Fate.CODED:
            return task.name, leave_tensor(task, basis.folding)[1], None
        weights = basis.folding.apply(task.name, task.data)
        statistics = None if basis.statistics is None else basis.statistics.tensors.get(task.name)
        one = sensitivity(task.name, weights, statistics, basis.folding)
        try:
            return task.name, profile(weights, None if one is None else one.row_factors), one
        except NotFiniteError as error:
            raise ConversionError(f"tensor {task.name}: {error}; the checkpoint is damaged or its training diverged") from error
        except QuantizeError as error:
            return task.name, keep(task.name, weights, str(error))[1], None

    def note(found: tuple[str, Profile | TensorRecord, Sensitivity | None]) -> None:
        nonlocal done
        name, one, sensitive = found
        if isinstance(one, TensorRecord):
            kept[name] = one
            done += one.n_elements
        else:
            profiles[name] = one
            done += one.n_weights
        if sensitive is not None:
            sensitivities[name] = sensitive
        if progress:
            progress(done, total, name, "weights")

    walk(source, threads, look, note)
    # the size of a header without data, to which each tensor adds its name, shape, type and place
    records = [TensorRecord(name, "", one.shape, 0, _LONGEST_SCHEME) for name, one in profiles.items()] + list(kept.values())
    with tempfile.TemporaryDirectory() as folder:
        header = Path(folder) / "header.gguf"
        source.write_file(header, (), metadata(RATE, tuple(records), basis), 0)
        n_header = header.stat().st_size
    infos = sum(len(record.name.encode()) + 8 + 4 + 8 * len(record.shape) + 4 + 8 for record in records)
    return Survey(profiles, kept, n_header + infos + 32 * (len(records) + 1), sensitivities, source.heads())
