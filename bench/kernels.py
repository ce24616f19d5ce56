# SPDX-License-Identifier: MIT
"""Speed of the CPU kernels. `python bench/kernels.py OUT.json [REPEATS]`.

Decoding: the portable decoder, one thread, codes of a matrix of 2048 x 1024 from its payload, at several entropies, best of the repeats; and at
every kernel level the product of that matrix with one column, which is mostly decoding. Products of large matrices:
test-backend-ops in mode perf (on half as many threads as there are processors), entropy-coded types at every kernel level beside the stock
types they decode to; types take turns and each figure is the best of the repeats, since neighbours on a shared machine only ever make it slower.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gguf
import numpy as np

from entrollm_gguf import codec, runtime
from entrollm_gguf.codec import EntropyType
from entrollm_gguf.eval.demo import environment

_LINE = re.compile(r"MUL_MAT\(type_a=(\w+),.*?m=(\d+),n=(\d+),k=(\d+).*?([\d.]+) us/run")


def decoding(repeats: int) -> list[dict]:
    """G symbols per second of ggml_entropy_decode_groups, and of products with one column at every level."""
    generator = np.random.default_rng(0)
    rows, encodings = [], []
    for sigma in (1.95, 3.9, 9.6, 28.0):
        codes = np.clip(np.rint(generator.normal(0, sigma, (2048, 1024))), -128, 127).astype(np.int8)
        encoded = codec.encode(EntropyType.EQ8, codes, np.ones(1, np.float16))
        times = []
        for _ in range(4 * repeats):
            started = time.perf_counter()
            codec.decode(EntropyType.EQ8, encoded.payload, codes.shape, threads=1)
            times.append(time.perf_counter() - started)
        encodings.append(encoded)
        rows.append({"entropy": encoded.entropy_bits / codes.size, "gsymbols_per_second": codes.size / min(times) / 1e9})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cases.gguf"
        writer = gguf.GGUFWriter(path, "test")
        for i, encoded in enumerate(encodings):
            writer.add_tensor(f"{i}.w", encoded.payload, raw_shape=codes.shape, raw_dtype=gguf.GGMLQuantizationType.EQ8)
            writer.add_tensor(f"{i}.x", generator.normal(0, 1, codes.shape[1]).astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        for level in levels():
            command = [runtime.tool("test-entropy-ops"), "--speed", path]
            variables = {**os.environ, "GGML_ENTROPY_KERNEL": level}
            runs = [subprocess.run(command, capture_output=True, text=True, check=True, env=variables).stdout for _ in range(repeats)]
            for row, *us in zip(rows, *(output.split() for output in runs)):
                row[f"product_gweights_per_second_{level}"] = codes.size / min(map(int, us)) / 1e3
    for row in rows:
        products = ", ".join(f"{key.rpartition('_')[2]} {value:.2f}" for key, value in row.items() if key.startswith("product"))
        print(f"{row['entropy']:.2f} bits: decoding {row['gsymbols_per_second']:.2f} Gsym/s; with one column, Gweights/s: {products}")
    return rows


def levels() -> list[str]:
    """Kernel levels that run here, but for the reference."""
    names = subprocess.run([runtime.tool("test-entropy-ops"), "--levels"], capture_output=True, text=True, check=True).stdout.split()
    return [name for name in names if name != "ref"]


def products(repeats: int) -> list[dict]:
    """Microseconds of matrix products."""
    best: dict[tuple, float] = {}
    shapes = r"m=4096,n=(1|8|512),k=14336"
    runs = [(level, rf"type_a=eq[48],{shapes}") for level in levels()] + [("stock", rf"type_a=q[48]_0,type_b=f32,{shapes}")]
    for _ in range(repeats):
        for level, pattern in runs:
            command = [runtime.tool("test-backend-ops"), "perf", "-b", "CPU", "-o", "MUL_MAT", "-p", pattern]
            variables = {**os.environ, "GGML_ENTROPY_KERNEL": "" if level == "stock" else level}
            output = subprocess.run(command, capture_output=True, text=True, check=True, env=variables).stdout
            for name, *shape, us in _LINE.findall(output):
                key = (level, name, *map(int, shape))
                best[key] = min(best.get(key, np.inf), float(us))
    rows = []
    for (level, name, m, n, k), us in sorted(best.items(), key=lambda item: (item[0][3], item[0][1], item[0][0])):
        row = {"type": name, "level": level, "m": m, "n": n, "k": k, "us": us}
        if level != "stock":
            row["times_stock"] = us / best["stock", {"eq8": "q8_0", "eq4": "q4_0"}[name], m, n, k]
        rows.append(row)
        print(
            f"{name:5} {level:8} {m} x {k}, {n:3} columns: {us:10.0f} us"
            + (f", {row['times_stock']:.2f} x the stock type" if level != "stock" else "")
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
