# SPDX-License-Identifier: MIT
"""`entrollm convert`: arguments, progress bar, summary table."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from entrollm_gguf.console import output_console
from entrollm_gguf.convert.recipes import DEFAULT_FOR_INTEGERS, DEFAULT_RECIPE, RECIPES
from entrollm_gguf.errors import ConversionWarning

if TYPE_CHECKING:
    from entrollm_gguf.convert.encode import TensorRecord
    from entrollm_gguf.convert.pipeline import ConversionReport, Plan

_RECIPE_HELP = "".join(f"\b\n  {r.name:10} {r.summary}\n" for r in RECIPES.values())


class SizeType(click.ParamType):
    """Bytes: 80000000, 80MB (1000s), 76MiB (1024s)."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes of a size as people write it."""
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?)b?|b?)\s*", str(value), re.IGNORECASE)
        if match is None:
            self.fail(f"{value!r} is no size; write it as 80MB or 1.5GiB", param, ctx)
        base = 1024 if match[3] else 1000
        return int(float(match[1]) * base ** ("kmgt".index(match[2].lower()) + 1 if match[2] else 0))


@click.command(
    epilog=f"\b\nRecipes:\n{_RECIPE_HELP}\n\b\nExamples:\n  entrollm convert ./SmolLM2-135M-Instruct smollm2.gguf\n"
    "  entrollm convert ./SmolLM2-135M-Instruct smollm2.gguf --recipe EQ8-paper\n"
    "  entrollm convert SmolLM2-135M-Instruct-F16.gguf smollm2.gguf\n"
    "  entrollm convert ./SmolLM2-135M-Instruct smollm2.gguf --bits 4.25 --calibration some-text.txt\n"
    "  entrollm convert ./SmolLM2-135M-Instruct --size 80MB --dry-run\n"
)
@click.argument("model", type=click.Path(path_type=Path), required=False)
@click.argument("out_file", type=click.Path(path_type=Path), required=False)
@click.option(
    "--recipe",
    metavar="NAME",
    help=f"How weights are quantized; see below. By default {DEFAULT_RECIPE}, or {DEFAULT_FOR_INTEGERS} where the weights are integers with a scale for each row.",
)
@click.option("--bits", type=click.FloatRange(1, 8), help="Bits per weight of all tensors together; the step is chosen for it, from below.")
@click.option("--size", type=SizeType(), help="The same by the size of the whole file: bytes, or with a unit as in 80MB, 1.5GiB.")
@click.option(
    "--dry-run", is_flag=True, help="With --bits, --size or a recipe with bits: print what each tensor would take, and write nothing."
)
@click.option(
    "--calibration",
    metavar="TEXT|self",
    help="A text file for the model to read, or `self` for text that the model writes: tells which weights matter. Takes minutes.",
)
@click.option(
    "--imatrix",
    type=click.Path(path_type=Path),
    help="An importance matrix of llama-imatrix, instead of --calibration; quicker, helps less.",
)
@click.option("--sequences", type=click.IntRange(min=1), default=40, show_default=True, help="Sequences of 512 tokens for --calibration.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Of everything random in --calibration.")
@click.option(
    "--fold/--no-fold",
    default=True,
    show_default=True,
    help="Equalise columns where statistics are known. LoRA adapters made for the model need --no-fold.",
)
@click.option("--threads", type=click.IntRange(min=1), help="Threads; all cores by default.")
@click.option(
    "--tile-cols",
    type=click.IntRange(32, 1024),
    help="Columns of a tile of the layout that GPUs read, a multiple of 32; by default by shape. Does not change the size.",
)
@click.option("--force", is_flag=True, help="Replace OUT_FILE if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@click.option("--verbose", is_flag=True, help="Show what llama.cpp's converter logs.")
@click.option("--list-architectures", is_flag=True, help="List what llama.cpp's converter knows, and stop.")
def convert(
    model: Path | None,
    out_file: Path | None,
    recipe: str | None,
    bits: float | None,
    size: int | None,
    dry_run: bool,
    calibration: str | None,
    imatrix: Path | None,
    sequences: int,
    seed: int,
    fold: bool,
    threads: int | None,
    tile_cols: int | None,
    force: bool,
    as_json: bool,
    verbose: bool,
    list_architectures: bool,
) -> None:
    """Convert a Hugging Face model or a GGUF to an entropy-coded GGUF.

    MODEL is a model folder as downloaded from the Hugging Face hub (config.json, tokenizer,
    safetensors), or a GGUF file: best in F16, BF16 or F32, since weights that were quantized before
    keep their loss. OUT_FILE appears only when it is complete. The patched llama.cpp runs it
    (entrollm runtime build); entrollm decode turns it into a file for the stock one.
    """
    logging.basicConfig(level=logging.INFO if verbose else logging.ERROR, format="%(message)s")
    if not verbose:  # llama.cpp's classes set levels of their own
        logging.disable(logging.WARNING)
    from entrollm_gguf.convert import pipeline

    if list_architectures:
        from entrollm_gguf.convert.llama_cpp import list_architectures as architectures

        click.echo("\n".join(architectures()))
        return
    if model is None or (out_file is None and not dry_run):
        raise click.UsageError("MODEL and OUT_FILE are needed; see --help")
    if bits is not None and size is not None:
        raise click.UsageError("give --bits or --size, not both")
    if recipe is not None and (bits is not None or size is not None):
        raise click.UsageError("give --recipe, --bits or --size: each says how large the file is to be")
    if calibration is not None and imatrix is not None:
        raise click.UsageError("give --calibration or --imatrix, not both")
    known = None
    if calibration is not None or imatrix is not None:
        from entrollm_gguf.convert.basis import Calibration

        own = calibration == "self"
        text = None if own or calibration is None else Path(calibration)
        known = Calibration(text=text, own_text=own, imatrix=imatrix, n_sequences=sequences, seed=seed, fold=fold)

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with warnings.catch_warnings(), Progress(*columns, console=console, transient=True, disable=as_json) as bar:
        warnings.simplefilter("once", ConversionWarning)
        warnings.showwarning = _show_warning
        task = bar.add_task("reading", total=None)

        def on_progress(done: int, total: int, name: str, unit: str) -> None:
            # tied or fused tensors can make the sum differ from the checkpoint's
            scale, prefix = (1_000_000, "M ") if unit == "weights" else (1, "")
            bar.update(task, completed=done // scale, total=max(total, done) // scale, description=f"{name} ({prefix}{unit})")

        if dry_run or out_file is None:
            plan = pipeline.plan_model(
                model, bits=bits, size=size, recipe=recipe, threads=threads, tile_cols=tile_cols, calibration=known, progress=on_progress
            )
        else:
            report = pipeline.convert_model(
                model,
                out_file,
                recipe=recipe,
                bits=bits,
                size=size,
                threads=threads,
                tile_cols=tile_cols,
                calibration=known,
                force=force,
                progress=on_progress,
            )
    if dry_run or out_file is None:
        if as_json:
            click.echo(json.dumps(dataclasses.asdict(plan), indent=2))
        else:
            print_plan(plan, output_console())
        return
    if as_json:
        click.echo(json.dumps(report_as_dict(report), indent=2))
    else:
        print_summary(report, output_console())


def _show_warning(message: Warning | str, category: type[Warning], *_: object) -> None:
    """Ours in one line; what the libraries beneath warn of is for their users."""
    if issubclass(category, ConversionWarning):
        click.echo(f"entrollm: warning: {message}", err=True)


def print_plan(plan: Plan, console: Console) -> None:
    """What every tensor would take."""
    table = Table("tensor", "type", "shape", "bytes", "bits per weight", box=None)
    for one in plan.tensors:
        bits = one.n_bytes * 8 / max(1, math.prod(one.shape))
        table.add_row(one.name, one.type_name, " x ".join(map(str, one.shape)), f"{one.n_bytes:,}", f"{bits:.3f}")
    console.print(table)
    console.print(
        f"about {plan.file_bytes / 1e6:.1f} MB, {plan.bits_per_weight:.3f} bits per weight, step {plan.step:.4f} of a row's root mean square"
    )
    if line := _not_coded(plan.tensors):
        console.print(f"not coded: {line}")


def report_as_dict(report: ConversionReport) -> dict:
    """The report as plain data for JSON."""
    coded = report.coded()
    return {
        "path": str(report.path),
        "recipe": report.recipe,
        "file_bytes": report.file_bytes,
        "n_weights": report.n_weights,
        "bits_per_weight": report.bits_per_weight,
        "bits_per_weight_before": report.bits_before,
        "coded_bits_per_weight": _per_weight(sum(t.n_bytes * 8 for t in coded), coded),
        "recipe_bits_per_weight": report.rate,
        "entropy_bits_per_weight": _per_weight(sum(t.entropy_bits or 0 for t in coded), coded),
        "seconds": report.seconds,
        "tensors": [dataclasses.asdict(t) for t in report.tensors],
    }


def _per_weight(bits: float, tensors: list) -> float | None:
    n = sum(t.n_elements for t in tensors)
    return bits / n if n else None


def _not_coded(tensors: Sequence[TensorRecord]) -> str:
    """What becomes of the weights that llama.cpp would quantize and an entropy-coded type cannot
    hold; empty if there are none."""
    kept = [t for t in tensors if t.kept is not None]
    if not kept:
        return ""
    n, n_bytes, n_all = sum(t.n_elements for t in kept), sum(t.n_bytes for t in kept), sum(t.n_elements for t in tensors)
    return f"{n / 1e6:.3g} M weights, {n / n_all:.1%} of all, take {n_bytes / 1e6:.3g} MB, {n_bytes * 8 / n:.1f} bits each"


def _again(report: ConversionReport) -> str:
    """What a second quantization did to size and weights; empty if it is the first."""
    if report.bits_before is None:
        return ""
    errors = [t.added_error for t in report.tensors if t.added_error is not None]
    added = f"; adds an error of {median(errors):.1e} of a matrix's energy, at most {max(errors):.1e}" if errors else ""
    return f"{report.bits_before:.2f} bits per weight before, {report.bits_per_weight:.2f} now{added}"


def _off_target(rate: float | None, coded: float) -> str:
    """Why a recipe's bits did not come out; empty if they did."""
    if rate is None or 0.985 * rate <= coded <= 1.005 * rate:
        return ""
    why = "headers and scales of small matrices take the rest" if coded > rate else "no step is finer"
    return f"; as near to {rate:g} as it comes: {why}"


def print_summary(report: ConversionReport, console: Console) -> None:
    """The table that ends a conversion."""
    data = report_as_dict(report)
    table = Table(show_header=False, box=None)
    table.add_row("file", str(report.path))
    table.add_row("recipe", report.recipe)
    table.add_row("size", f"{report.file_bytes / 1e6:.1f} MB, {report.bits_per_weight:.3f} bits per weight")
    if data["coded_bits_per_weight"]:
        coded, entropy = data["coded_bits_per_weight"], data["entropy_bits_per_weight"]
        over = f" (+{(coded / entropy - 1) * 100:.2f} %)" if entropy else ""
        table.add_row("coded matrices", f"{coded:.3f} bits per weight, entropy {entropy:.3f}{over}{_off_target(report.rate, coded)}")
    else:
        table.add_row("coded matrices", "none: every matrix stays in a stock type")
    if line := _not_coded(report.tensors):
        table.add_row("not coded", line)
    if errors := [t.scale_error for t in report.tensors if t.scale_error is not None]:
        how = f"their scales rounded to f16, by {max(errors):.1e} at most" if max(errors) else "with their scales"
        table.add_row("kept codes", f"of {len(errors)} matrices by bit, {how}")
    if line := _again(report):
        table.add_row("quantized again", line)
    types = Counter(t.type_name for t in report.tensors)
    table.add_row("tensors", ", ".join(f"{n} {name}" for name, n in types.most_common()))
    for record in report.tensors:
        if record.kept is not None:
            table.add_row("", f"{record.name} stays {record.type_name}: {record.kept}")
        if record.coarse_rows:
            n_rows = math.prod(record.shape[:-1])
            table.add_row(
                "",
                f"{record.name}: {record.coarse_rows} of {n_rows} rows have weights too small for f16 scales, and lose most of their digits",
            )
    table.add_row("time", f"{report.seconds:.1f} s")
    console.print(table)
