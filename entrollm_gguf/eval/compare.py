# SPDX-License-Identifier: MIT
"""GGUF files side by side: size, quality, speed and memory, as a table that the terminal and the
HTML report share."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from entrollm_gguf import __version__, runtime
from entrollm_gguf.eval.bench import Speed, measure_speed
from entrollm_gguf.eval.perplexity import DEFAULT_CONTEXT, PerplexityResult, ReferenceLogits, measure_perplexity
from entrollm_gguf.gguf_io.patched import import_gguf
from entrollm_gguf.inspect.report import FileReport, TensorReport
from entrollm_gguf.progress import Say

MEMORY_NOTE = (
    "memory: the weights alone, by the types they have while the model runs. Entropy-coded files run in one of two modes: load decodes them "
    "while the model loads, fused keeps them compressed."
)


@dataclass(frozen=True)
class Row:
    """A file of the comparison. None stands for what was not measured or does not apply to such a
    file."""

    name: str
    file: str
    file_bytes: int
    bits_per_weight: float  # whole file
    weight_bytes: int  # of all tensors in memory; of an entropy-coded file in load mode
    fused_weight_bytes: int | None  # the same in fused mode, of an entropy-coded file
    coded_bits_per_weight: float | None  # coded matrices, container included
    entropy: float | None  # of their codes
    perplexity: PerplexityResult | None
    speed: Speed | None  # of an entropy-coded file in load mode
    fused_speed: Speed | None  # of an entropy-coded file
    seconds: float | None = None  # conversion, where it was measured

    @property
    def is_coded(self) -> bool:
        """Whether the file holds entropy-coded tensors."""
        return self.fused_weight_bytes is not None


def compare(
    reports: Mapping[str, FileReport],
    *,
    reference: str | None = None,
    text: Path | None = None,
    context: int = DEFAULT_CONTEXT,
    chunks: int | None = None,
    speed_rounds: int = 0,
    threads: int | None = None,
    say: Say = print,
) -> tuple[Row, ...]:
    """Measure some files, each with the runtime's own tools.

    Args:
        reports: by the name that a file has in the table; what `inspect_file` says of it.
        reference: name of the unquantized model, which adds KL divergence.
        text: UTF-8 text for perplexity; None measures no quality.
        context: tokens per chunk.
        chunks: of the text; None for the whole of it.
        speed_rounds: rounds of llama-bench, in which all files take turns; the best counts. 0
            measures no speed.
    Returns:
        a row for each file, in the order of `reports`.
    Raises:
        ToolError: a tool of the runtime failed, or vocabularies differ.
        FormatError: a file is missing.
        RuntimeMissingError: the runtime is not installed.

    >>> from entrollm_gguf import compare, inspect_file
    >>> row, = compare({"ours": inspect_file("model.gguf")})
    >>> row.weight_bytes  # in load mode, as Q8_0
    338928
    >>> row.fused_weight_bytes < row.weight_bytes
    True
    """
    paths = {name: Path(report.path) for name, report in reports.items()}
    quality: dict[str, PerplexityResult] = {}
    if text is not None:
        amount = "all" if chunks is None else f"{chunks} x {context} tokens"
        say(f"measuring perplexity{' and KL divergence' if reference else ''} on {amount} of {text.name}")
        quality = _measure_quality(paths, reference, text, context, chunks, threads, say)
    speeds: dict[str, Speed] = {}
    fused: dict[str, Speed] = {}
    if speed_rounds:
        say(f"measuring speed, best of {speed_rounds}")
        speeds = _measure_speeds(paths, speed_rounds, threads, "load")
        fused = _measure_speeds({name: paths[name] for name in paths if _is_coded(reports[name])}, speed_rounds, threads, "fused")
    return tuple(
        Row(
            name=name,
            file=paths[name].name,
            file_bytes=report.n_bytes,
            bits_per_weight=report.bits_per_weight,
            weight_bytes=sum(_decoded_bytes(t) for t in report.tensors),
            fused_weight_bytes=sum(t.n_bytes for t in report.tensors) if _is_coded(report) else None,
            coded_bits_per_weight=report.coded_bits_per_weight,
            entropy=report.coded_entropy,
            perplexity=quality.get(name),
            speed=speeds.get(name),
            fused_speed=fused.get(name),
        )
        for name, report in reports.items()
    )


def _is_coded(report: FileReport) -> bool:
    return report.coded_n_weights > 0


def _decoded_bytes(tensor: TensorReport) -> int:
    """Bytes in load mode."""
    if tensor.decodes_to is None:
        return tensor.n_bytes
    gguf = import_gguf()
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[tensor.decodes_to]]
    return math.prod(tensor.shape) // block * size


def _measure_quality(
    paths: Mapping[str, Path], reference: str | None, text: Path, context: int, chunks: int | None, threads: int | None, say: Say
) -> dict[str, PerplexityResult]:
    results: dict[str, PerplexityResult] = {}
    with contextlib.ExitStack() as stack:
        logits = None
        if reference is not None:
            logits = stack.enter_context(ReferenceLogits(paths[reference], text, context=context, chunks=chunks, threads=threads))
        for name, path in paths.items():
            if logits is None:
                result = measure_perplexity(path, text, context=context, chunks=chunks, threads=threads)
            elif name == reference:
                assert logits.result is not None  # entered
                result = logits.result
            else:
                result = logits.compare(path)
            results[name] = result
            say(f"  {name}: perplexity {result.ppl:.4g}")
    return results


def _measure_speeds(paths: Mapping[str, Path], rounds: int, threads: int | None, mode: str) -> dict[str, Speed]:
    """Files take turns, so that a noisy minute of a shared machine does not hit one of them
    alone."""
    best: dict[str, Speed] = {}
    for _ in range(rounds):
        for name, path in paths.items():
            speed = measure_speed(path, prompt_tokens=128, generated_tokens=16, repetitions=2, threads=threads, mode=mode)
            best[name] = speed.best(best.get(name, speed))
    return best


# ---- the table

_COLUMNS = ("file", "mode", "MB", "KLD", "prompt\ntok/s", "gen\ntok/s", "memory\nMB", "bits/\nweight", "perplexity", "same\ntop %")


def table(rows: Iterable[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headings, and lines with one cell for each; the first two columns are words, the others
    numbers. An entropy-coded file has a line for each mode.

    Columns that would be empty are left out.
    """
    lines = [line for row in rows for line in _lines(row)]
    kept = [i for i in range(len(_COLUMNS)) if i < 2 or any(line[i] for line in lines)]
    return tuple(_COLUMNS[i] for i in kept), [tuple(line[i] for i in kept) for line in lines]


