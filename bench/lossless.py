# SPDX-License-Identifier: MIT
"""Bits per weight of lossless bf16: EBF16 beside zstd, and the time that decoding takes.
`python bench/lossless.py OUT.json`, needs the zstd program.

Matrices of Gaussian rows whose sizes differ (log-normal, sigma 0.3), as in trained layers: no model
in bf16 is at hand where this was first run. zstd gets the weights as they stand in a BF16 file, and
split into the bytes that EBF16 splits them into, which is more than a file compressor would do.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from provenance import provenance

from entrollm_gguf import codec
from entrollm_gguf.codec import EntropyType, Payload
from entrollm_gguf.quant import quantize_lossless

SHAPES = ((1024, 4096), (4096, 14336))
LEVELS = (3, 19)


def zstd(data: bytes, level: int) -> int:
    """Bytes after compression."""
    return len(subprocess.run(["zstd", f"-{level}", "-T0", "-c", "-q"], input=data, capture_output=True, check=True).stdout)


def measure(shape: tuple[int, int]) -> dict:
    """A row of the report."""
    rng = np.random.default_rng(0)
    weights = (rng.standard_normal(shape, np.float32) * 0.02 * rng.lognormal(0, 0.3, (shape[0], 1))).astype(np.float32)
    weights = ((weights.view(np.uint32) + 0x8000) & 0xFFFF0000).view(np.float32)
    bits = (weights.view(np.uint32) >> 16).astype("<u2")
    quantized = quantize_lossless(weights, EntropyType.EBF16)
    encoded = codec.encode(EntropyType.EBF16, quantized.codes, quantized.scales, rests=quantized.rests)
    payload = Payload(EntropyType.EBF16, encoded.payload, shape)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        _, rows = payload.plain()
        seconds.append(time.perf_counter() - started)
    assert np.array_equal(rows.view("<u2"), bits)

    def per_weight(n_bytes: int) -> float:
        return n_bytes * 8 / weights.size

    split = quantized.rests.tobytes() + quantized.codes.tobytes()
    levels = LEVELS if weights.size < 1e7 else LEVELS[:1]
    return {
        "shape": shape,
        "exponent_entropy": encoded.entropy_bits / weights.size,
        "ebf16": per_weight(encoded.payload.nbytes),
        "zstd": {str(level): per_weight(zstd(bits.tobytes(), level)) for level in levels},
        "zstd_split": {str(level): per_weight(zstd(split, level)) for level in levels},
        "portable_decoding_gigabytes_per_second": 2 * weights.size / min(seconds) / 1e9,
    }


def main(out: Path) -> None:
    """Measure and write the report."""
    report = {**provenance("python bench/lossless.py OUT.json"), "rows": [measure(shape) for shape in SHAPES]}
    for row in report["rows"]:
        print(json.dumps(row))
    out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
