# SPDX-License-Identifier: MIT
"""How much a file may take: one step for all matrices, in units of each row's root mean square, such that the whole comes out just below a target.

One relative step everywhere gives every row the same relative error; FACTORS tells which kinds of tensors take a finer or coarser one. Sizes come from profiles (`quant.profile`), that is from histograms: no matrix is
quantized to find the step.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from entrollm_gguf.errors import ConversionError
from entrollm_gguf.quant.profile import Profile

# Steps beyond have no use: at 0.02 an 8-bit code covers 2.5 rms, at 6 nearly all codes are zero.
FINEST, _COARSEST = 0.02, 6.0

#: (pattern of the GGUF name, factor of the step); the first that is found counts. Chosen by measurement: docs/quantization.md.
FACTORS: tuple[tuple[str, float], ...] = ()


def step_factor(name: str) -> float:
    """What the model's step is multiplied by for a tensor."""
    return next((factor for pattern, factor in FACTORS if re.search(pattern, name)), 1.0)


@dataclass(frozen=True)
class Survey:
    """A model before it is quantized."""

    profiles: dict[str, Profile]  # by GGUF name
    kept: dict[str, int]  # bytes of the tensors that stay in a stock type
    kept_shapes: dict[str, tuple[int, ...]]  # of the same, numpy order
    metadata_bytes: int  # everything in the file that is not a tensor's data

    @property
    def n_weights(self) -> int:
        """Weights of all tensors."""
        return sum(math.prod(shape) for shape in self.kept_shapes.values()) + sum(one.n_weights for one in self.profiles.values())

    def tensor_bytes(self, step: float, tile_cols: int | None = None) -> int:
        """Expected bytes of all tensors."""
        return sum(self.kept.values()) + sum(one.n_bytes(step * step_factor(name), tile_cols) for name, one in self.profiles.items())


def target_bytes(survey: Survey, bits: float | None, size: int | None) -> int:
    """Bytes that the tensors may take, from bits per weight of all tensors, or from the size of the whole file.

    Raises:
        ConversionError: what is kept in stock types needs more than that alone.
    """
    target = int(survey.n_weights * bits / 8) if bits is not None else int(size or 0) - survey.metadata_bytes
    if target <= sum(survey.kept.values()):
        raise ConversionError(
            f"too small: the tensors that stay in stock types and the metadata take {sum(survey.kept.values()) + survey.metadata_bytes} bytes alone"
        )
    return target


def step_for(survey: Survey, target: int, tile_cols: int | None = None) -> float:
    """The finest step whose expected size is at most target bytes.

    Raises:
        ConversionError: no step is coarse enough.
    """
    if survey.tensor_bytes(_COARSEST, tile_cols) > target:
        least = survey.tensor_bytes(_COARSEST, tile_cols) * 8 / survey.n_weights
        raise ConversionError(f"too small: the coarsest step gives {least:.2f} bits per weight")
    fine, coarse = FINEST, _COARSEST
    if survey.tensor_bytes(fine, tile_cols) <= target:
        return fine
    while coarse / fine > 1.0005:
        middle = math.sqrt(fine * coarse)
        if survey.tensor_bytes(middle, tile_cols) > target:
            fine = middle
        else:
            coarse = middle
    return coarse


def corrected(step: float, actual: int, target: int, survey: Survey) -> float:
    """The next step to try after `actual` bytes came out: a bit per weight is a factor of two."""
    n_coded = sum(one.n_weights for one in survey.profiles.values())
    return step * 2 ** (8 * (actual - 0.998 * target) / n_coded)
