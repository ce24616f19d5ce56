# SPDX-License-Identifier: MIT
"""What precedes a conversion to a size: statistics, factors to fold, and a survey of all
tensors."""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from entrollm_gguf import __version__
from entrollm_gguf.calibrate import Statistics, check_fit, gather, read_imatrix
from entrollm_gguf.convert.budget import Sensitivity, Survey, sensitivity
from entrollm_gguf.convert.calibrated import to_gguf
from entrollm_gguf.convert.encode import TensorRecord
from entrollm_gguf.convert.fold import EXPONENT, Folding, plan_folding
from entrollm_gguf.convert.llama_cpp import SourceModel, evaluate
from entrollm_gguf.convert.recipes import RATE, Recipe
from entrollm_gguf.convert.source import Source, as_folder
from entrollm_gguf.convert.tensor import Decision, Fate, Treatment, chunked_record, decide, keep, leave_tensor
from entrollm_gguf.convert.window import window
from entrollm_gguf.errors import ConversionError
from entrollm_gguf.progress import Progress
from entrollm_gguf.quant import NotFiniteError, Profile, QuantizeError, profile, quantize_step
from entrollm_gguf.quant.feedback import workspace
from entrollm_gguf.texts import read_text

FORMAT_VERSION = 2

_SAMPLE = 4000  # characters of a text by which a GGUF's vocabulary is compared

# as long as any that `quantize_step` makes
_SOME_SCHEME = "step-0.0000-rows-feedback"


@dataclass(frozen=True)
class Calibration:
    """Where statistics come from: exactly one of text, own_text and imatrix.

    >>> from entrollm_gguf import Calibration
    >>> Calibration(text=Path("text.txt"), n_sequences=8).fold
    True
    >>> Calibration()
    Traceback (most recent call last):
    ValueError: a calibration is from a text, own_text or an imatrix
    """

    text: Path | None = None  # a text for the model to read
    own_text: bool = False  # text that the model writes
    imatrix: Path | None = None  # a file of llama-imatrix
    n_sequences: int = 40  # of 512 tokens, for the first two
    seed: int = 0
    fold: bool = True  # columns are equalised: better, but LoRA adapters made for the model no longer fit

    def __post_init__(self) -> None:
        """Check that there is exactly one source.

        Raises:
            ValueError: none or several.
        """
        if (self.text is not None) + self.own_text + (self.imatrix is not None) != 1:
            raise ValueError("a calibration is from a text, own_text or an imatrix")


@dataclass(frozen=True)
class Basis:
    """What is known of a model before its weights are looked at."""

    statistics: Statistics | None
    folding: Folding


def prepare(
    source: Source, path: Path, calibration: Calibration | None, *, threads: int | None = None, progress: Progress | None = None
) -> Basis:
    """Statistics, from the cache or gathered now, and the factors that follow from them.

    Args:
        path: of the source.
    Raises:
        ConversionError, FormatError: see `calibrate.gather` and `calibrate.read_imatrix`.
    """
    if calibration is None:
        return Basis(None, Folding())
    outline = source.outline()
    shapes = outline.shapes
    if calibration.imatrix is not None:
        statistics = read_imatrix(calibration.imatrix)
        check_fit(calibration.imatrix, statistics, shapes)
    else:
        text = None if calibration.own_text else calibration.text
        with as_folder(path, None if text is None else read_text(text)[:_SAMPLE]) as folder:
            readable = SourceModel(folder)
            gathered = gather(
                folder,
                text,
                n_sequences=calibration.n_sequences,
                seed=calibration.seed,
                threads=threads,
                names=readable.names(),
                progress=progress,
            )
            statistics = to_gguf(gathered, readable)
    if not calibration.fold:
        return Basis(statistics, Folding())
    return Basis(statistics, plan_folding(source.architecture, shapes, source.heads(), statistics, untouchable=outline.quantized))


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

    def look(name: str, weights: np.ndarray) -> tuple[str, Profile | TensorRecord, Sensitivity | None]:
        weights = basis.folding.apply(name, weights)
        statistics = None if basis.statistics is None else basis.statistics.tensors.get(name)
        one = sensitivity(name, weights, statistics, basis.folding)
        try:
            return name, profile(weights, None if one is None else one.row_factors), one
        except NotFiniteError as error:
            raise ConversionError(f"tensor {name}: {error}; the checkpoint is damaged or its training diverged") from error
        except QuantizeError as error:
            return name, keep(name, weights, str(error))[1], None

    def leave(name: str, data: np.ndarray, raw_dtype: int | None, decision: Decision, threads: int) -> tuple[str, TensorRecord, None]:
        return name, leave_tensor(name, data, raw_dtype, decision, basis.folding, threads)[1], None

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
            progress(done, total, name)

    with window(threads) as jobs:

        def handle(name: str, data: Any, raw_dtype: int | None) -> None:
            decision = decide(name, data, raw_dtype)
            room = math.prod(data.shape)
            if decision.fate is Fate.IN_CHUNKS:
                jobs.drain()
                note((name, chunked_record(name, data, raw_dtype), None))
            elif decision.fate is Fate.CODED:
                jobs.put(room, functools.partial(look, name, evaluate(data)), note)
            else:
                work = functools.partial(leave, name, evaluate(data), raw_dtype, decision, jobs.threads_for(room))
                jobs.put(room, work, note)

        source.each_tensor(handle)
    # the size of a header without data, to which each tensor adds its name, shape, type and place
    records = [TensorRecord(name, "", one.shape, 0, _SOME_SCHEME) for name, one in profiles.items()] + list(kept.values())
    with tempfile.TemporaryDirectory() as folder:
        header = Path(folder) / "header.gguf"
        source.write_file(header, (), metadata(RATE, tuple(records), basis), 0)
        n_header = header.stat().st_size
    infos = sum(len(record.name.encode()) + 8 + 4 + 8 * len(record.shape) + 4 + 8 for record in records)
    return Survey(profiles, kept, n_header + infos + 32 * (len(records) + 1), sensitivities, source.heads())


def metadata(recipe: Recipe, records: tuple[TensorRecord, ...], basis: Basis) -> dict[str, Any]:
    """What the file tells about its making; keys in docs/metadata.md."""
    found = {
        "entrollm.version": __version__,
        "entrollm.format_version": FORMAT_VERSION,
        "entrollm.recipe": recipe.name,
        "entrollm.quantizer": recipe.quantizer,
        "entrollm.tensor.names": [r.name for r in records],
        "entrollm.tensor.schemes": [r.scheme for r in records],
    }
    if basis.statistics is not None:
        found["entrollm.calibration"] = basis.statistics.source
    if basis.folding.columns:
        found["entrollm.fold_exponent"] = str(EXPONENT)
    return found
