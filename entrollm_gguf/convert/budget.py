# SPDX-License-Identifier: MIT
"""How much a file may take: one number from which the steps of all matrices follow, such that the whole comes out just below a target.

Without statistics every row has the same step in units of its own root mean square, so that all have the same relative error. With them rows and tensors differ by how much the predictions hang on them (`sensitivity`).
Sizes come from profiles (`quant.profile`), that is from histograms: no matrix is quantized to find the step.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from entrollm_gguf.calibrate.statistics import TensorStatistics
from entrollm_gguf.errors import ConversionError
from entrollm_gguf.quant.fold import Folding
from entrollm_gguf.quant.profile import Profile
from entrollm_gguf.quant.step import row_rms

# Steps beyond have no use: at 0.02 an 8-bit code covers 2.5 rms, at 6 nearly all codes are zero.
FINEST, _COARSEST = 0.02, 6.0

# How far sensitivity is believed, by measurement (docs/quantization.md): between the rows of a tensor wholly, between tensors by half.
_BETWEEN_ROWS, _BETWEEN_TENSORS = 1.0, 0.5
_LOOKS = 8  # at sizes with planned codes, until a step is found

_LARGEST = 8.0  # factors of rows and tensors lie within 1 / _LARGEST .. _LARGEST


@dataclass(frozen=True)
class Sensitivity:
    """How the steps of a tensor differ from the model's."""

    factor: float  # before `Survey` relates it to the others'
    row_factors: np.ndarray  # f32 (n_slabs, n_rows)


def sensitivity(name: str, weights: np.ndarray, statistics: TensorStatistics | None, folding: Folding) -> Sensitivity | None:
    """From the gradients by the outputs and the mean squares of the inputs: what a relative error of each row costs.

    A step s costs rows * columns * s^2 / 12 for each weight, and log2(1 / s) bits: at the best place for every bit all these costs are the same, whence s ~ (rows * columns)^-1/2.

    Args:
        weights: as quantized, that is folded.
        statistics: of the tensor before folding.
    Returns:
        None where there are no gradients.
    """
    if statistics is None or statistics.rows is None:
        return None
    columns, rows = statistics.columns.astype(np.float64), statistics.rows.astype(np.float64)
    if name in folding.columns:
        columns = columns / np.square(folding.columns[name], dtype=np.float64)
    if name in folding.rows:
        rows = rows * np.square(folding.rows[name], dtype=np.float64)
    rms = row_rms(weights.reshape(-1, weights.shape[-1]).astype(np.float32)).reshape(rows.shape)
    cost = rows * columns.mean(axis=1, keepdims=True) * np.square(rms, dtype=np.float64)
    mean = cost.mean()
    if not (mean > 0 and math.isfinite(mean)):
        return None
    cost = np.where(cost.any(axis=1, keepdims=True), cost, mean)  # an expert that no token came to is like the others
    if name.startswith(("token_embd.", "output.")):  # words that a text does not mention must not lose
        factors = np.ones(rows.shape)
    else:
        factors = np.clip((np.maximum(cost, mean * 1e-9) / mean) ** (-0.5 * _BETWEEN_ROWS), 1 / _LARGEST, _LARGEST)
    return Sensitivity(float(mean ** (-0.5 * _BETWEEN_TENSORS)), factors.astype(np.float32))


@dataclass(frozen=True)
class Survey:
    """A model before it is quantized."""

    profiles: dict[str, Profile]  # by GGUF name
    kept: dict[str, int]  # bytes of the tensors that stay in a stock type
    kept_shapes: dict[str, tuple[int, ...]]  # of the same, numpy order
    metadata_bytes: int  # everything in the file that is not a tensor's data
    sensitivities: dict[str, Sensitivity] = field(default_factory=dict)  # by GGUF name; some or all may have none
    heads: tuple[int, int] | None = None  # query and key-value heads of a layer

    @property
    def n_weights(self) -> int:
        """Weights of all tensors."""
        return sum(math.prod(shape) for shape in self.kept_shapes.values()) + sum(one.n_weights for one in self.profiles.values())

    def factor(self, name: str) -> float:
        """What the model's step is multiplied by for a tensor. On average, in logarithms and by weights, it is about 1."""
        if name not in self.sensitivities:
            # an error in a value counts once for each head that shares it
            shared = self.heads is not None and name.endswith(".attn_v.weight")
            return math.sqrt(self.heads[1] / self.heads[0]) if shared else 1.0
        return min(max(self.sensitivities[name].factor / self._mean_factor, 1 / _LARGEST), _LARGEST)

    @functools.cached_property
    def _mean_factor(self) -> float:
        pairs = [(self.profiles[name].n_weights, math.log(one.factor)) for name, one in self.sensitivities.items()]
        return math.exp(sum(n * log for n, log in pairs) / sum(n for n, _ in pairs))

    def tensor_bytes(self, step: float) -> int:
        """Expected bytes of all tensors."""
        with ThreadPoolExecutor() as pool:  # planning a code takes milliseconds, without the interpreter's lock
            return sum(self.kept.values()) + sum(pool.map(lambda name: self.profiles[name].n_bytes(step * self.factor(name)), self.profiles))

    def least_bytes(self, step: float) -> int:
        """The same if codes took no more than their entropy, which is quicker to tell."""
        return sum(self.kept.values()) + sum(one.least_bytes(step * self.factor(name)) for name, one in self.profiles.items())


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


def step_for(survey: Survey, target: int) -> float:
    """The finest step whose expected size is at most target bytes.

    Raises:
        ConversionError: no step is coarse enough.
    """
    if survey.tensor_bytes(_COARSEST) > target:
        least = survey.tensor_bytes(_COARSEST) * 8 / survey.n_weights
        raise ConversionError(f"too small: the coarsest step gives {least:.2f} bits per weight")
    if survey.tensor_bytes(FINEST) <= target:
        return FINEST
    # entropies lead to the neighbourhood; what codes take above them there is the same nearby, and leads closer
    least = functools.cache(survey.least_bytes)  # searches begin alike
    best, over = _COARSEST, 1.0
    for _ in range(_LOOKS):
        step = _step_by_entropy(least, target / over)
        size = survey.tensor_bytes(step)
        if size <= target:
            best = min(best, step)
        if 0.9985 * target <= size <= target:
            break
        over = size / least(step) / 0.9993
    return best


def _step_by_entropy(least_bytes: Callable[[float], float], target: float) -> float:
    """The finest step, to a tenth of a percent, at which codes as short as their entropy would take at most target bytes."""
    fine, coarse = FINEST, _COARSEST
    while coarse / fine > 1.001:
        middle = math.sqrt(fine * coarse)
        if least_bytes(middle) > target:
            fine = middle
        else:
            coarse = middle
    return coarse


def corrected(tried: list[tuple[float, int]], target: int, survey: Survey) -> float:
    """The next step after conversions with some steps gave some sizes in bytes: between two that lie on both sides of the target, else from the last, for which a bit per weight is a factor of two."""
    wanted = 0.997 * target
    above, below = [one for one in tried if one[1] > wanted], [one for one in tried if one[1] <= wanted]
    if above and below:
        (fine, large), (coarse, small) = min(above, key=lambda one: one[1]), max(below, key=lambda one: one[1])
        return fine * (coarse / fine) ** ((large - wanted) / (large - small))
    step, actual = tried[-1]
    n_coded = sum(one.n_weights for one in survey.profiles.values())
    return step * 2 ** (8 * (actual - wanted) / n_coded)
