# SPDX-License-Identifier: MIT
"""A model of 1.07 G weights (bench/synthetic.py): tokens per second, bytes moved, batches, cold
starts. `python bench/scale.py FOLDER OUT.json`; with `cold` behind that, cold starts alone.

FOLDER keeps the files (8 GB, a quarter of an hour to make), so that a second run finds them. Beside
ours, stock types of the same weights: Q8_0, Q6_K, Q4_K_M, IQ4_XS. Runs take turns in rounds, and a
ratio compares two runs of the same round; medians are reported. The speed of the machine's memory,
reading an array that no cache holds, is measured in the same run.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from provenance import provenance
from synthetic import build_llama

from entrollm_gguf import runtime
from entrollm_gguf.convert.pipeline import convert_model
from entrollm_gguf.eval.demo_model import build_hf_folder, fetch_gguf
from entrollm_gguf.eval.tools import run_tool
from entrollm_gguf.gguf_io.reader import open_model

STOCK = ("Q8_0", "Q6_K", "Q4_K_M", "IQ4_XS")
OURS = ("EQ8-4.5", "EQ8")
ROUNDS, COLD_STARTS = 3, 3
BATCHES = (1, 2, 4, 8)
N_THREADS = sorted({1, os.cpu_count() or 1})


@dataclass(frozen=True)
class Run:
    """A file in a mode."""

    name: str
    path: Path
    mode: str
    n_threads: int


def make_files(folder: Path) -> dict[str, Path]:
    """All files by name, those that are not there yet made."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, source, f16 = folder / "SmolLM2", folder / "synthetic-1B", folder / "F16.gguf"
    files = {name: folder / f"{name}.gguf" for name in (*STOCK, *OURS)}
    if all(path.is_file() for path in files.values()):
        return files
    if not tokenizer.is_dir():
        build_hf_folder(fetch_gguf(runtime.cache_folder() / "models"), tokenizer)
    if not source.is_dir():
        build_llama(folder / "part", tokenizer)
        (folder / "part").rename(source)
    script = runtime.conversion_path() / "convert_hf_to_gguf.py"
    subprocess.run([sys.executable, script, source, "--outfile", f16, "--outtype", "f16"], check=True, capture_output=True)
    for name, path in files.items():
        print(f"making {path.name}", file=sys.stderr)
        if name in STOCK:
            run_tool("llama-quantize", [f16, path, name], model=f16)
        else:
            convert_model(source, path, recipe=name, force=True)
    f16.unlink()
    return files


def read_bandwidth(n_threads: int) -> float:
    """GB/s of reading 1 GiB, the best of ten."""
    parts = np.array_split(np.ones(1 << 27, np.int64), n_threads)
    best = float("inf")
    with ThreadPoolExecutor(n_threads) as pool:
        for _ in range(10):
            started = time.perf_counter()
            list(pool.map(np.bitwise_or.reduce, parts))
            best = min(best, time.perf_counter() - started)
    return (8 << 27) / best / 1e9


def bench(run: Run) -> dict[str, float]:
    """Tokens per second of a prompt of 512 and of generation, by llama-bench; on one core of
    generation alone, since a prompt takes long."""
    arguments = ["-m", run.path, "-t", run.n_threads, "-p", "512" if run.n_threads > 1 else "0", "-n", "16", "-r", "1", "-o", "json"]
    records = json.loads(run_tool("llama-bench", arguments, model=run.path, mode=run.mode).stdout)
    return {"prompt" if record["n_prompt"] else "generation": record["avg_ts"] for record in records}


def batched(run: Run) -> dict[int, float]:
    """Tokens per second of short prompts, by their length: what several sequences at once, or
    speculative decoding, ask of the products."""
    sizes = ",".join(map(str, BATCHES))
    arguments = ["-m", run.path, "-t", run.n_threads, "-p", sizes, "-n", "0", "-r", "5", "-o", "json"]
    records = json.loads(run_tool("llama-bench", arguments, model=run.path, mode=run.mode).stdout)
    return {record["n_prompt"]: max(record["samples_ts"]) for record in records}


