# SPDX-License-Identifier: MIT
"""A Hugging Face model or a GGUF into an entropy-coded GGUF, tensor by tensor.

Order of work: the source hands over one tensor after the other; each is encoded on a thread pool
and its payload spilled to a temporary file; at the end the GGUF is written from the spill. Memory
holds the tensors in flight only, whose weights are bounded.
"""

from __future__ import annotations

import contextlib
import functools
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from entrollm_gguf.codec import CodecError, EntropyType, check_tile_cols
from entrollm_gguf.convert.basis import Calibration, prepare
from entrollm_gguf.convert.budget import FINEST, Survey, Target, corrected, find_target, step_for
from entrollm_gguf.convert.encode import TensorRecord
from entrollm_gguf.convert.fold import Folding
from entrollm_gguf.convert.llama_cpp import Integers, Output
from entrollm_gguf.convert.metadata import metadata
from entrollm_gguf.convert.recipes import DEFAULT_FOR_INTEGERS, DEFAULT_RECIPE, RATE, Recipe, find_recipe
from entrollm_gguf.convert.source import Source, check_source, open_source
from entrollm_gguf.convert.survey import survey_model, treatments
from entrollm_gguf.convert.tensor import Treatment, code_tensor, leave_tensor
from entrollm_gguf.convert.walk import Fate, Task, walk
from entrollm_gguf.errors import ConversionError, ConversionWarning
from entrollm_gguf.gguf_io.output import SpillFile, StreamedTensor, atomic_output, check_output
from entrollm_gguf.gguf_io.patched import import_gguf
from entrollm_gguf.progress import Progress
from entrollm_gguf.quant import QUANTIZERS
from entrollm_gguf.quant.step import step_scheme

# Conversions until a size is met: the first step comes from histograms and is right to some tenths
# of a percent.
_ATTEMPTS = 6


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion made."""

    path: Path
    recipe: str
    tensors: tuple[TensorRecord, ...]
    file_bytes: int
    seconds: float
    rate: float | None = None  # bits per coded weight that the recipe aimed at, None for fixed grids, bits and size
    bits_before: float | None = None  # per weight, where the weights had been quantized to another grid

    @property
    def n_weights(self) -> int:
        """Weights of all tensors."""
        return sum(t.n_elements for t in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Bits of the whole file per weight, metadata and tokenizer included."""
        return self.file_bytes * 8 / self.n_weights

    def coded(self) -> list[TensorRecord]:
        """The entropy-coded tensors."""
        return [t for t in self.tensors if t.entropy_bits is not None]


@dataclass(frozen=True)
class Plan:
    """What a conversion to a size would make; sizes are expected to within a percent."""

    step: float  # of a row's root mean square
    tensors: tuple[TensorRecord, ...]  # without entropies
    file_bytes: int
    bits_per_weight: float  # of all tensors


@dataclass(frozen=True)
class _Part:
    """A finished tensor: where its bytes lie in the spill, and in which type."""

    record: TensorRecord
    ggml_type: int
    at: int
    size: int


@dataclass(frozen=True)
class _Encoded:
    """All tensors of a model, ready to be written."""

    spill: SpillFile
    parts: list[_Part]

    @property
    def n_bytes(self) -> int:
        """Of all tensors."""
        return sum(part.size for part in self.parts)

    def outputs(self) -> Iterator[Output]:
        """Read from the spill when they are written."""
        for part in self.parts:
            copy = functools.partial(self.spill.copy_to, at=part.at, size=part.size)
            tensor = StreamedTensor(*_declared(part), part.size, copy)
            yield Output(part.record.name, tensor, tensor.shape, part.ggml_type)

    def close(self) -> None:
        """Give the disk space back."""
        self.spill.close()


