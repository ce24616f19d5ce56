# SPDX-License-Identifier: MIT
"""How much a file may take: one number from which the steps of all matrices follow, such that the
whole comes out just below a target.

Without statistics, every row has the same step in units of its own root mean square, so that all
have the same relative error. With statistics, rows and tensors differ by how much the predictions
depend on them (`sensitivity`). Sizes come from profiles (`quant.profile`), which are histograms: no
matrix is quantized to find the step.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from entrollm_gguf.calibrate.statistics import TensorStatistics
from entrollm_gguf.convert.encode import TensorRecord
from entrollm_gguf.convert.fold import Folding
from entrollm_gguf.errors import ConversionError
from entrollm_gguf.quant.profile import Profile
from entrollm_gguf.quant.step import row_rms

# Steps beyond have no use: at 0.02 an 8-bit code covers 2.5 rms, at 6 nearly all codes are zero.
FINEST, _COARSEST = 0.02, 6.0

# How far sensitivity is trusted, as measured (docs/quantization.md): fully between the rows of a
# tensor, by half between tensors.
_BETWEEN_ROWS, _BETWEEN_TENSORS = 1.0, 0.5
_LOOKS = 16  # sizes from planned codes that are looked at, at most, before a step is chosen

_LARGEST = 8.0  # factors of rows and tensors lie within 1 / _LARGEST .. _LARGEST


@dataclass(frozen=True)
class Sensitivity:
    """How the steps of a tensor differ from the model's."""

    factor: float  # before `Survey` relates it to the others'
    row_factors: np.ndarray  # f32 (n_slabs, n_rows)


def sensitivity(name: str, weights: np.ndarray, statistics: TensorStatistics | None, folding: Folding) -> Sensitivity | None:
    """From the gradients by the outputs and the mean squares of the inputs: what a relative error
    of each row costs.

    A step s costs rows * columns * s^2 / 12 for each weight, and log2(1 / s) bits: bits are spent
    best where all these costs are the same, so s ~ (rows * columns)^-1/2.

    Args:
        weights: as they are quantized, that is, folded.
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
    cost = np.where(cost.any(axis=1, keepdims=True), cost, mean)  # an expert that no token reached counts like the others
    if name.startswith(("token_embd.", "output.")):  # tokens that the text lacks must not lose precision
        factors = np.ones(rows.shape)
    else:
        factors = np.clip((np.maximum(cost, mean * 1e-9) / mean) ** (-0.5 * _BETWEEN_ROWS), 1 / _LARGEST, _LARGEST)
    return Sensitivity(float(mean ** (-0.5 * _BETWEEN_TENSORS)), factors.astype(np.float32))


@dataclass(frozen=True)
class Survey:
    """A model before it is quantized."""

    profiles: dict[str, Profile]  # by GGUF name
    kept: dict[str, TensorRecord]  # tensors that stay in a stock type
    metadata_bytes: int  # everything in the file that is not a tensor's data
    sensitivities: dict[str, Sensitivity] = field(default_factory=dict)  # by GGUF name; some or all may have none
    heads: tuple[int, int] | None = None  # query and key-value heads of a layer

    @property
    def n_coded(self) -> int:
        """Weights that are entropy-coded."""
        return sum(one.n_weights for one in self.profiles.values())

    @property
    def n_weights(self) -> int:
        """Weights of all tensors."""
        return self.n_coded + sum(one.n_elements for one in self.kept.values())

    @property
    def kept_bytes(self) -> int:
        """Of the tensors that stay in a stock type."""
        return sum(one.n_bytes for one in self.kept.values())

    def factor(self, name: str) -> float:
        """What the model's step is multiplied by for a tensor. On average, in logarithms and by
        weights, it is about 1."""
        if name not in self.sensitivities:
            # an error in a value counts once for each head that shares it
            shared = self.heads is not None and name.endswith(".attn_v.weight")
            return math.sqrt(self.heads[1] / self.heads[0]) if shared else 1.0
        return min(max(self.sensitivities[name].factor / self._mean_factor, 1 / _LARGEST), _LARGEST)

    @functools.cached_property
    def _mean_factor(self) -> float:
        pairs = [(self.profiles[name].n_weights, math.log(one.factor)) for name, one in self.sensitivities.items()]
        return math.exp(sum(n * log for n, log in pairs) / sum(n for n, _ in pairs))

    def coded_bytes(self, step: float) -> int:
        """Expected bytes of the entropy-coded tensors."""
        with ThreadPoolExecutor() as pool:  # planning a code takes milliseconds, without the interpreter's lock
            return sum(pool.map(lambda name: self.profiles[name].n_bytes(step * self.factor(name)), self.profiles))

    def tensor_bytes(self, step: float) -> int:
        """Expected bytes of all tensors."""
        return self.kept_bytes + self.coded_bytes(step)

    def least_bytes(self, step: float) -> int:
        """Expected bytes of the entropy-coded tensors if codes took no more than their entropy,
        which is quicker to compute."""
        return sum(one.least_bytes(step * self.factor(name)) for name, one in self.profiles.items())

    def entropy_bits(self, step: float) -> float:
        """Expected entropy of all codes, without what else the file holds."""
        return sum(one.entropy_bits(step * self.factor(name)) for name, one in self.profiles.items())


@dataclass(frozen=True)
class Target:
    """What a conversion aims at."""

    coded_bytes: int  # that the entropy-coded tensors may take
    kept_bytes: int  # that all others take, as far as the survey knows
    coarsest: float = _COARSEST  # the largest step
    promised: bool = True  # given by --bits or --size: less is fine, more is an error. A recipe comes as near as it can

    @property
    def n_bytes(self) -> int:
        """Of all tensors."""
        return self.kept_bytes + self.coded_bytes


def find_target(survey: Survey, *, bits: float | None = None, size: int | None = None, rate: float | None = None) -> Target:
    """The target of one of these.

    Args:
        bits: per weight of all tensors.
        size: bytes of the whole file.
        rate: bits per entropy-coded weight, of a recipe. Tensors that are not coded do not
            count. Where headers and scales of small matrices weigh much, codes get at most one bit
            less than the rate.
    Raises:
        ConversionError: bits or size are less than the coarsest step gives.
    """
    kept = survey.kept_bytes
    if rate is not None:
        coarsest = _finest_step(survey.entropy_bits, (rate - 1) * survey.n_coded)
        return Target(int(rate * survey.n_coded / 8), kept, coarsest, promised=False)
    target = int(survey.n_weights * bits / 8) if bits is not None else int(size or 0) - survey.metadata_bytes
    least = survey.tensor_bytes(_COARSEST)
    if least > target:
        of_kept = f"; {kept} of them are tensors that stay in stock types" if kept else ""
        raise ConversionError(
            f"too small: the least is {least * 8 / survey.n_weights:.2f} bits per weight, a file of {least + survey.metadata_bytes} bytes{of_kept}"
        )
    return Target(target - kept, kept)


def step_for(survey: Survey, target: Target) -> float:
    """The finest step whose expected size is at most the target, or the target's coarsest."""
    if survey.coded_bytes(FINEST) <= target.coded_bytes:
        return FINEST
    if survey.coded_bytes(target.coarsest) > target.coded_bytes:
        return target.coarsest
    # entropies lead to the neighbourhood; how much more the codes take hardly changes there, which
    # leads closer. Where it does change, since many matrices get another code or sizes hardly move,
    # the middle is tried.
    least = functools.cache(survey.least_bytes)  # every search begins with the same steps
    fine, coarse, over = FINEST, target.coarsest, 1.0
    same = 0  # looks in a row that found too much (above 0) or little enough (below 0)
    for _ in range(_LOOKS):
        step = _finest_step(least, target.coded_bytes / over)
        if abs(same) > 1 or not fine < step < coarse:
            step, same = math.sqrt(fine * coarse), 0
        size = survey.coded_bytes(step)
        if size <= target.coded_bytes:
            coarse, same = step, min(same, 0) - 1
        else:
            fine, same = step, max(same, 0) + 1
        if 0.9985 * target.coded_bytes <= size <= target.coded_bytes or coarse / fine < 1.0003:
            break
        over = size / least(step) / 0.9993
    return coarse


