# SPDX-License-Identifier: MIT
"""Instructions of matrix products on aarch64, by kernel level. `python bench/neon_instructions.py
OUT.json`, some minutes.

The programs of tests/neon are cross-compiled and run under qemu-user, whose plugin
(count-instructions.c) counts what they execute. Counts say nothing about latencies and are not a
speed. An op's count is the difference between runs that compute it four times and twice, so it
includes the quantizing of columns and everything else that an op does. For comparison there is Q8_0
with ggml's own kernels (its weights not repacked).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np
from provenance import provenance

from entrollm_gguf import codec
from entrollm_gguf.codec import EntropyType, Payload

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "neon"))

from run import LEVELS, OPTIONS, TRIPLE, WORK, build  # noqa: E402

_SHAPE = (512, 1024)
_COLUMNS = (1, 8, 128)
# distribution and standard deviation of codes: entropies of 4.5 and 7.25 bits, and one where more
# than half of the weights have a tail
_CODES = (("gaussian", 5.5), ("gaussian", 37.0), ("laplace", 9.6))


def _write(path: Path, weights: np.ndarray, ggml_type: gguf.GGMLQuantizationType, n_columns: int) -> None:
    writer = gguf.GGUFWriter(path, "test")
    writer.add_tensor("0.w", weights, raw_shape=_SHAPE if ggml_type.name == "EQ8" else None, raw_dtype=ggml_type)
    writer.add_tensor("0.x", np.random.default_rng(n_columns).standard_normal((n_columns, _SHAPE[1]), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _count(plugin: Path, program: Path, case: Path, level: str) -> int:
    """Instructions of the op that the case file holds."""
    counts = []
    for threads in (["1"], ["1", "1"]):  # every one computes twice
        command = ["qemu-aarch64", "-plugin", str(plugin), str(program), str(case), str(case.with_suffix(".f32")), *threads]
        said = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "GGML_ENTROPY_KERNEL": level}).stderr
        counts.append(int(re.search(r"instructions: (\d+)", said)[1]))
    return (counts[1] - counts[0]) // 2


def measure(folder: Path) -> list[dict]:
    """A row for each distribution of codes, number of columns and level."""
    plugin = folder / "count-instructions.so"
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", str(ROOT / "bench" / "count-instructions.c"), "-o", str(plugin)], check=True)
    program, case = build() / "test-entropy-ops", folder / "case.gguf"
    generator = np.random.default_rng(0)
    types = gguf.GGMLQuantizationType
    rows = []
    for distribution, sigma in _CODES:
        values = generator.normal(0, sigma, _SHAPE) if distribution == "gaussian" else generator.laplace(0, sigma / np.sqrt(2), _SHAPE)
        codes = np.clip(np.rint(values), -127, 127).astype(np.int8)
        encoded = codec.encode(EntropyType.EQ8, codes, np.ones(1, np.float16), name="0.w")
        payload = Payload(EntropyType.EQ8, encoded.payload, _SHAPE)
        for n_columns in _COLUMNS:
            counts = {}
            _write(case, encoded.payload, types.EQ8, n_columns)
            for level in LEVELS[:-1]:
                counts[level] = _count(plugin, program, case, level)
            _write(case, payload.plain()[1], types.Q8_0, n_columns)
            counts["q8_0"] = _count(plugin, program, case, "")
            n_products = codes.size * n_columns
            row = {
                "codes": distribution,
                "sigma": sigma,
                "entropy": encoded.entropy_bits / codes.size,
                "raw_bits": payload.header.code.raw_bits,
                "n_columns": n_columns,
                "instructions_per_product": {level: count / n_products for level, count in counts.items()},
                "generic_over_neon": counts["generic"] / counts["neon"],
            }
            rows.append(row)
            per = ", ".join(f"{level} {count:.3f}" for level, count in row["instructions_per_product"].items())
            print(
                f"{distribution} {row['entropy']:.2f} bits, {n_columns:3} columns, instructions a product: {per}; generic / neon {row['generic_over_neon']:.2f}",
                flush=True,
            )
    return rows


def main(out: Path) -> None:
    """Count and report."""
    begun = provenance("python bench/neon_instructions.py OUT.json")
    WORK.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder))
    compiler, emulator = (
        subprocess.run([program, "--version"], capture_output=True, text=True).stdout.splitlines()[0]
        for program in (f"{TRIPLE}-g++", "qemu-aarch64")
    )
    report = {
        **begun,
        "compiler": compiler,
        "emulator": emulator,
        "target": OPTIONS["GGML_CPU_ARM_ARCH"],
        "shape": _SHAPE,
        "rows": rows,
    }
    out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
