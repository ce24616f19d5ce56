# SPDX-License-Identifier: MIT
"""Speed of the CPU kernels. `python bench/kernels.py OUT.json [REPEATS]`, a quarter of an hour on
two cores; with `one` behind REPEATS products of one column alone, a few minutes.

One column: decoding and multiplying by one column of activations, one thread, at every kernel
level, for matrices of EQ8 at several entropies beside Q8_0 in the same run; and the portable
decoder alone, codes of the same matrices from their payloads. Several columns, and experts (4 of 32
for each token): test-backend-ops in mode perf (on half as many threads as there are processors),
entropy-coded types at every kernel level beside the stock types they decode to. Levels and types
take turns and each figure is the best of the repeats, since neighbours on a shared machine only
ever make it slower.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
from provenance import provenance

from entrollm_gguf import codec, runtime
from entrollm_gguf.codec import EntropyType, Payload

_LINE = re.compile(r"(MUL_MAT(?:_ID)?)\(type_a=(\w+),.*?m=(\d+),n=(\d+),k=(\d+).*?([\d.]+) us/run")


_SHAPES = ((2048, 1024), (4096, 14336), (1536, 576))  # one that stays in the cache, a layer of a model of 8B, one of 135M
_SIGMAS = (1.95, 3.9, 5.5, 9.6, 28.0, 37.0)  # of Gaussian codes: from 3 to 7.2 bits


def one_column(repeats: int) -> list[dict]:
    """G weights per second of products with one column, and of decoding alone; a row for each shape
    and entropy, and for Q8_0."""
    return [row for shape in _SHAPES for row in _one_shape(shape, repeats)]


def _one_shape(shape: tuple[int, int], repeats: int) -> list[dict]:
    generator = np.random.default_rng(0)
    n_weights = shape[0] * shape[1]
    types = gguf.GGMLQuantizationType
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cases.gguf"
        writer = gguf.GGUFWriter(path, "test")

        def add(weights: np.ndarray, ggml_type: gguf.GGMLQuantizationType, **told: object) -> None:
            i, raw_shape = len(rows), shape if ggml_type is types.EQ8 else None
            writer.add_tensor(f"{i}.w", weights, raw_shape=raw_shape, raw_dtype=ggml_type)
            writer.add_tensor(f"{i}.x", generator.standard_normal(shape[1], np.float32))
            rows.append({"type": ggml_type.name, "shape": shape, "bits_per_weight": weights.nbytes * 8 / n_weights, **told})

        for sigma in _SIGMAS:
            codes = np.clip(np.rint(sigma * generator.standard_normal(shape, np.float32)), -127, 127).astype(np.int8)
            encoded = codec.encode(EntropyType.EQ8, codes, np.ones(1, np.float16), name=f"{len(rows)}.w")
            payload = Payload(EntropyType.EQ8, encoded.payload, shape)
            seconds = _best(lambda: payload.codes(threads=1), repeats)
            code = payload.header.code
            add(
                encoded.payload, types.EQ8, sigma=sigma, entropy=encoded.entropy_bits / n_weights,
                raw_bits=code.raw_bits, tail_planes=code.n_planes, decoding_gweights_per_second=n_weights / seconds / 1e9,
            )  # fmt: skip
        add(payload.plain()[1], types.Q8_0)  # made from the last one: the time does not depend on the codes
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        microseconds: dict[str, list[list[int]]] = {level: [] for level in levels()}
        for _ in range(repeats):
            for level, runs in microseconds.items():
                variables = {**os.environ, "GGML_ENTROPY_KERNEL": level}
                output = subprocess.run(
                    [runtime.tool("test-entropy-ops"), "--speed", path], capture_output=True, text=True, check=True, env=variables
                )
                runs.append(list(map(int, output.stdout.split())))
    for i, row in enumerate(rows):
        row["product_gweights_per_second"] = {
            level: n_weights / max(1, min(run[i] for run in runs)) / 1e3 for level, runs in microseconds.items()
        }
        products = ", ".join(f"{level} {speed:.2f}" for level, speed in row["product_gweights_per_second"].items())
        what = f"{row['entropy']:.2f} bits, {row['raw_bits']} raw, {row['tail_planes']} planes" if "entropy" in row else ""
        alone = f"; decoding alone {row['decoding_gweights_per_second']:.2f}" if "entropy" in row else ""
        print(f"{row['type']:5} {shape[0]:5} x {shape[1]:5} {what:27} Gweights/s with one column: {products}{alone}", flush=True)
    return rows


def _best(work: Callable[[], object], repeats: int) -> float:
    """Seconds of the quickest run."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def levels() -> list[str]:
    """Kernel levels that run here, but for the reference."""
    names = subprocess.run([runtime.tool("test-entropy-ops"), "--levels"], capture_output=True, text=True, check=True).stdout.split()
    return [name for name in names if name != "ref"]


_PRODUCTS = (("MUL_MAT", "m=4096,n=(1|2|4|8|512),k=14336"), ("MUL_MAT_ID", "m=1792,n=(1|4|8|512),k=2048"))
_ONE_COLUMN = (("MUL_MAT", "m=4096,n=1,k=14336"),)


def products(repeats: int, wanted: tuple[tuple[str, str], ...]) -> list[dict]:
    """Microseconds of matrix products."""
    best: dict[tuple, float] = {}
    types = [(level, "type_a=eq[48],") for level in levels()] + [("stock", "type_a=q[48]_0,type_b=f32,")]
    for _ in range(repeats):
        for op, shapes in wanted:
            for level, kinds in types:
                # stock cases name the experts before the shape, ours after it
                experts = "n_mats=32,n_used=4,b=0," if op == "MUL_MAT_ID" and level == "stock" else ""
                command = [runtime.tool("test-backend-ops"), "perf", "-b", "CPU", "-o", op, "-p", kinds + experts + shapes]
                variables = {**os.environ, "GGML_ENTROPY_KERNEL": "" if level == "stock" else level}
                output = subprocess.run(command, capture_output=True, text=True, check=True, env=variables).stdout
                for found, name, *shape, us in _LINE.findall(output):
                    key = (found, level, name, *map(int, shape))
                    best[key] = min(best.get(key, np.inf), float(us))
    rows = []
    for (op, level, name, m, n, k), us in sorted(best.items(), key=lambda item: (item[0][0], item[0][4], item[0][2], item[0][1])):
        row = {"op": op, "type": name, "level": level, "m": m, "n": n, "k": k, "us": us}
        if level != "stock":
            row["times_stock"] = us / best[op, "stock", {"eq8": "q8_0", "eq4": "q4_0"}[name], m, n, k]
        rows.append(row)
        print(
            f"{op:10} {name:5} {level:8} {m} x {k}, {n:3} columns: {us:10.0f} us"
            + (f", {row['times_stock']:.2f} x the stock type" if level != "stock" else "")
        )
    return rows


def main(out: Path, repeats: int, one: bool) -> None:
    """Measure both, or products of one column alone."""
    begun = provenance(f"python bench/kernels.py OUT.json {repeats}" + (" one" if one else ""))
    report = {**begun, "one_column": one_column(repeats), "products": products(repeats, _ONE_COLUMN if one else _PRODUCTS)}
    out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 4 or sys.argv[3:] not in ([], ["one"]):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 3, len(sys.argv) == 4)
