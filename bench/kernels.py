# SPDX-License-Identifier: MIT
"""Speed of the CPU kernels. `python bench/kernels.py OUT.json [REPEATS]`.

Decoding: one thread, codes of a matrix of 2048 x 1024 from its payload, at several entropies, best of the repeats. Products: test-backend-ops in mode perf, all
threads, entropy-coded types beside the stock types they decode to; types take turns and each figure is the best of the repeats, since
neighbours on a shared machine only ever make it slower.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from entrollm_gguf import codec, runtime
from entrollm_gguf.codec import EntropyType
from entrollm_gguf.eval.demo import environment

_LINE = re.compile(r"MUL_MAT\(type_a=(\w+),.*?m=(\d+),n=(\d+),k=(\d+).*?([\d.]+) us/run")


def decoding(repeats: int) -> list[dict]:
    """G symbols per second of ggml_entropy_decode_groups."""
    generator = np.random.default_rng(0)
    rows = []
    for sigma in (1.95, 3.9, 9.6, 28.0):
        codes = np.clip(np.rint(generator.normal(0, sigma, (2048, 1024))), -128, 127).astype(np.int8)
        encoded = codec.encode(EntropyType.EQ8, codes, np.ones(1, np.float16))
        times = []
        for _ in range(4 * repeats):
            started = time.perf_counter()
            codec.decode(EntropyType.EQ8, encoded.payload, codes.shape, threads=1)
            times.append(time.perf_counter() - started)
        row = {"entropy": encoded.entropy_bits / codes.size, "gsymbols_per_second": codes.size / min(times) / 1e9}
        rows.append(row)
        print(f"decode at {row['entropy']:.2f} bits: {row['gsymbols_per_second']:.2f} Gsym/s")
    return rows


def products(repeats: int) -> list[dict]:
    """Microseconds of matrix products."""
    best: dict[tuple, float] = {}
    shapes = r"m=4096,n=(1|8|512),k=14336"
    for _ in range(repeats):
        for pattern in (rf"type_a=eq[48],{shapes}", rf"type_a=q[48]_0,type_b=f32,{shapes}"):
            command = [runtime.tool("test-backend-ops"), "perf", "-b", "CPU", "-o", "MUL_MAT", "-p", pattern]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            for name, *shape, us in _LINE.findall(output):
                key = (name, *map(int, shape))
                best[key] = min(best.get(key, np.inf), float(us))
    rows = []
    for (name, m, n, k), us in sorted(best.items(), key=lambda item: (item[0][2], item[0][0])):
        stock = best.get(({"eq8": "q8_0", "eq4": "q4_0"}.get(name, name), m, n, k))
        rows.append({"type": name, "m": m, "n": n, "k": k, "us": us, "times_stock": us / stock if stock else None})
        print(
            f"{name:5} {m} x {k}, {n:3} columns: {us:10.0f} us"
            + (f", {us / stock:.2f} x the stock type" if stock and name.startswith("eq") else "")
        )
    return rows


def main(out: Path, repeats: int) -> None:
    """Measure both."""
    report = {
        "command": f"python bench/kernels.py OUT.json {repeats}",
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "environment": environment(),
        "decoding": decoding(repeats),
        "products": products(repeats),
    }
    out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) == 3 else 3)
