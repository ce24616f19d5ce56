# SPDX-License-Identifier: MIT
"""Resident memory of fused mode against the compressed size. `python bench/memory.py OUT.json [HF_DIR]`, SmolLM2-135M-Instruct by default.

Each model runs in a process of its own: loaded with mmap, 64 tokens evaluated so that every weight was touched, then /proc/self/smaps_rollup. What
is no weight (interpreter, KV cache, compute buffers) is what the Q8_0 run has beyond its weights; weights of a run are its resident set
less that. Linux only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from entrollm_gguf import runtime
from entrollm_gguf.convert.pipeline import convert_model
from entrollm_gguf.eval.demo import environment
from entrollm_gguf.eval.demo_model import build_hf_folder, fetch_gguf
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
print(next(line.split()[1] for line in open("/proc/self/smaps_rollup") if line.startswith("Rss")))
"""


def resident(path: Path, mode: str) -> int:
    """Resident set in bytes after 65 tokens."""
    environment = {**os.environ, "GGML_ENTROPY_MODE": mode}
    result = subprocess.run([sys.executable, "-c", _RUN, path], capture_output=True, text=True, check=True, env=environment)
    return int(result.stdout) * 1024


def weights(path: Path) -> int:
    """Bytes of all tensors of a file."""
    return sum(t.n_bytes for t in open_model(path).tensors())


def main(out: Path, source: Path | None) -> None:
    """Measure three recipes and both modes."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        if source is None:
            source = Path(scratch) / "SmolLM2-135M-Instruct"
            build_hf_folder(fetch_gguf(runtime.cache_folder() / "models"), source)
        base = Path(scratch) / "base.gguf"
        convert_model(source, base, recipe="EQ8-rows")
        q8_0 = Path(scratch) / "q8_0.gguf"
        decode_file(base, q8_0)
        other = resident(q8_0, "load") - weights(q8_0)
        for recipe in ("EQ8-rows", "EQ8-paper", "EQ4-rows"):
            path = Path(scratch) / f"{recipe}.gguf"
            convert_model(source, path, recipe=recipe)
            row = {"recipe": recipe, "compressed_bytes": weights(path)}
            for mode in ("fused", "load"):
                row[f"{mode}_weight_bytes"] = resident(path, mode) - other
                row[f"{mode}_over_compressed"] = row[f"{mode}_weight_bytes"] / row["compressed_bytes"]
            rows.append(row)
            ratios = ", ".join(f"{mode} {row[f'{mode}_over_compressed']:.3f}" for mode in ("fused", "load"))
            print(f"{recipe:10} {row['compressed_bytes'] / 1e6:7.1f} MB compressed; resident over compressed: {ratios}")
    report = {
        "command": "python bench/memory.py OUT.json",
        "commit": commit,
        "environment": environment(),
        "model": source.name,
        "not_weights_bytes": other,
        "rows": rows,
    }
    out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) == 3 else None)
