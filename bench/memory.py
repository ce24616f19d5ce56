# SPDX-License-Identifier: MIT
"""Resident memory of fused mode against the compressed size, and cold starts.
`python bench/memory.py OUT.json [HF_DIR]`; SmolLM2-135M-Instruct by default.

Each model runs in a process of its own: loaded with mmap, 64 tokens evaluated so that every weight
was touched, then /proc/self/smaps_rollup. Everything that is not weights (interpreter, KV cache,
compute buffers) is taken to be what the Q8_0 run has beyond its weights; the weights of a run are
its resident set less that. Two processes at once: what both hold together (Pss counts a shared page
by halves) beyond what two of Q8_0 hold beyond their weights, over the compressed size: 1 if they
share all of it.

Cold start: wall time of llama-completion for a prompt of one token and one token more, the file's
pages dropped from the page cache before; the median of some runs in turns. Linux only.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from provenance import provenance

from entrollm_gguf import runtime
from entrollm_gguf.convert.pipeline import convert_model
from entrollm_gguf.eval.demo_model import build_hf_folder, fetch_gguf
from entrollm_gguf.eval.tools import run_tool
from entrollm_gguf.gguf_io.reader import open_model
from entrollm_gguf.inspect.decode import decode_file

_RUN = """
import sys
import llama_cpp
defaults = llama_cpp.llama_model_default_params
def without_repacking():
    params = defaults()
    params.use_extra_bufts = False
    return params
llama_cpp.llama_cpp.llama_model_default_params = llama_cpp.llama_model_default_params = without_repacking
model = llama_cpp.Llama(sys.argv[1], n_ctx=256, n_batch=64, n_threads=2, n_threads_batch=2, verbose=False)
model.eval([(7 + 131 * i) % model.n_vocab() for i in range(64)])
model.eval([11])
print("ready", flush=True)
sys.stdin.readline()
for line in open("/proc/self/smaps_rollup"):
    if line.startswith(("Rss", "Pss:")):
        print(int(line.split()[1]) * 1024)
sys.stdout.flush()
sys.stdin.readline()
"""
COLD_STARTS = 15


def resident(path: Path, mode: str, processes: int = 1) -> list[tuple[int, int]]:
    """Resident set, and its share (Pss), in bytes after 65 tokens, of so many processes at once."""
    environment = {**os.environ, "GGML_ENTROPY_MODE": mode}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    running = [subprocess.Popen([sys.executable, "-c", _RUN, path], text=True, env=environment, **pipes) for _ in range(processes)]
    for process in running:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    found = []
    for process in running:
        print("go", file=process.stdin, flush=True)
        found.append((int(process.stdout.readline()), int(process.stdout.readline())))
    for process in running:
        process.communicate("end\n")
    return found


def cold_starts(files: dict[str, tuple[Path, str]]) -> dict[str, list[float]]:
    """Seconds until the first token is there, by name: (file, mode), in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in files}
    for _ in range(COLD_STARTS):
        for name, (path, mode) in files.items():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            started = time.perf_counter()
            run_tool("llama-completion", ["-m", path, "-p", "a", "-n", "1", "-no-cnv", "--no-warmup"], model=path, mode=mode)
            seconds[name].append(time.perf_counter() - started)
    return seconds


def weights(path: Path) -> int:
    """Bytes of all tensors of a file."""
    return sum(t.n_bytes for t in open_model(path).tensors())


def main(out: Path, source: Path | None) -> None:
    """Measure some recipes and both modes."""
    begun = provenance("python bench/memory.py OUT.json")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        if source is None:
            source = Path(scratch) / "SmolLM2-135M-Instruct"
            build_hf_folder(fetch_gguf(runtime.cache_folder() / "models"), source)
        base = Path(scratch) / "base.gguf"
        convert_model(source, base, recipe="EQ8-rows")
        q8_0 = Path(scratch) / "q8_0.gguf"
        decode_file(base, q8_0)
        other = resident(q8_0, "load")[0][0] - weights(q8_0)
        other_of_two = sum(share for _, share in resident(q8_0, "load", processes=2)) - weights(q8_0)
        starts = {"Q8_0": (q8_0, "auto")}
        for recipe in ("EQ8-rows", "EQ8-4.5", "EQ8-paper", "EQ4-rows"):
            path = Path(scratch) / f"{recipe}.gguf"
            convert_model(source, path, recipe=recipe)
            starts |= {f"{recipe} {mode}": (path, mode) for mode in ("fused", "load")}
            row = {"recipe": recipe, "compressed_bytes": weights(path)}
            for mode in ("fused", "load"):
                row[f"{mode}_weight_bytes"] = resident(path, mode)[0][0] - other
                row[f"{mode}_over_compressed"] = row[f"{mode}_weight_bytes"] / row["compressed_bytes"]
            both = resident(path, "fused", processes=2)
            row["two_fused_processes_weight_bytes"] = sum(share for _, share in both) - other_of_two
            row["two_fused_over_compressed"] = row["two_fused_processes_weight_bytes"] / row["compressed_bytes"]
            rows.append(row)
            ratios = ", ".join(f"{mode} {row[f'{mode}_over_compressed']:.3f}" for mode in ("fused", "load", "two_fused"))
            print(f"{recipe:10} {row['compressed_bytes'] / 1e6:7.1f} MB compressed; resident over compressed: {ratios}")
        seconds = cold_starts(starts)
        for name, values in seconds.items():
            print(f"{name:16} cold start, median of {COLD_STARTS}: {statistics.median(values):.2f} s")
    report = {
        **begun,
        "model": source.name,
        "not_weights_bytes": other,
        "not_weights_of_two_bytes": other_of_two,
        "rows": rows,
        "cold_start_seconds": seconds,
    }
    out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) == 3 else None)