def _finest_step(cost: Callable[[float], float], limit: float) -> float:
    """The finest step, to a tenth of a percent, at which a cost that falls with the step is at most
    limit; the coarsest of all if none is."""
    fine, coarse = FINEST, _COARSEST
    while coarse / fine > 1.001:
        middle = math.sqrt(fine * coarse)
        if cost(middle) > limit:
            fine = middle
        else:
            coarse = middle
    return coarse


def corrected(tried: list[tuple[float, int]], target: Target, survey: Survey) -> float:
    """The step to try next, after conversions with some steps gave some sizes in bytes. It lies
    between two steps whose sizes enclose the target; without such a pair it follows from the last
    one, by the rule that a bit per weight is a factor of two.

    As long as all sizes are above the target, it aims lower each time: sizes of small matrices move
    in steps.
    """
    below = [one for one in tried if one[1] <= target.n_bytes]
    wanted = target.n_bytes - (0.003 if below else 0.003 * 2 ** (len(tried) - 1)) * target.coded_bytes
    above, below = [one for one in tried if one[1] > wanted], [one for one in tried if one[1] <= wanted]
    if above and below:
        # small matrices have equal sizes for several steps: then those nearest to each other
        (fine, large), (coarse, small) = min(above, key=lambda one: (one[1], -one[0])), max(below, key=lambda one: (one[1], -one[0]))
        step = fine * (coarse / fine) ** ((large - wanted) / (large - small))
    else:
        step, actual = tried[-1]
        step *= 2 ** (8 * (actual - wanted) / max(1, survey.n_coded))
    return min(max(step, FINEST), target.coarsest)
