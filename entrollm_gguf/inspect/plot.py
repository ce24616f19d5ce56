# SPDX-License-Identifier: MIT
"""The picture of `entrollm inspect --plot`: bits per weight against entropy, layer by layer, and
one tensor's codes with their code lengths."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from entrollm_gguf.codec import Code, Payload
from entrollm_gguf.console import printable
from entrollm_gguf.errors import FormatError
from entrollm_gguf.gguf_io.output import atomic_output
from entrollm_gguf.gguf_io.reader import open_model
from entrollm_gguf.inspect.report import FileReport, TensorReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LAYER = re.compile(r"blk\.(\d+)\.")


def plot_file(report: FileReport, path: str | Path, *, tensor: str | None = None, force: bool = False) -> str:
    """Draw a report as PNG, SVG or PDF (by the name's ending).

    Args:
        tensor: whose codes are drawn; None for the largest entropy-coded one inside a layer.
    Returns:
        name of the tensor drawn.
    Raises:
        FormatError: nothing in the file is entropy-coded, no such tensor, or an ending that is no
            picture's.
        OutputExistsError, ConversionError: see gguf_io.output.

    >>> from entrollm_gguf import inspect_file, plot_file
    >>> plot_file(inspect_file("model.gguf"), "model.svg")
    'blk.0.ffn_down.weight'
    """
    path = Path(path)
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise FormatError(f"{path}: a plot is a .png, .svg or .pdf file")
    figure, tensor = draw_file(report, tensor)
    with atomic_output(path, force) as temporary:
        figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=130)
    return tensor


def draw_file(report: FileReport, tensor: str | None = None) -> tuple[Figure, str]:
    """The picture of a report: layers above, the codes of one tensor below.

    Args:
        tensor: whose codes are drawn; None for the largest entropy-coded one inside a layer.
    Returns:
        figure, name of the tensor drawn.
    Raises:
        FormatError: nothing in the file is entropy-coded, or no such tensor.
    """
    from matplotlib.figure import Figure

    coded = [t for t in report.tensors if t.entropy is not None]
    if not coded:
        raise FormatError(f"{report.path}: has no entropy-coded tensors, nothing to draw")
    if tensor is None:
        tensor = max(coded, key=lambda t: (_LAYER.match(t.name) is not None, np.prod(t.shape))).name
    elif tensor not in {t.name for t in coded}:
        raise FormatError(f"{report.path}: has no entropy-coded tensor {tensor}; `entrollm inspect` lists them")

    figure = Figure(figsize=(11, 9), layout="constrained")
    above, below = figure.subplots(2, 1)
    title = Path(report.path).name + (f", recipe {report.recipe}" if report.recipe else "")
    figure.suptitle(printable(title), parse_math=False)  # a dollar sign in a name starts no formula, here and below
    _draw_layers(above, coded)
    _draw_codes(below, report, tensor)
    return figure, tensor


def _draw_layers(axes, coded: list[TensorReport]) -> None:
    layers: dict[int, list[TensorReport]] = defaultdict(list)
    outside = []
    for t in coded:
        match = _LAYER.match(t.name)
        if match:
            layers[int(match[1])].append(t)
        else:
            outside.append(t)

    def mean(tensors: list[TensorReport], what: str) -> float:
        weights = [np.prod(t.shape) for t in tensors]
        return float(np.average([getattr(t, what) for t in tensors], weights=weights))

    numbers = sorted(layers)
    labels = [str(n) for n in numbers] + [printable(t.name.removesuffix(".weight")) for t in outside]
    groups = [layers[n] for n in numbers] + [[t] for t in outside]
    x = np.arange(len(groups))
    for i, group in enumerate(groups):
        axes.scatter(
            [i] * len(group), [t.entropy for t in group], s=12, color="0.7", zorder=1, label="entropy of a tensor" if i == 0 else None
        )
    axes.plot(x, [mean(g, "bits_per_weight") for g in groups], "o-", color="tab:blue", ms=4, label="bits per weight, container included")
    axes.plot(x, [mean(g, "entropy") for g in groups], "s--", color="tab:orange", ms=4, label="entropy")
    step = max(1, len(numbers) // 24)
    shown = [i for i in x if i >= len(numbers) or i % step == 0]
    axes.set_xticks(shown, [labels[i] for i in shown], rotation=30 if outside else 0, ha="right" if outside else "center", parse_math=False)
    axes.set_xlabel("layer")
    axes.set_ylabel("bits per weight")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="lower left")
    axes.set_title("Per layer (weighted by size)")


def _draw_codes(axes, report: FileReport, name: str) -> None:
    entry = next(e for e in open_model(Path(report.path)).tensors() if e.name == name)
    assert entry.kind is not None  # plot_file chose it among the coded ones
    payload = Payload(entry.kind, entry.data, entry.shape, name)
    code, counts = payload.code_parameters()[0], payload.counts()[0]  # each expert has a code of its own
    share = counts / counts.sum()
    x = np.arange(-128, 128)
    axes.bar(x, share * 100, width=1.0, color="tab:blue", alpha=0.6)
    axes.set_xlabel("code")
    axes.set_ylabel("share of the codes, %", color="tab:blue")
    used = np.flatnonzero(counts)
    axes.set_xlim(x[used[0]] - 2, x[used[-1]] + 2)
    axes.xaxis.get_major_locator().set_params(integer=True)

    lengths = code.lengths()
    right = axes.twinx()
    coded = counts > 0
    right.step(x[coded], lengths[coded], where="mid", color="tab:red", lw=1.2, label="code length")
    with np.errstate(divide="ignore"):
        right.plot(x[coded], -np.log2(share[coded]), ".", color="0.35", ms=3, label="ideal: -log2 of the share")
    right.set_ylabel("bits", color="tab:red")
    right.set_ylim(0, 25)  # 7 raw bits, 6 of the tail and 8 of the byte are 21; the rest is room for the legend
    right.legend(loc="upper center", ncols=2)
    of_stack = f", matrix 0 of {payload.header.n_slabs}" if payload.header.n_slabs > 1 else ""
    axes.set_title(f"Codes of {printable(name)}{of_stack}: {_described(code, counts)}", parse_math=False)


def _described(code: Code, counts: np.ndarray) -> str:
    """A code in words, and how weights with these counts use it."""
    text = f"{code.raw_bits} raw bit{'s' if code.raw_bits > 1 else ''}"
    if not code.digits:
        return text
    usage = code.usage(counts)
    return f"{text}, a tail for {(usage.tail + usage.far) / counts.sum() * 100:.2g} weights in 100"
