# SPDX-License-Identifier: MIT
"""Tokens per second of whole models by llama-bench: stock types, and ours in load and fused mode.
`python bench/e2e.py OUT.json [HF_DIR]`.

SmolLM2-135M-Instruct by default. Runs take turns in rounds, and a ratio compares two runs of the
same round, so that a noisy minute of a shared machine hits both; the median over rounds is
reported. Load mode is compared with the decoded-back file (design: at least 0.97), fused mode
against stock Q8_0. Raw records of llama-bench are kept.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from provenance import provenance

from entrollm_gguf import runtime
from entrollm_gguf.convert.pipeline import convert_model
from entrollm_gguf.eval.demo_model import build_hf_folder, fetch_gguf
from entrollm_gguf.eval.tools import run_tool
from entrollm_gguf.inspect.decode import decode_file

ROUNDS = 5
STOCK = ("Q8_0", "Q4_K_M")
RECIPES = ("EQ8-4.5", "EQ8", "EQ8-paper", "EQ4-rows")
ARGUMENTS = ("-t", str(os.cpu_count() or 1), "-p", "256", "-n", "32", "-r", "1", "-o", "json")


@dataclass(frozen=True)
class Run:
    """A file in a mode, and the run that it is compared with."""

    name: str
    path: Path
    mode: str
    against: str | None


def make_files(source: Path, folder: Path) -> list[Run]:
    """Stock files, ours, and ours decoded back."""
    f16 = folder / "F16.gguf"
    script = runtime.conversion_path() / "convert_hf_to_gguf.py"
    command = [sys.executable, script, source, "--outfile", f16, "--outtype", "f16"]
    subprocess.run(command, check=True, capture_output=True)
    runs = []
    for stock in STOCK:
        path = folder / f"{stock}.gguf"
        run_tool("llama-quantize", [f16, path, stock], model=f16)
        runs.append(Run(stock, path, "auto", None if stock == STOCK[0] else STOCK[0]))
    for recipe in RECIPES:
        coded, plain = folder / f"{recipe}.gguf", folder / f"{recipe}-decoded.gguf"
        convert_model(source, coded, recipe=recipe)
        decode_file(coded, plain)
        decoded = f"{recipe} decoded"
        runs.append(Run(decoded, plain, "auto", STOCK[0]))
        runs += [Run(f"{recipe} load", coded, "load", decoded), Run(f"{recipe} fused", coded, "fused", STOCK[0])]
    return runs


def measure(run: Run) -> tuple[list[dict], dict[str, float]]:
    """llama-bench's records, and tokens per second of prompt and generation."""
    records = json.loads(run_tool("llama-bench", ["-m", run.path, *ARGUMENTS], model=run.path, mode=run.mode).stdout)
    for record in records:
        record["model_filename"] = Path(record["model_filename"]).name  # the folder is a temporary one
    return records, {"prompt" if record["n_prompt"] else "generation": record["avg_ts"] for record in records}


def main(out: Path, source: Path | None) -> None:
    """Measure all runs in turn, ROUNDS times."""
    begun = provenance("python bench/e2e.py OUT.json")
    with tempfile.TemporaryDirectory() as scratch:
        if source is None:
            source = Path(scratch) / "SmolLM2-135M-Instruct"
            build_hf_folder(fetch_gguf(runtime.cache_folder() / "models"), source)
        runs = make_files(source, Path(scratch))
        sizes = {run.name: run.path.stat().st_size for run in runs}
        records: dict[str, list[dict]] = {run.name: [] for run in runs}
        rounds: list[dict[str, dict[str, float]]] = []
        for i in range(ROUNDS):
            print(f"round {i + 1} of {ROUNDS}", file=sys.stderr)
            rounds.append({})
            for run in runs:
                found, rounds[-1][run.name] = measure(run)
                records[run.name] += found
    rows = []
    print(f"{'':20}{'MB':>8}{'prompt t/s':>12}{'generation':>12}  ratio of prompt, generation (lowest .. highest round)")
    for run in runs:
        row: dict = {"name": run.name, "bytes": sizes[run.name], "mode": run.mode, "against": run.against, "records": records[run.name]}
        told = ""
        for part in ("prompt", "generation"):
            row[part] = statistics.median(one[run.name][part] for one in rounds)
            if run.against:
                ratios = [one[run.name][part] / one[run.against][part] for one in rounds]
                row[f"{part}_ratios"] = ratios
                told += f"  {statistics.median(ratios):.3f} ({min(ratios):.2f} .. {max(ratios):.2f})"
        print(
            f"{run.name:20}{row['bytes'] / 1e6:8.1f}{row['prompt']:12.1f}{row['generation']:12.1f}{told}{f'  of {run.against}' if told else ''}"
        )
        rows.append(row)
    report = {
        **begun,
        "model": source.name,
        "llama_bench": ARGUMENTS,
        "rounds": ROUNDS,
        "rows": rows,
    }
    out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) == 3 else None)
