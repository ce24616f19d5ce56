# SPDX-License-Identifier: MIT
"""bf16_huffman_infer and dfloat11 on the shapes of the kernel table, one column, beside plain bf16.
Prints one line of JSON.

Both compress bf16 losslessly to some 11 bits, so microseconds are not comparable weight for weight;
comparable are their gain over bf16 and ours over Q8_0. Needs torch and the two packages (dfloat11
also cupy). A peer that fails is reported as failed.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable

import torch

SHAPES = ((4096, 14336), (14336, 4096), (4096, 4096))
FOOTPRINT = 512 << 20  # bytes of different matrices, so that none stays in the L2 cache


def microseconds(layers: list[torch.nn.Module], n_cols: int) -> float:
    """Best of three rounds through all layers, per layer."""
    x = torch.randn(1, n_cols, dtype=torch.bfloat16, device="cuda")
    best = float("inf")
    with torch.inference_mode():
        for _ in range(4):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for layer in layers:
                layer(x)
            end.record()
            torch.cuda.synchronize()
            best = min(best, begin.elapsed_time(end) * 1e3 / len(layers))
    return best


def linear(n_rows: int, n_cols: int) -> torch.nn.Linear:
    """Weights like those of a trained model: normal, small."""
    layer = torch.nn.Linear(n_cols, n_rows, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.weight.normal_(0, 0.02)
    return layer


def bf16_huffman_infer(layer: torch.nn.Linear) -> torch.nn.Module:
    """Its compressed linear layer."""
    from bf16_huffman_infer.functional import convert

    return convert(layer.cuda(), "layer", algo="huffman").cuda()


def dfloat11(layer: torch.nn.Linear) -> torch.nn.Module:
    """A linear layer that decodes into a buffer before every call, as its models do."""
    from dfloat11 import dfloat11 as package

    model = torch.nn.Sequential(layer)
    with tempfile.TemporaryDirectory() as folder:
        package.compress_model(model, {"0": []}, folder, check_correctness=False)
    positions = layer.output_positions.view(torch.uint32).numpy().astype("int64")
    threads = package.threads_per_block
    layer.shared_mem_size = int(threads[0] * 4 + 4 + (positions[1:] - positions[:-1]).max() * 2)
    layer.cuda()
    layer.register_forward_pre_hook(package.get_hook(threads, package.bytes_per_thread))
    return layer


def measure(make: Callable[[torch.nn.Linear], torch.nn.Module]) -> list[dict]:
    """All shapes."""
    rows = []
    for n_rows, n_cols in SHAPES:
        n = FOOTPRINT // (2 * n_rows * n_cols) + 1
        plain = microseconds([linear(n_rows, n_cols).cuda() for _ in range(n)], n_cols)
        torch.cuda.empty_cache()
        coded = microseconds([make(linear(n_rows, n_cols)) for _ in range(n)], n_cols)
        torch.cuda.empty_cache()
        rows.append({"rows": n_rows, "cols": n_cols, "us": coded, "bf16_us": plain, "times_bf16": coded / plain})
    return rows


def main() -> None:
    """Both peers."""
    result: dict[str, object] = {"device": torch.cuda.get_device_name()}
    for name, make in (("bf16_huffman_infer", bf16_huffman_infer), ("dfloat11", dfloat11)):
        try:
            result[name] = measure(make)
        except Exception as error:  # a package that changed must not hide the other one
            result[name] = f"failed: {type(error).__name__}: {error}"
    print(json.dumps(result))


if __name__ == "__main__":
    main()
