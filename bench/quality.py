# SPDX-License-Identifier: MIT
"""Size against quality: stock types with and without an importance matrix, and ours.

    python bench/quality.py OUT_FOLDER RESULTS.json [CHUNKS [KIND_TO_LEAVE_OUT ...]]
    python bench/quality.py table RESULTS.json

The second form prints the table of docs/quantization.md and draws the picture again.

The model is SmolLM2-135M-Instruct without the Q4_1 grid it came with: every block of 32 weights is
dithered within its step (fixed seed), so that no block type fits it by birth. Text: Python's
language reference; its first half is scored, the importance matrix and our calibration come from
its second half. KL divergence is to the unquantized (dithered) model. Bits per weight count all
tensors, not the metadata. Files made with data are also scored on docstrings of the standard
library, which shows whether what was learnt holds for another kind of text.

Rows of 576 are no multiple of 256, so llama-quantize puts other types in place of K and I types for
most tensors of this model: names tell what was asked for, bits per weight what came out.

Draws docs/quality.png and docs/quality.svg.
"""

from __future__ import annotations

import ast
import dataclasses
import itertools
import json
import math
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from provenance import provenance

from entrollm_gguf import runtime
from entrollm_gguf.convert.basis import Calibration
from entrollm_gguf.convert.pipeline import convert_model
from entrollm_gguf.convert.recipes import RECIPES as RECIPES_BY_NAME
from entrollm_gguf.eval.demo_model import build_hf_folder, english_text, fetch_gguf
from entrollm_gguf.eval.perplexity import ReferenceLogits
from entrollm_gguf.eval.tools import run_tool
from entrollm_gguf.gguf_io.patched import import_gguf

STOCK = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q3_K_M", "IQ3_S")
RECIPES = tuple(name for name, recipe in RECIPES_BY_NAME.items() if recipe.bits is not None)
FEWER = RECIPES[::2]  # for statistics of lesser kinds
SEED = 2505


def dithered_folder(out: Path) -> Path:
    """The model as a Hugging Face folder, each weight moved at random within half a step of its
    Q4_1 block."""
    folder = out / "SmolLM2-135M-dithered"
    if (folder / "model.safetensors").is_file():
        return folder
    import torch
    from safetensors.torch import load_file, save_file

    plain = out / "SmolLM2-135M"
    build_hf_folder(fetch_gguf(runtime.cache_folder() / "models"), plain)
    generator = torch.Generator().manual_seed(SEED)
    tensors = load_file(plain / "model.safetensors")
    for name, tensor in sorted(tensors.items()):
        if tensor.dim() != 2:
            continue
        blocks = tensor.float().reshape(-1, 32)
        step = (blocks.amax(1, keepdim=True) - blocks.amin(1, keepdim=True)) / 15  # 16 levels from the smallest to the largest
        blocks += (torch.rand(blocks.shape, generator=generator) - 0.5) * step
        tensors[name] = blocks.reshape(tensor.shape).to(torch.bfloat16)
    (plain / "model.safetensors").unlink()
    part = out / "part.safetensors"
    save_file(tensors, part, metadata={"format": "pt"})
    part.replace(plain / "model.safetensors")
    plain.replace(folder)
    return folder


