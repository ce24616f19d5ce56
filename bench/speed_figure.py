# SPDX-License-Identifier: MIT
"""docs/speed.png and .svg from results: `python bench/speed_figure.py KERNELS.json SCALE.json`.

Tokens per second of a model of 1.07 G weights against cores, for some memory bandwidths. Points are
measured (bench/scale.py). Lines are a model: a token takes as long as the slower of computing, n
cores at the rate of one (bench/kernels.py, 4096 x 14336), and reading all weights once at that
bandwidth. Attention, threads that wait for each other and cores that share their units are not in
it, so real machines lie below.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

_BANDWIDTHS = (20, 50, 100, 200)  # GB/s: one channel of DDR4; a laptop; a desktop with DDR5; a server
_CORES = np.arange(1, 33)
_COLOURS = {"Q8_0": "#777777", "EQ8-4.5 fused": "#c44e52"}


def rates(kernels: dict) -> dict[str, float]:
    """G weights per second of one core, one column, 4096 x 14336: Q8_0's, and EQ8's at the entropy
    of EQ8-4.5."""
    rows = [row for row in kernels["one_column"] if row["shape"] == [4096, 14336]]
    q8_0 = next(row for row in rows if row["type"] == "Q8_0")
    ours = min((row for row in rows if row["type"] == "EQ8"), key=lambda row: abs(row["bits_per_weight"] - 4.5))
    return {
        "Q8_0": max(q8_0["product_gweights_per_second"].values()),
        "EQ8-4.5 fused": max(ours["product_gweights_per_second"].values()),
    }


def main(kernels_path: Path, scale_path: Path) -> None:
    """Draw and print the break-even."""
    kernels, scale = json.loads(kernels_path.read_text()), json.loads(scale_path.read_text())
    speed = rates(kernels)
    size = {row["name"]: row["bytes"] for row in scale["rows"]}
    n_weights = size["Q8_0"] / 1.0625
    docs = Path(__file__).resolve().parent.parent / "docs"
    figure, axes = plt.subplots(1, len(_BANDWIDTHS), figsize=(13, 3.6), sharey=True, layout="constrained")
    for axis, bandwidth in zip(axes, _BANDWIDTHS, strict=True):
        for name, colour in _COLOURS.items():
            computing = _CORES * speed[name] * 1e9 / n_weights
            reading = bandwidth * 1e9 / size[name]
            axis.plot(_CORES, np.minimum(computing, reading), color=colour, label=f"{name}, model")
        axis.set(
            title=f"{bandwidth} GB/s",
            xlabel="cores",
            xscale="log",
            yscale="log",
            xticks=[1, 2, 4, 8, 16, 32],
            xticklabels=[1, 2, 4, 8, 16, 32],
        )
        axis.grid(alpha=0.3)
    measured = scale["read_gb_per_second"]
    nearest = min(range(len(_BANDWIDTHS)), key=lambda i: abs(_BANDWIDTHS[i] - max(measured.values())))
    for row in scale["rows"]:
        if row["name"] in _COLOURS:
            label = f"{row['name']}, measured" if row["threads"] == 1 else None
            axes[nearest].plot(row["threads"], np.median(row["generation"]), "o", color=_COLOURS[row["name"]], label=label)
    axes[0].set_ylabel("tokens/s, 1.07 G weights")
    axes[nearest].legend(fontsize=8)
    figure.suptitle(
        f"Generation: lines are a model, points are measured ({scale['environment']['cpu']}, {max(measured.values()):.0f} GB/s)",
        fontsize=10,
    )
    for ending in ("png", "svg"):
        figure.savefig(docs / f"speed.{ending}", dpi=120)
    even = speed["EQ8-4.5 fused"] * size["Q8_0"] / n_weights
    print(
        f"a core: Q8_0 {speed['Q8_0']:.1f} G weights/s, EQ8-4.5 fused {speed['EQ8-4.5 fused']:.1f}; fused is ahead where cores x {even:.1f} > GB/s"
    )


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
