# SPDX-License-Identifier: MIT
"""`entrollm chat`, `entrollm perplexity` and `entrollm demo`."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table

from entrollm_gguf.console import output_console, printable
from entrollm_gguf.errors import ToolError

if TYPE_CHECKING:
    from entrollm_gguf.eval.demo import DemoResult


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

    With --reference also the mean, median and 99th percentile of the KL divergence from that model (nats per token), and how often both
    prefer the same token.
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
@click.option("--out", default="build/demo", show_default=True, type=click.Path(path_type=Path), help="Folder for models and results.json.")
@click.option("--text", type=click.Path(path_type=Path), help="Text for perplexity; Python's language reference by default.")
@click.option("--chunks", default=16, show_default=True, type=click.IntRange(min=2), help="Chunks of 512 tokens to score.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads; all cores by default.")
def demo(out: Path, text: Path | None, chunks: int, threads: int | None) -> None:
    """Convert a real model with every recipe and compare it with stock types.

    Fetches SmolLM2-135M-Instruct (92 MB, once), converts it, measures size, perplexity, KL divergence and speed beside F16, Q8_0 and Q4_K_M,
    and asks it a question.
    """
    logging.disable(logging.WARNING)
    from entrollm_gguf.eval.demo import run_demo

    console = output_console()
    result = run_demo(out, text=text, chunks=chunks, threads=threads, say=lambda line: console.print(line, highlight=False))
    console.print(demo_table(result))
    console.print(
        "Q4_K_M: rows of 576 are no multiple of 256, so llama-quantize falls back to Q5_0, Q8_0 and the like for them. The model came as Q4_1: "
        "its weights lie near a 4-bit block grid by birth.",
        style="dim",
    )
    console.print(f"\n{result.question}", style="bold")
    console.print(printable(result.answer, keep="\n\t"), highlight=False)
    console.print(f"\nfiles and results.json: {out}", highlight=False)


def demo_table(result: DemoResult) -> Table:
    """The comparison as a table."""
    table = Table(title=f"SmolLM2-135M-Instruct, {result.chunks} x {result.context} tokens of {result.text}")
    table.add_column("type")
    for heading in (
        "MB",
        "bits/\nweight",
        "coded\nbits",
        "entropy",
        "perplexity",
        "KLD",
        "same\ntop %",
        "prompt\ntok/s",
        "gen\ntok/s",
        "fused\nprompt",
        "fused\ngen",
    ):
        table.add_column(heading, justify="right")
    for row in result.rows:
        p = row.perplexity
        table.add_row(
            row.name,
            f"{row.file_bytes / 1e6:.1f}",
            f"{row.bits_per_weight:.2f}",
            "" if row.coded_bits_per_weight is None else f"{row.coded_bits_per_weight:.3f}",
            "" if row.entropy is None else f"{row.entropy:.3f}",
            f"{p.ppl:.3f}" if p.ppl < 1e5 else f"{p.ppl:.1e}",
            "" if p.kld_mean is None else f"{p.kld_mean:.4f}",
            "" if p.same_top_percent is None else f"{p.same_top_percent:.1f}",
            f"{row.speed.prompt:.0f}",
            f"{row.speed.generation:.1f}",
            "" if row.fused_speed is None else f"{row.fused_speed.prompt:.0f}",
            "" if row.fused_speed is None else f"{row.fused_speed.generation:.1f}",
        )
    return table