def docstrings() -> str:
    """Docstrings of the standard library's modules, in the order of their names."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    found = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) for path in sorted(folder.glob("*.py")))
    return "\n\n".join(text for text in found if text)


def tensor_bits(path: Path) -> float:
    """Bits per weight of all tensors of a GGUF."""
    tensors = import_gguf().GGUFReader(path).tensors
    return sum(int(t.n_bytes) for t in tensors) * 8 / sum(int(t.n_elements) for t in tensors)


def make_reference(out: Path) -> tuple[Path, Path]:
    """Model folder without the grid, its F16 GGUF, and the texts."""
    hf = dithered_folder(out)
    text = english_text()
    (out / "scored.txt").write_text(text[: len(text) // 2], encoding="utf-8")
    (out / "calibration.txt").write_text(text[len(text) // 2 :], encoding="utf-8")
    (out / "docstrings.txt").write_text(docstrings(), encoding="utf-8")
    reference = out / "F16.gguf"
    if not reference.is_file():
        script = runtime.conversion_path() / "convert_hf_to_gguf.py"
        subprocess.run(
            [sys.executable, str(script), str(hf), "--outfile", str(reference), "--outtype", "f16"], check=True, capture_output=True
        )
    return hf, reference


def make_files(out: Path, without: list[str]) -> dict[str, tuple[str, Path]]:
    """Name -> (family, file); kinds of our statistics may be left out."""
    hf, reference = make_reference(out)
    imatrix = out / "imatrix.gguf"
    if not imatrix.is_file():
        arguments = ["-m", reference, "-f", out / "calibration.txt", "-o", imatrix, "-c", "512", "--chunks", "40", "--process-output"]
        run_tool("llama-imatrix", arguments, model=reference)
    files = {"F16": ("reference", reference)}
    for name in STOCK:
        for family, arguments in (("stock", []), ("stock, imatrix", ["--imatrix", imatrix])):
            path = out / f"{name}{'-imatrix' if arguments else ''}.gguf"
            files[path.stem] = (family, path)
            if path.is_file():
                continue
            run_tool("llama-quantize", [*arguments, reference, path, name], model=reference)
    calibrations = {
        "no data": None,
        "own text": Calibration(own_text=True),
        "imatrix": Calibration(imatrix=imatrix),
        "calibration": Calibration(text=out / "calibration.txt"),
    }
    for name in RECIPES:
        for kind, calibration in calibrations.items():
            if (kind in ("own text", "imatrix") and name not in FEWER) or kind in without:
                continue
            path = out / f"{name}-{kind.replace(' ', '-')}.gguf"
            if not path.is_file():
                convert_model(hf, path, recipe=name, calibration=calibration)
            files[path.stem] = (f"ours, {kind}", path)
            print(f"{path.name} made", flush=True)
    return files


def draw(rows: list[dict], path: Path) -> None:
    """KLD over bits per weight, one line a family."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5.5), layout="constrained")
    families = {
        "stock": "s",
        "stock, imatrix": "^",
        "ours, no data": "o",
        "ours, own text": "D",
        "ours, imatrix": "v",
        "ours, calibration": "P",
    }
    for family, marker in families.items():
        points = sorted((row["bits_per_weight"], row["kld_mean"], row["name"]) for row in rows if row["family"] == family)
        if not points:
            continue
        axes.plot([p[0] for p in points], [p[1] for p in points], marker=marker, label=family, linewidth=1)
        for x, y, name in points:
            if family.startswith("stock"):
                axes.annotate(name.removesuffix("-imatrix"), (x, y), fontsize=6, xytext=(3, 3), textcoords="offset points")
    axes.set_yscale("log")
    axes.set_xlabel("bits per weight, all tensors")
    axes.set_ylabel("mean KL divergence to the unquantized model, nats")
    axes.set_title("SmolLM2-135M-Instruct, Q4_1 grid dithered away")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    for suffix in (".png", ".svg"):
        figure.savefig(path.with_suffix(suffix), dpi=130, metadata={"Date": None} if suffix == ".svg" else None)


def bits_at(rows: list[dict], family: str, divergence: float) -> float | None:
    """Bits per weight at which a family has this divergence, between its points, in the logarithm
    of the divergence; None outside them."""
    points = sorted((math.log(row["kld_mean"]), row["bits_per_weight"]) for row in rows if row["family"] == family)
    if not points or not points[0][0] <= math.log(divergence) <= points[-1][0]:
        return None
    for (low, bits_low), (high, bits_high) in itertools.pairwise(points):
        if low <= math.log(divergence) <= high:
            return bits_low + (bits_high - bits_low) * (math.log(divergence) - low) / (high - low)
    return None


