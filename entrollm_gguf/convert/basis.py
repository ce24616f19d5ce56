# SPDX-License-Identifier: MIT
"""What precedes any look at a model's weights: where statistics come from, and what they and the
factors to fold are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from entrollm_gguf.calibrate import Statistics, check_fit, gather, read_imatrix
from entrollm_gguf.convert.calibrated import to_gguf
from entrollm_gguf.convert.fold import Folding, plan_folding
from entrollm_gguf.convert.llama_cpp import SourceModel
from entrollm_gguf.convert.source import Source, as_folder
from entrollm_gguf.progress import Progress
from entrollm_gguf.texts import read_text

_SAMPLE = 4000  # characters of a text by which a GGUF's vocabulary is compared


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