def _lines(row: Row) -> list[tuple[str, ...]]:
    quality = ("", "", "") if row.perplexity is None else _quality(row.perplexity)
    first = (
        row.name, "load" if row.is_coded else "", f"{row.file_bytes / 1e6:.1f}", quality[0], *_running(row.speed, row.weight_bytes),
        f"{row.bits_per_weight:.2f}", *quality[1:],
    )  # fmt: skip
    if row.fused_weight_bytes is None:
        return [first]
    return [first, ("", "fused", "", "", *_running(row.fused_speed, row.fused_weight_bytes), "", "", "")]


def _running(speed: Speed | None, weight_bytes: int) -> tuple[str, str, str]:
    tokens = ("", "") if speed is None else (f"{speed.prompt:.0f}", f"{speed.generation:.1f}")
    return (*tokens, f"{weight_bytes / 1e6:.1f}")


def _quality(found: PerplexityResult) -> tuple[str, str, str]:
    return (
        "" if found.kld_mean is None else f"{found.kld_mean:.4f}",
        f"{found.ppl:.3f}" if found.ppl < 1e5 else f"{found.ppl:.1e}",
        "" if found.same_top_percent is None else f"{found.same_top_percent:.1f}",
    )


# ---- where it was measured


def environment() -> dict[str, str]:
    """What a figure depends on: processor, system, versions, the runtime's hash, the time."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return {
        "cpu": cpu,
        "cores": str(os.cpu_count()),
        "system": platform.platform(),
        "python": platform.python_version(),
        "entrollm": __version__,
        "runtime": runtime.info().hash,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
