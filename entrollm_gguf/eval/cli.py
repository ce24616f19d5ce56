# SPDX-License-Identifier: MIT
"""`entrollm chat`, `entrollm perplexity`, `entrollm demo` and `entrollm report`."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich import box
from rich.console import Console
from rich.table import Table

from entrollm_gguf.console import output_console, printable
from entrollm_gguf.errors import ToolError

if TYPE_CHECKING:
    from entrollm_gguf.eval.compare import Row

_WIDTH = 100  # columns of a comparison and what stands around it, on terminals that have them


@click.command(
    epilog="\b\nExamples:\n  entrollm chat model.gguf\n  entrollm chat model.gguf --prompt 'Write a haiku about entropy.'\n"
    "\nAn empty line or Ctrl-D ends the chat; Ctrl-C stops an answer.\n"
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--prompt", help="Ask this one question and stop.")
@click.option("--system", help="System message; by default what the model's template brings.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Longest answer in tokens; by default until the context is full.")
@click.option("--ctx", "context", default=4096, show_default=True, type=click.IntRange(min=128), help="Context in tokens.")
@click.option("--temperature", default=0.2, show_default=True, type=click.FloatRange(min=0), help="0 takes the likeliest token always.")
@click.option("--seed", default=0, show_default=True, help="Of the sampler.")
@click.option("--gpu-layers", default=0, show_default=True, help="Layers to offload, where the runtime was built for a GPU; -1 for all.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads; llama.cpp's choice by default.")
@click.option("--verbose", is_flag=True, help="Show llama.cpp's log.")
def chat(
    file: Path, prompt: str | None, system: str | None, max_tokens: int | None, context: int, temperature: float, seed: int,
    gpu_layers: int, threads: int | None, verbose: bool,
) -> None:  # fmt: skip
    """Chat with a GGUF, entropy-coded or not.

    Answers stream as they are made. The chat template is the file's own.
    """
    from entrollm_gguf.eval.chat import Chat

    session = Chat(
        file, system=system, context=context, threads=threads, seed=seed, temperature=temperature, gpu_layers=gpu_layers, verbose=verbose
    )

    def answer(question: str) -> None:
        for piece in session.ask(question, max_tokens):
            click.echo(printable(piece, keep="\n\t"), nl=False)
        click.echo()

    if prompt is not None:
        answer(prompt)
        return
    while True:
        try:
            question = input("> ")
        except EOFError:
            click.echo()
            return
        if not question.strip():
            return
        try:
            answer(question)
        except KeyboardInterrupt:
            click.echo(" ...")
        except ToolError as error:  # the next question may do better
            click.echo(f"({printable(str(error))})", err=True)


@click.command(
    epilog="\b\nExamples:\n  entrollm perplexity model.gguf --text wiki.txt\n"
    "  entrollm perplexity model.gguf --text wiki.txt --reference model-f16.gguf --json\n"
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--text", required=True, type=click.Path(path_type=Path), help="UTF-8 text file.")
@click.option(
    "--reference", type=click.Path(path_type=Path), help="GGUF of the unquantized model: adds KL divergence and top-token agreement."
)
@click.option("--ctx", "context", default=512, show_default=True, type=click.IntRange(min=8), help="Tokens per chunk.")
@click.option("--chunks", type=click.IntRange(min=1), help="Number of chunks; the whole text by default.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads; llama.cpp's choice by default.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def perplexity(
    file: Path, text: Path, reference: Path | None, context: int, chunks: int | None, threads: int | None, as_json: bool
) -> None:
    """Measure the perplexity of a GGUF on a text, with llama-perplexity.

    With --reference also the mean, median and 99th percentile of the KL divergence from that model
    (nats per token), and how often both prefer the same token.
    """
    from entrollm_gguf.eval.perplexity import measure_perplexity

    result = measure_perplexity(file, text, reference=reference, context=context, chunks=chunks, threads=threads)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(result), indent=2))
        return
    click.echo(f"perplexity    {result.ppl:.4f} +/- {result.ppl_error:.4f}")
    if result.kld_mean is not None:
        click.echo(f"KLD mean      {result.kld_mean:.6f} +/- {result.kld_error:.6f}")
        click.echo(f"KLD median    {result.kld_median:.6f}")
        click.echo(f"KLD 99 %      {result.kld_99:.6f}")
        click.echo(f"same top      {result.same_top_percent:.2f} +/- {result.same_top_error:.2f} %")


@click.command(epilog="\b\nExample:\n  entrollm demo --out build/demo\n")
@click.option(
    "--out", default="build/demo", show_default=True, type=click.Path(path_type=Path), help="Folder for models, results.json, report.html."
)
@click.option("--full", is_flag=True, help="Eight recipes, a long calibration, more chunks: takes several times as long.")
@click.option("--text", type=click.Path(path_type=Path), help="Text for perplexity; Python's language reference by default.")
@click.option("--chunks", type=click.IntRange(min=2), help="Chunks of 512 tokens to score; 4 by default, 16 with --full.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads; all cores by default.")
def demo(out: Path, full: bool, text: Path | None, chunks: int | None, threads: int | None) -> None:
    """Convert a real model and compare it with stock types.

    Fetches SmolLM2-135M-Instruct (92 MB, once), converts it, measures size, KL divergence, speed
    and memory beside F16, Q8_0 and Q4_K_M, asks it a question, and writes all that to an HTML
    report.
    """
    logging.disable(logging.WARNING)
    from entrollm_gguf.eval.demo import demo_notes, demo_title, run_demo

    console = output_console()
    result = run_demo(out, full=full, text=text, chunks=chunks, threads=threads, say=_say(console))
    _print_comparison(console, result.rows, demo_title(result), demo_notes(result))
    console.print(f"\n{result.question}", style="bold")
    for name, answer in result.answers.items():
        console.print(f"{name:>6}: {printable(answer, keep=chr(10))}", highlight=False, width=_WIDTH)
    model = out / "EQ8.gguf"
    console.print("\nNext:", style="bold")
    for line, purpose in (
        (f"{out / 'report.html'}", "open it in a browser: the figures with pictures"),
        (f"{_typed('entrollm')} chat {model}", "go on asking"),
        (f"GGML_ENTROPY_MODE=fused {_typed('llama-server')} -m {model}", "serve it, compressed in memory"),
        (f"{_typed('entrollm')} convert HF_DIR my.gguf", "a model of your own"),
    ):
        console.print(f"  {line:<70}  # {purpose}", highlight=False, soft_wrap=True)


@click.command(
    epilog="\b\nExamples:\n  entrollm report model-q8_0.gguf model-eq8.gguf -o report.html\n"
    "  entrollm report *.gguf --reference model-f16.gguf --text wiki.txt --speed -o report.html\n"
)
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), metavar="REPORT.html", help="The report.")
@click.option("--text", type=click.Path(path_type=Path), help="UTF-8 text file: adds perplexity, and the plot of size and quality.")
@click.option("--reference", type=click.Path(path_type=Path), help="GGUF of the unquantized model, with --text: adds KL divergence.")
@click.option("--ctx", "context", default=512, show_default=True, type=click.IntRange(min=8), help="Tokens per chunk.")
@click.option("--chunks", type=click.IntRange(min=1), help="Number of chunks; the whole text by default.")
@click.option("--speed", is_flag=True, help="Add tokens per second, by llama-bench.")
@click.option("--force", is_flag=True, help="Replace REPORT.html if it exists.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads; all cores by default.")
def report(
    files: tuple[Path, ...], out: Path, text: Path | None, reference: Path | None, context: int, chunks: int | None, speed: bool,
    force: bool, threads: int | None,
) -> None:  # fmt: skip
    """Compare GGUF files, entropy-coded or not, in an HTML report.

    Size and memory always; quality with --text, speed with --speed. For each entropy-coded file a
    picture: bits and entropy of its layers. The report is one file that loads nothing from
    elsewhere. FILES may be first parts of split files.
    """
    from entrollm_gguf.eval.compare import compare, environment
    from entrollm_gguf.eval.report import check_report_path, write_report
    from entrollm_gguf.inspect.report import inspect_file

    if reference is not None and text is None:
        raise click.UsageError("--reference needs --text: KL divergence is measured on a text")
    check_report_path(out, force)
    paths = list(dict.fromkeys([*([reference] if reference else []), *files]))
    stems = [path.stem for path in paths]
    names = {path: path.stem if stems.count(path.stem) == 1 else str(path) for path in paths}
    console = output_console()
    say = _say(console)
    reports = {}
    for path in paths:
        say(f"reading {path}")
        reports[names[path]] = inspect_file(path, threads=threads)
    rows = compare(
        reports, reference=names[reference] if reference else None, text=text, context=context, chunks=chunks,
        speed_rounds=2 if speed else 0, threads=threads, say=say,
    )  # fmt: skip
    title = "GGUF files compared" + (f" on {'all' if chunks is None else f'{chunks} x {context} tokens'} of {text.name}" if text else "")
    write_report(out, rows, reports, title=title, environment=environment(), force=force)
    _print_comparison(console, rows, title, ())
    console.print(f"\n{out}: open it in a browser", highlight=False)


def _typed(program: str) -> str:
    """What to type for a program of ours; without an activated environment it lies beside
    Python."""
    return program if shutil.which(program) else os.path.relpath(Path(sys.executable).with_name(program))


def _say(console: Console) -> Callable[[str], None]:
    return lambda line: console.print(printable(line), highlight=False)


def _print_comparison(console: Console, rows: Sequence[Row], title: str, notes: Sequence[str]) -> None:
    from entrollm_gguf.eval.compare import MEMORY_NOTE, table

    headings, lines = table(rows)
    shown = Table(title=printable(title), box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for i, heading in enumerate(headings):
        shown.add_column(heading, justify="left" if i < 2 else "right", no_wrap=True)
    for line in lines:
        shown.add_row(*map(printable, line))
    console.print(shown)
    for note in (*notes, MEMORY_NOTE):
        console.print(note, style="dim", highlight=False, width=_WIDTH)