def cold_start(path: Path, mode: str) -> tuple[float, str]:
    """Seconds until the first token with the file's pages dropped from the page cache, and what the
    loader said of coded tensors."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    started = time.perf_counter()
    done = run_tool("llama-completion", ["-m", path, "-p", "a", "-n", "1", "-no-cnv", "--no-warmup", "-lv", "3"], model=path, mode=mode)
    seconds = time.perf_counter() - started
    return seconds, "; ".join(line.strip() for line in done.stderr.splitlines() if "llama_entropy" in line)


def cold_starts(modes: list[tuple[str, Path, str]], n_rounds: int) -> dict[str, dict]:
    """Cold starts of (name, file, mode) in turns."""
    starts: dict[str, list[float]] = {name: [] for name, _, _ in modes}
    said: dict[str, str] = {}
    for _ in range(n_rounds):
        for name, path, mode in modes:
            seconds, said[name] = cold_start(path, mode)
            starts[name].append(seconds)
    for name, values in starts.items():
        print(f"{name:14} cold start {statistics.median(values):.2f} s; {re.sub(r'.*llama_entropy: ', '', said[name])}")
    return {"cold_start_seconds": starts, "loader": said}


def main(folder: Path, out: Path, only_cold: bool) -> None:
    """Measure everything, runs in turns; or cold starts alone."""
    begun = provenance("python bench/scale.py FOLDER OUT.json" + (" cold" if only_cold else ""))
    files = make_files(folder)
    sizes = {name: sum(t.n_bytes for t in open_model(path).tensors()) for name, path in files.items()}
    modes = [(name, path, "auto") for name, path in files.items() if name in STOCK]
    modes += [(f"{name} {mode}", files[name], mode) for name in OURS for mode in ("load", "fused")]
    if only_cold:
        out.write_text(json.dumps({**begun, **cold_starts(modes, 2 * COLD_STARTS + 1)}, indent=2) + "\n")
        return
    runs = [Run(name, path, mode, n) for n in N_THREADS for name, path, mode in modes]
    rounds: list[list[dict[str, float]]] = []
    bandwidths = {n: read_bandwidth(n) for n in N_THREADS}
    for i in range(ROUNDS):
        print(f"round {i + 1} of {ROUNDS}", file=sys.stderr)
        rounds.append([bench(run) for run in runs])
        bandwidths = {n: max(known, read_bandwidth(n)) for n, known in bandwidths.items()}
    rows = []
    for i, run in enumerate(runs):
        base = next(j for j, one in enumerate(runs) if one.name == "Q8_0" and one.n_threads == run.n_threads)
        row: dict = {"name": run.name, "threads": run.n_threads, "bytes": sizes[run.name.split()[0]]}
        for part in rounds[0][i]:
            row[part] = [one[i][part] for one in rounds]
            row[f"{part}_of_q8_0"] = statistics.median(one[i][part] / one[base][part] for one in rounds)
        generation = statistics.median(row["generation"])
        resident = sizes["Q8_0"] if run.mode == "load" else row["bytes"]  # what a token reads: load mode decodes to Q8_0
        row["gb_per_second"] = resident * generation / 1e9
        rows.append(row)
        told = f"generation {generation:6.2f} ({row['generation_of_q8_0']:.2f})"
        if "prompt" in row:
            told += f", prompt {statistics.median(row['prompt']):7.1f} ({row['prompt_of_q8_0']:.2f})"
        print(f"{run.name:14} {run.n_threads} threads {row['bytes'] / 1e6:7.0f} MB  {told}, {row['gb_per_second']:5.1f} GB/s")
    batches = {run.name: batched(run) for run in runs if run.n_threads == N_THREADS[-1]}
    for name, speeds in batches.items():
        print(f"{name:14} {', '.join(f'{n} tokens at once {speed:.2f}' for n, speed in speeds.items())} tokens/s")
    print(f"memory read: {', '.join(f'{n} threads {speed:.1f} GB/s' for n, speed in bandwidths.items())}")
    report = {
        **begun,
        "read_gb_per_second": bandwidths,
        "rows": rows,
        "tokens_at_once": batches,
        **cold_starts(modes, COLD_STARTS),
    }
    out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4) or sys.argv[3:] not in ([], ["cold"]):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]), len(sys.argv) == 4)