def table(rows: list[dict]) -> str:
    """Markdown: every file, and for stock types what ours take at the same divergence."""
    there = {row["family"] for row in rows}
    ours = [one for one in ("ours, no data", "ours, own text", "ours, imatrix", "ours, calibration") if one in there]
    lines = [
        "| file | bits per weight | perplexity | KLD mean | median | 99 % | same top token, % | "
        + " | ".join(one.replace("ours", "our bits") for one in ours)
        + " |",
        "|---" * (7 + len(ours)) + "|",
    ]
    for row in sorted(rows, key=lambda row: -row["bits_per_weight"]):
        if row["kld_mean"] is None:
            continue
        name = row["name"].removesuffix("-imatrix") + (", imatrix" if row["family"] == "stock, imatrix" else "")
        cells = [
            name if row["family"].startswith("stock") else f"{row['name']}",
            f"{row['bits_per_weight']:.2f}",
            f"{row['ppl']:.2f}",
            f"{row['kld_mean']:.4f} ± {row['kld_error']:.4f}",
            f"{row['kld_median']:.4f}",
            f"{row['kld_99']:.3f}",
            f"{row['same_top_percent']:.1f} ± {row['same_top_error']:.1f}",
        ]
        for family in ours:
            bits = bits_at(rows, family, row["kld_mean"]) if row["family"].startswith("stock") else None
            cells.append(f"{bits:.2f} ({100 * (1 - bits / row['bits_per_weight']):.0f} % fewer)" if bits else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Make, measure, draw."""
    if len(sys.argv) < 3:
        raise SystemExit("usage: quality.py OUT_FOLDER RESULTS.json [CHUNKS [KIND_TO_LEAVE_OUT ...]], or quality.py table RESULTS.json")
    if sys.argv[1] == "table":
        rows = json.loads(Path(sys.argv[2]).read_text())["rows"]
        draw(rows, Path(__file__).resolve().parents[1] / "docs" / "quality")
        print(table(rows))
        return
    out, chunks = Path(sys.argv[1]), int(sys.argv[3]) if len(sys.argv) > 3 else 16
    begun = provenance(" ".join(["python bench/quality.py OUT_FOLDER RESULTS.json", str(chunks), *sys.argv[4:]]))
    out.mkdir(parents=True, exist_ok=True)
    files = make_files(out, sys.argv[4:])
    rows: list[dict] = []
    with ReferenceLogits(files["F16"][1], out / "scored.txt", chunks=chunks) as reference:
        for name, (family, path) in files.items():
            result = reference.result if name == "F16" else reference.compare(path)
            assert result is not None
            rows.append(
                {"name": name, "family": family, "bits_per_weight": tensor_bits(path), **dataclasses.asdict(result), "file": path.name}
            )
            kld = "" if result.kld_mean is None else f", KLD {result.kld_mean:.4f}"
            print(f"{name:16} {rows[-1]['bits_per_weight']:6.3f} bits per weight, perplexity {result.ppl:.3f}{kld}", flush=True)
    elsewhere = {
        name: path for name, (family, path) in files.items() if family in ("stock, imatrix", "ours, own text", "ours, calibration")
    }
    with ReferenceLogits(files["F16"][1], out / "docstrings.txt", chunks=max(1, chunks // 2)) as reference:
        for row in rows:
            if row["name"] in elsewhere:
                row["docstrings"] = dataclasses.asdict(reference.compare(elsewhere[row["name"]]))
    data = {**begun, "rows": rows, "chunks": chunks, "seed": SEED}
    Path(sys.argv[2]).write_text(json.dumps(data, indent=1) + "\n")
    draw(rows, Path(__file__).resolve().parents[1] / "docs" / "quality")
    shutil.rmtree(out / "SmolLM2-135M", ignore_errors=True)


if __name__ == "__main__":
    main()
