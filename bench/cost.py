# SPDX-License-Identifier: MIT
"""What the paper leaves out: the cost of conversion and of decoding at load.
`python bench/cost.py HF_DIR OUT.json`.

Each step runs in a process of its own, so that peak memory is its own. Times are wall clock; the
machine should be idle.
"""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from provenance import provenance

from entrollm_gguf import runtime
from entrollm_gguf.convert.recipes import RECIPES

_DECODED = re.compile(r"decoded (\d+) entropy-coded tensors, ([\d.]+) MiB -> ([\d.]+) MiB, in ([\d.]+) s with (\d+) threads")

_CONVERT = """
import json, logging, resource, sys, time
logging.disable(logging.WARNING)
import torch, transformers
from entrollm_gguf.convert import pipeline
from entrollm_gguf.convert.llama_cpp import SourceModel
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
spent = {}
each = SourceModel.each_tensor
def timed(self, handle):
    started = time.monotonic()
    each(self, handle)
    spent["tensors"] = time.monotonic() - started
SourceModel.each_tensor = timed
report = pipeline.convert_model(sys.argv[1], sys.argv[2], recipe=sys.argv[3])
print(json.dumps({
    "seconds": report.seconds,
    "tensor_seconds": spent["tensors"],
    "n_weights": report.n_weights,
    "file_bytes": report.file_bytes,
    "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    "import_mb": base / 1e3,
}))
"""


def convert(model: Path, out: Path, recipe: str) -> dict:
    """Convert in a fresh process."""
    result = subprocess.run([sys.executable, "-c", _CONVERT, model, out, recipe], capture_output=True, text=True, check=True)
    data = json.loads(result.stdout.splitlines()[-1])
    # weights arrive as bf16, two bytes each
    data["input_mb_per_second"] = data["n_weights"] * 2 / 1e6 / data["tensor_seconds"]
    return data


def load(path: Path) -> dict:
    """Load and make one token; decode time as the loader logs it, wall time of the whole process
    (best of five)."""
    command = [str(runtime.tool("llama-completion")), "-m", str(path), "-p", "a", "-n", "1", "-no-cnv", "--no-warmup", "-lv", "4"]
    seconds, decode, match = [], [], None
    for _ in range(5):
        started = time.monotonic()
        result = subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
        seconds.append(time.monotonic() - started)
        match = _DECODED.search(result.stderr)
        if match:
            decode.append(float(match[4]))
    data: dict = {"process_seconds_best": min(seconds), "process_seconds_all": seconds}
    if match:
        data |= {"tensors": int(match[1]), "coded_mib": float(match[2]), "plain_mib": float(match[3]), "threads": int(match[5])}
        data["decode_seconds_best"] = min(decode)
    return data


def main(model: Path, out: Path) -> None:
    """Measure all recipes."""
    results: dict = {
        "what": "cost of conversion and of decoding at load",
        **provenance("python bench/cost.py HF_DIR OUT.json"),
        "model": model.name,
        "recipes": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for recipe in RECIPES:
            coded, plain = Path(folder) / f"{recipe}.gguf", Path(folder) / f"{recipe}-plain.gguf"
            row = {"convert": convert(model, coded, recipe)}
            subprocess.run([sys.executable, "-m", "entrollm_gguf.cli", "decode", coded, plain], check=True, capture_output=True)
            row["load"] = load(coded)
            row["load_plain"] = load(plain)
            row["plain_file_bytes"] = plain.stat().st_size
            results["recipes"][recipe] = row
            print(recipe, json.dumps(row), flush=True)
            coded.unlink()
            plain.unlink()
    results["children_peak_mb"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3
    out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
