# SPDX-License-Identifier: MIT
"""Column equalisation: a matrix's columns are multiplied by what its inputs are divided by, and the
division is folded into the rows or the norm that makes these inputs.

Columns whose inputs are large then have a finer step, at no cost at run time and without a change
of the format. The model computes the same function, if its architecture allows it. So only the
architectures listed here are folded, and only where all tensors that read an input are known.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np

from entrollm_gguf.calibrate.statistics import Statistics

#: Columns are multiplied by (mean of x^2)^EXPONENT. At high rates 1/2 would be best if each column
#: had a code of its own, but they share one. The value is measured: docs/quantization.md.
EXPONENT = 0.3
_LARGEST = 64.0  # factors lie within 1 / _LARGEST .. _LARGEST

# Architectures (general.architecture) in which each norm feeds only the matrices named below, the
# product of gate and up is what `down` reads, and the sum of values is what `output` reads.
_GATED = frozenset(
    [
        "llama",
        "mistral3",
        "qwen2",
        "qwen3",
        "qwen2moe",
        "qwen3moe",
        "gemma",
        "gemma2",
        "gemma3",
        "phi3",
        "granite",
        "smollm3",
        "olmo2",
        "olmoe",
        "internlm2",
        "exaone",
    ]
)

# (what divides: norm, matrices that read it). Routers and shared gates of experts read the same
# norm. The last norm stays as it is, even where a matrix of its own reads it: programs also take
# its output as the embedding of a text.
NORMS = (
    ("attn_norm", ("attn_q", "attn_k", "attn_v", "attn_qkv")),
    (
        "ffn_norm",
        (
            "ffn_gate",
            "ffn_up",
            "ffn_gate_inp",
            "ffn_gate_exps",
            "ffn_up_exps",
            "ffn_gate_up_exps",
            "ffn_gate_shexp",
            "ffn_up_shexp",
            "ffn_gate_inp_shexp",
        ),
    ),
)
UP_DOWN = (("ffn_up", "ffn_down"), ("ffn_up_exps", "ffn_down_exps"), ("ffn_up_shexp", "ffn_down_shexp"))


@dataclass
class Folding:
    """Factors by GGUF name."""

    columns: dict[str, np.ndarray] = field(default_factory=dict)  # f32 (n_slabs or 1, n_cols): multiply
    rows: dict[str, np.ndarray] = field(default_factory=dict)  # f32 (n_slabs or 1, n_rows), or (1, n) of a vector: divide
    untouchable: frozenset[str] = frozenset()  # tensors that are no floats

    def apply(self, name: str, weights: np.ndarray) -> np.ndarray:
        """The tensor with its factors: f16 or f32 in, f32 out, or the same array if it has none.

        Args:
            weights: shape (n,), (n_rows, n_cols) or (n_slabs, n_rows, n_cols).
        """
        if name not in self.columns and name not in self.rows:
            return weights
        out = weights.astype(np.float32)
        if name in self.columns:
            factors = self.columns[name]
            out *= factors[:, None, :] if weights.ndim == 3 else factors[0]
        if name in self.rows:
            factors = self.rows[name]
            out /= factors[0] if weights.ndim == 1 else factors[:, :, None] if weights.ndim == 3 else factors[0][:, None]
        return out


def plan_folding(
    architecture: str,
    shapes: dict[str, tuple[int, ...]],
    heads: tuple[int, int] | None,
    statistics: Statistics,
    exponent: float = EXPONENT,
    untouchable: frozenset[str] = frozenset(),
) -> Folding:
    """Which tensors get which factors.

    Args:
        architecture: general.architecture.
        shapes: of all tensors of the GGUF, numpy order.
        heads: query and key-value heads of every layer, None if they differ.
        exponent: see EXPONENT; 0 folds nothing.
        untouchable: tensors whose weights are not floats; what they read or make is left alone.
    """
    folding = Folding(untouchable=untouchable)
    if architecture not in _GATED or exponent == 0:
        return folding
    for layer in sorted({match[0] for name in shapes if (match := re.match(r"blk\.\d+\.", name))}):
        for norm, readers in NORMS:
            _fold_norm(folding, shapes, statistics, exponent, layer + norm, [layer + one for one in readers])
        for up, down in UP_DOWN:
            _fold_up(folding, shapes, statistics, exponent, layer + up, layer + down)
        if heads is not None:
            _fold_values(folding, shapes, statistics, exponent, layer, *heads)
    return folding


def _factors(energy: np.ndarray, exponent: float) -> np.ndarray:
    """(mean of x^2)^exponent with geometric mean 1 along the last axis."""
    energy = energy.astype(np.float64)
    floor = np.maximum(energy.mean(axis=-1, keepdims=True) * 1e-6, 1e-30)
    logs = exponent * np.log(np.maximum(energy, floor))
    logs -= logs.mean(axis=-1, keepdims=True)
    return np.exp(np.clip(logs, -np.log(_LARGEST), np.log(_LARGEST))).astype(np.float32)


def _fold_norm(
    folding: Folding, shapes: dict[str, tuple[int, ...]], statistics: Statistics, exponent: float, norm: str, readers: list[str]
) -> None:
    weight, present = f"{norm}.weight", [f"{one}.weight" for one in readers if f"{one}.weight" in shapes]
    known = [statistics.tensors[name].columns.mean(axis=0) for name in present if name in statistics.tensors]
    if not folding.untouchable.isdisjoint([weight, *present]):
        return
    if weight not in shapes or not known or any(shapes[name][-1] != shapes[weight][0] for name in present):
        return
    factors = _factors(np.mean(known, axis=0), exponent)[None]
    folding.rows[weight] = factors
    if f"{norm}.bias" in shapes:
        folding.rows[f"{norm}.bias"] = factors
    for name in present:
        folding.columns[name] = np.repeat(factors, shapes[name][0] if len(shapes[name]) == 3 else 1, axis=0)


def _fold_up(folding: Folding, shapes: dict[str, tuple[int, ...]], statistics: Statistics, exponent: float, up: str, down: str) -> None:
    name, source = f"{down}.weight", f"{up}.weight"
    if name not in shapes or source not in shapes or name not in statistics.tensors or f"{up}.scale" in shapes:
        return
    if not folding.untouchable.isdisjoint([name, source]):
        return
    n_inner, n_rows = shapes[name][-1], shapes[source][-2]
    fused = n_rows == 2 * n_inner  # gate and up in one matrix, up second (phi3)
    if not (fused or n_rows == n_inner) or (not fused and not _has_gate(shapes, up)):
        return
    factors = _factors(statistics.tensors[name].columns, exponent)
    if factors.shape[0] != (shapes[name][0] if len(shapes[name]) == 3 else 1):
        return
    folding.columns[name] = factors
    _divide_rows(folding, shapes, up, np.concatenate([np.ones_like(factors), factors], axis=1) if fused else factors)


def _has_gate(shapes: dict[str, tuple[int, ...]], up: str) -> bool:
    return f"{up.replace('ffn_up', 'ffn_gate')}.weight" in shapes


def _fold_values(
    folding: Folding, shapes: dict[str, tuple[int, ...]], statistics: Statistics, exponent: float, layer: str, n_heads: int, n_kv: int
) -> None:
    name = f"{layer}attn_output.weight"
    if name not in shapes or name not in statistics.tensors:
        return
    n_cols = shapes[name][-1]
    width, rest = divmod(n_cols, n_heads)  # of a head's values
    source, fused = next(
        ((one, part == "attn_qkv") for part in ("attn_v", "attn_qkv") if f"{(one := layer + part)}.weight" in shapes), (None, False)
    )
    if source is None or rest or f"{source}.scale" in shapes or not folding.untouchable.isdisjoint([name, f"{source}.weight"]):
        return
    n_rows, before = shapes[f"{source}.weight"][-2], (n_heads + n_kv) * width if fused else 0
    if n_rows != before + n_kv * width:
        return
    energy = statistics.tensors[name].columns.mean(axis=0).reshape(n_kv, n_heads // n_kv, width)
    of_values = _factors(energy.mean(axis=1).reshape(1, -1), exponent)  # heads that share their values share the factors
    folding.columns[name] = np.repeat(of_values.reshape(n_kv, 1, width), n_heads // n_kv, axis=1).reshape(1, -1)
    _divide_rows(folding, shapes, source, np.concatenate([np.ones((1, before), np.float32), of_values], axis=1))


def _divide_rows(folding: Folding, shapes: dict[str, tuple[int, ...]], stem: str, factors: np.ndarray) -> None:
    folding.rows[f"{stem}.weight"] = factors
    if f"{stem}.bias" in shapes:
        folding.rows[f"{stem}.bias"] = factors