def convert_model(
    model: str | Path,
    out_path: str | Path,
    *,
    recipe: str | None = None,
    bits: float | None = None,
    size: int | None = None,
    threads: int | None = None,
    tile_cols: int | None = None,
    calibration: Calibration | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> ConversionReport:
    """Convert a Hugging Face model folder or a GGUF to an entropy-coded GGUF.

    Args:
        model: a folder with config.json, tokenizer files and safetensors (or pytorch .bin) weights;
            or a GGUF of stock types, the first part of a split one.
        out_path: the GGUF; appears only when complete.
        recipe: a name from `RECIPES`; ignored where bits or size is given. None: EQ8-kept where the
            checkpoint's weights are integers that can be kept, else EQ8. A recipe's bits are those
            of the entropy-coded matrices, reached as nearly as they can be.
        bits: bits per weight of all tensors together, reached within 1 % from below; the step is
            chosen for it. The result is smaller where even the finest step needs less.
        size: bytes of the whole file, the same way.
        threads: None for all cores.
        tile_cols: columns of a tile of the device layout (docs/format.md 8), which GPUs read; None
            for the default.
        calibration: where to learn which weights matter; for recipes with bits, or for bits and
            size.
        force: replace an existing output.
        progress: called after each tensor.
    Raises:
        ConversionError: damaged or missing input, NaN weights, bits or a size that cannot be
            reached, unwritable output, full disk.
        UnsupportedModelError: an architecture that llama.cpp's converter does not know.
        OutputExistsError: the output exists and `force` is not given.
        RuntimeMissingError: the patched runtime is not installed.

    >>> from entrollm_gguf import convert_model
    >>> report = convert_model("model", "new.gguf", recipe="EQ4-rows")
    >>> report.recipe, report.n_weights, len(report.coded()), len(report.tensors)
    ('EQ4-rows', 317664, 16, 21)
    """
    started = time.monotonic()
    out = Path(out_path)
    _check_arguments(recipe, bits, size, tile_cols)
    check_output(out, force)
    model = Path(model)
    check_source(model)
    source = open_source(model)
    if any(out.resolve() == path.resolve() for path in source.files):
        raise ConversionError(f"{out}: input and output are the same file")
    chosen, rate = _choose(recipe, bits, size, calibration, source)
    with atomic_output(out, force) as temporary:
        source.rehearse()
        basis = prepare(source, model, calibration, threads=threads, progress=progress)

        def encode(treat: Callable[[str], Treatment]) -> _Encoded:
            return _encode_all(source, temporary.parent, treat, basis.folding, threads, tile_cols, progress)

        if chosen.by_rate:
            survey = survey_model(source, basis, threads=threads, progress=progress)
            target = find_target(survey, bits=bits, size=size, rate=rate)
            encoded = _encode_to_size(lambda step: encode(treatments(survey, basis, step)), survey, target, step_for(survey, target))
        else:
            encoded = encode(lambda name: Treatment(chosen.kind, QUANTIZERS[chosen.quantizer], exact=chosen.exact))
        with contextlib.closing(encoded):
            records = tuple(part.record for part in encoded.parts)
            file_type = import_gguf().LlamaFileType[f"MOSTLY_{chosen.kind.name}"]
            source.write_file(temporary, encoded.outputs(), metadata(chosen, records, basis), file_type)
        n_bytes = temporary.stat().st_size
    before = source.quantized_bytes
    bits_before = None if before is None else before * 8 / sum(record.n_elements for record in records)
    return ConversionReport(out, chosen.name, records, n_bytes, time.monotonic() - started, rate, bits_before)


def plan_model(
    model: str | Path,
    *,
    bits: float | None = None,
    size: int | None = None,
    recipe: str | None = None,
    threads: int | None = None,
    tile_cols: int | None = None,
    calibration: Calibration | None = None,
    progress: Progress | None = None,
) -> Plan:
    """What `convert_model` would make of the same arguments; writes nothing. Sizes do not depend on
    tile_cols, which is only checked.

    Raises:
        ConversionError, UnsupportedModelError: as convert_model.

    >>> from entrollm_gguf import plan_model
    >>> plan = plan_model("model", bits=4.5)
    >>> round(plan.bits_per_weight, 1), plan.tensors[0].name
    (4.5, 'output.weight')
    """
    _check_arguments(recipe, bits, size, tile_cols)
    model = Path(model)
    check_source(model)
    source = open_source(model)
    chosen, rate = _choose(recipe, bits, size, calibration, source)
    if not chosen.by_rate:
        raise ConversionError(
            f"{chosen.name} has a fixed grid, whose size is known when it is converted; plans are for bits, size and recipes with bits"
        )
    source.rehearse()
    basis = prepare(source, model, calibration, threads=threads, progress=progress)
    survey = survey_model(source, basis, threads=threads, progress=progress)
    step = step_for(survey, find_target(survey, bits=bits, size=size, rate=rate))
    steps = {name: step * survey.factor(name) for name in survey.profiles}
    planned = [
        TensorRecord(name, RATE.kind.name, one.shape, one.n_bytes(steps[name]), step_scheme(steps[name]))
        for name, one in survey.profiles.items()
    ]
    planned += survey.kept.values()
    n_bytes = sum(one.n_bytes for one in planned)
    return Plan(step, tuple(planned), n_bytes + survey.metadata_bytes, n_bytes * 8 / survey.n_weights)


def _choose(
    recipe: str | None, bits: float | None, size: int | None, calibration: Calibration | None, source: Source
) -> tuple[Recipe, float | None]:
    """The recipe, and its bits per coded weight where neither bits nor size is given."""
    if source.integers is Integers.GROUPS:
        warnings.warn(
            "the weights are integers with a scale for each group of columns, which this format cannot keep: they are quantized once more, "
            "and both errors add up",
            ConversionWarning,
            stacklevel=3,
        )
    if bits is not None or size is not None:
        return RATE, None
    keep = source.integers is Integers.ROWS and calibration is None
    chosen = find_recipe(recipe or (DEFAULT_FOR_INTEGERS if keep else DEFAULT_RECIPE))
    if calibration is not None and chosen.bits is None:
        raise ConversionError(f"{chosen.name} has a fixed grid and no use for calibration; it is for --bits, --size and recipes with bits")
    # an importance matrix alone does not make up for having fewer bits
    return chosen, chosen.bits_for(calibration is not None and calibration.imatrix is None)


def _check_arguments(recipe: str | None, bits: float | None, size: int | None, tile_cols: int | None) -> None:
    if recipe is not None:
        find_recipe(recipe)
    if tile_cols is not None:
        try:
            check_tile_cols(tile_cols)
        except CodecError as error:
            raise ConversionError(str(error)) from error
    if bits is not None and size is not None:
        raise ConversionError("give bits or size, not both")
    if bits is not None and not 1 <= bits <= 8:
        raise ConversionError(f"bits {bits}: must lie between 1 and 8")


def _declared(part: _Part) -> tuple[tuple[int, ...], Any]:
    """Shape and dtype that gguf's writer is told: entropy-coded and quantized data counts as
    bytes."""
    gguf = import_gguf()
    dtypes = {gguf.GGMLQuantizationType.F32: np.float32, gguf.GGMLQuantizationType.F16: np.float16}
    dtype = dtypes.get(part.ggml_type, np.uint8)
    shape = part.record.shape
    if dtype is np.uint8 and part.record.type_name not in EntropyType.__members__:
        shape = gguf.quant_shape_to_byte_shape(shape, part.ggml_type)
    return shape, np.dtype(dtype)


def _encode_to_size(encode: Callable[[float], _Encoded], survey: Survey, target: Target, step: float) -> _Encoded:
    """Encode with one step after another until the tensors take the target's bytes, or up to 1 %
    less, or are as fine or as coarse as they can be. If no step achieves that, the largest result
    that is not above the target is taken; if all are above, the smallest.

    Raises:
        ConversionError: all are above, and the target is promised.
    """

    def rank(one: _Encoded) -> tuple[bool, int]:
        fits = one.n_bytes <= target.n_bytes
        return fits, one.n_bytes if fits else -one.n_bytes

    best: _Encoded | None = None
    tried: list[tuple[float, int]] = []
    try:
        while len(tried) < _ATTEMPTS and step not in dict(tried):
            one = encode(step)
            tried.append((step, one.n_bytes))
            worse = one
            if best is None or rank(one) > rank(best):
                best, worse = one, best
            if worse is not None:
                worse.close()
            missed = (target.n_bytes - one.n_bytes) / max(1, target.coded_bytes)
            if best is one and (0 <= missed <= 0.01 or (missed > 0 and step <= FINEST)):
                break
            step = corrected(tried, target, survey)
        if best.n_bytes > target.n_bytes and target.promised:
            least = best.n_bytes + survey.metadata_bytes
            raise ConversionError(
                f"no step was found for this size: the least that came out is a file of {least} bytes, "
                f"{best.n_bytes * 8 / survey.n_weights:.2f} bits per weight; ask for that or more"
            )
    except BaseException:
        if best is not None:
            best.close()
        raise
    return best


def _encode_all(
    source: Source,
    folder: Path,
    treat: Callable[[str], Treatment],
    folding: Folding,
    threads: int | None,
    tile_cols: int | None,
    progress: Progress | None,
) -> _Encoded:
    """All tensors of the model, encoded and spilled, in the source's order."""
    spill = SpillFile(folder)
    try:
        return _Encoded(spill, _spill_all(source, spill, treat, folding, threads, tile_cols, progress))
    except BaseException:
        spill.close()
        raise


def _spill_all(
    source: Source,
    spill: SpillFile,
    treat: Callable[[str], Treatment],
    folding: Folding,
    threads: int | None,
    tile_cols: int | None,
    progress: Progress | None,
) -> list[_Part]:
    total, n_done = source.n_elements(), 0
    parts: list[_Part] = []
    measure = source.quantized_bytes is not None

    def finish(task: Task) -> tuple[Any, TensorRecord, int]:
        treatment = treat(task.name)
        if task.decision.fate is Fate.CODED:
            return code_tensor(task, treatment, folding, tile_cols, measure=measure)
        return leave_tensor(task, folding, exact=treatment.exact)

    def done(finished: tuple[Any, TensorRecord, int]) -> None:
        nonlocal n_done
        payload, record, ggml_type = finished
        in_memory = isinstance(payload, np.ndarray)
        at, size = spill.append(memoryview(payload).cast("B")) if in_memory else spill.append_from(payload.tofile, payload.nbytes)
        parts.append(_Part(record, ggml_type, at, size))
        n_done += record.n_elements
        if progress:
            progress(n_done, total, record.name, "weights")

    walk(source, threads, finish, done, workspace=lambda name: treat(name).workspace)
    return parts
