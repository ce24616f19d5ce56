# SPDX-License-Identifier: MIT
"""What the order of sums does to a model. `python bench/sums.py OUT.json CODED.gguf [Q8_0.gguf
WHEEL]`; ten minutes on two cores for 135M weights.

CODED, without offsets, in load mode (the base), in fused mode with our products, in fused mode with
stock products (GGML_ENTROPY_PRODUCTS), and in load mode in batches of 64 instead of 512: perplexity
and KL divergence from the base. As a control, a stock file with two of upstream's own CPU variants,
for AVX2 (the base) and for AVX with FMA, out of a portable wheel (docs/wheels.md). Text: the
language reference that ships inside Python.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from provenance import provenance

from entrollm_gguf import runtime
from entrollm_gguf.eval.demo_model import english_text

CHUNKS = 24  # of 512 tokens, of which the second half is scored
VARIANTS = ("haswell", "piledriver")  # AVX2 and FMA; AVX and FMA


def measure(program: Path, model: Path, text: Path, base: Path, batch: int = 512, **environment: str) -> dict:
    """Perplexity, and its ratio to the base's with KL divergence from it if the base is there; else
    makes the base."""
    command = [program, "-m", model, "-f", text, "-c", "512", "-b", batch, "-ub", batch, "--chunks", CHUNKS, "-t", "2"]
    compare = ["--kl-divergence"] if base.exists() else []
    words = [*command, "--kl-divergence-base", base, *compare]
    result = subprocess.run(list(map(str, words)), capture_output=True, text=True, env={**os.environ, **environment})
    assert result.returncode == 0, result.stderr[-2000:]
    said = result.stdout + result.stderr
    if not compare:
        return {"perplexity": float(re.search(r"Final estimate: PPL = ([\d.]+)", said)[1])}

    def number(name: str) -> tuple[float, float]:
        found = re.search(re.escape(name) + r"\s*:\s*(-?[\d.]+) ±\s*(-?[\d.]+|-?nan)", said)
        return float(found[1]), 0.0 if "nan" in found[2] else float(found[2])

    ratio, ratio_error = number("Mean PPL(Q)/PPL(base)")
    return {
        "perplexity": number("Mean PPL(Q)")[0],
        "perplexity_of_base": number("Mean PPL(base)")[0],
        "ratio": ratio,
        "ratio_error": ratio_error,
        "kld": number("Mean    KLD")[0],
        "same_top_percent": float(re.search(r"Same top p: *([\d.]+)", said)[1]),
    }


def control(model: Path, wheel: Path, text: Path, folder: Path) -> dict:
    """A stock file with two variants of upstream's CPU code."""
    rows = {}
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    package = folder / "llama_cpp"
    for path in (*package.glob("bin/*"), *package.glob("lib/*")):
        path.chmod(0o755)
    kept = {name: (package / "lib" / f"libggml-cpu-{name}.so").read_bytes() for name in VARIANTS}
    for name in VARIANTS:
        for path in package.glob("lib/libggml-cpu-*"):
            path.unlink()
        (package / "lib" / f"libggml-cpu-{name}.so").write_bytes(kept[name])
        rows[name] = measure(package / "bin" / "llama-perplexity", model, text, folder / "control.base")
    return rows


def main(out: Path, coded: Path, stock: Path | None, wheel: Path | None) -> None:
    report = {**provenance("python bench/sums.py OUT.json CODED.gguf Q8_0.gguf WHEEL"), "model": coded.name, "chunks": CHUNKS}
    program = Path(runtime.tool("llama-perplexity"))
    with tempfile.TemporaryDirectory() as scratch:
        text, base = Path(scratch) / "text.txt", Path(scratch) / "base"
        text.write_text(english_text(), encoding="utf-8")
        rows = {"load": measure(program, coded, text, base, GGML_ENTROPY_MODE="load")}
        rows["load, batches of 64"] = measure(program, coded, text, base, 64, GGML_ENTROPY_MODE="load")
        for products in ("stock", "own"):
            rows[f"fused, {products} products"] = measure(
                program, coded, text, base, GGML_ENTROPY_MODE="fused", GGML_ENTROPY_PRODUCTS=products
            )
        report["rows"] = rows
        if stock is not None and wheel is not None:
            report["control"] = {"model": stock.name, "rows": control(stock, wheel, text, Path(scratch))}
    for name, row in {**rows, **report.get("control", {}).get("rows", {})}.items():
        print(f"{name:24}", ", ".join(f"{key} {value:g}" for key, value in row.items()))
    out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 5):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]), *(map(Path, sys.argv[3:]) if len(sys.argv) == 5 else (None, None)))
