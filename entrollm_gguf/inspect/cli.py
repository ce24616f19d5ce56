# SPDX-License-Identifier: MIT
"""`entrollm inspect`, `entrollm verify` and `entrollm decode`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from entrollm_gguf.console import output_console, printable
from entrollm_gguf.errors import FormatError
from entrollm_gguf.progress import Progress as OnProgress


@contextlib.contextmanager
def _bytes_bar(disable: bool = False) -> Iterator[OnProgress]:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=disable) as bar:
        task = bar.add_task("reading", total=None)
        yield lambda done, total, name, unit: bar.update(task, completed=done, total=total, description=printable(name))


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _whole(value: float | None) -> str:
    """A number that is whole but for stacks of matrices that differ."""
    return "" if value is None else f"{value:.1f}".removesuffix(".0")


@click.command(
    epilog="\b\nExamples:\n  entrollm inspect model.gguf\n  entrollm inspect model.gguf --json > model.json\n  entrollm inspect model.gguf --plot model.png\n"
    "  entrollm inspect model.gguf --card README.md\n"
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    metavar="PICTURE",
    help="Also draw bits and entropy per layer, and codes with their lengths (.png, .svg, .pdf).",
)
@click.option("--plot-tensor", metavar="NAME", help="The tensor whose codes are drawn; the largest one of a layer by default.")
@click.option("--card", type=click.Path(path_type=Path), metavar="README.md", help="Also write a model card for the Hugging Face hub.")
@click.option("--force", is_flag=True, help="Replace PICTURE or README.md if it exists.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads; all cores by default.")
def inspect(
    file: Path, as_json: bool, plot: Path | None, plot_tensor: str | None, card: Path | None, force: bool, threads: int | None
) -> None:
    """Show the tensors of a GGUF: type, shape, size, bits per weight, entropy, code.

    The entropy is that of the integer codes, in bits per weight: what an ideal memoryless coder
    would need. In the file every weight has the "raw bits", which are all that most weights need.
    "tail %" of them go on in a tail, which has at most one bit for each of the "tail planes"; "far
    %" are so rare that a byte of their own follows the tail. FILE may be the first part of a split
    file.
    """
    from entrollm_gguf.inspect.card import check_card_path, write_card
    from entrollm_gguf.inspect.report import inspect_file

    if card:
        check_card_path(card, force)
    with _bytes_bar(disable=as_json) as progress:
        report = inspect_file(file, threads=threads, progress=progress)
    if plot:
        from entrollm_gguf.inspect.plot import plot_file

        drawn = plot_file(report, plot, tensor=plot_tensor, force=force)
        click.echo(f"{plot}: layers, and codes of {printable(drawn)}", err=True)
    if card:
        write_card(card, report, force=force)
        click.echo(f"{card}: a model card; upload both by `hf upload OWNER/NAME FOLDER`", err=True)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(report), indent=2))
        return
    table = Table(box=None, header_style="bold")
    for heading, justify in (
        ("tensor", "left"), ("type", "left"), ("shape", "right"), ("bytes", "right"), ("bits/weight", "right"),
        ("entropy", "right"), ("raw bits", "right"), ("tail planes", "right"), ("tail %", "right"), ("far %", "right"), ("scheme", "left"),
        ("decodes to", "left"),
    ):  # fmt: skip
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for t in report.tensors:
        shape = " x ".join(map(str, t.shape))
        table.add_row(
            printable(t.name), t.type, shape, str(t.n_bytes), _number(t.bits_per_weight), _number(t.entropy), _whole(t.raw_bits), _whole(t.tail_planes),
            _number(t.tail_percent, 1), _number(t.far_percent, 2), printable(t.scheme or ""), t.decodes_to or "",
        )  # fmt: skip
    console = output_console()
    console.print(table)
    totals = Table(show_header=False, box=None)
    totals.add_row("file", f"{report.path}, {report.n_bytes / 1e6:.1f} MB, {report.bits_per_weight:.3f} bits per weight in all")
    if report.recipe:
        totals.add_row("recipe", printable(report.recipe))
    if report.coded_bits_per_weight is not None and report.coded_entropy is not None:
        over = f" (+{(report.coded_bits_per_weight / report.coded_entropy - 1) * 100:.2f} %)" if report.coded_entropy else ""
        totals.add_row(
            "coded", f"{report.coded_n_weights} weights, {report.coded_bits_per_weight:.3f} bits each, "
            f"entropy {report.coded_entropy:.3f}{over}",
        )  # fmt: skip
        totals.add_row(
            "on a GPU", f"the coded tensors take {report.coded_device_bytes / 1e6:.1f} MB, {report.coded_bytes / 1e6:.1f} MB in the file"
        )
    console.print(totals)


@click.command(epilog="\b\nExample:\n  entrollm verify model.gguf\n")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--threads", type=click.IntRange(min=1), help="Threads; all cores by default.")
def verify(file: Path, threads: int | None) -> None:
    """Check that a GGUF is whole and that every entropy-coded tensor is intact.

    Checks the file's length; for each entropy-coded tensor its structure, its hash (which covers
    the tensor's name) and every group of rows; and that llama.cpp loads the file. Stock tensors
    carry no checksum. Exit code 0 if all is well.
    """
    from entrollm_gguf.inspect.verify import verify_file

    with _bytes_bar() as progress:
        report = verify_file(file, threads=threads, progress=progress)
    if report.problems:
        for problem in report.problems[1:]:
            click.echo(printable(f"{file}: {problem}"), err=True)
        raise FormatError(f"{file}: {report.problems[0]}; download or convert it again")
    click.echo(f"{file}: sound, {report.n_coded} of {report.n_tensors} tensors are entropy-coded")


@click.command(epilog="\b\nExample:\n  entrollm decode model.gguf model-plain.gguf\n")
@click.argument("in_file", type=click.Path(path_type=Path))
@click.argument("out_file", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Replace OUT_FILE if it exists.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads; all cores by default.")
def decode(in_file: Path, out_file: Path, force: bool, threads: int | None) -> None:
    """Turn an entropy-coded GGUF into a plain one for stock llama.cpp.

    EQ8 becomes Q8_0 (exact) or, where the grid has an offset, F16; EQ4 becomes Q4_0 or Q4_1 (both
    exact); EBF16 becomes BF16 (exact).
    """
    from entrollm_gguf.inspect.decode import decode_file

    with _bytes_bar() as progress:
        report = decode_file(in_file, out_file, force=force, threads=threads, progress=progress)
    types = ", ".join(f"{n} {name}" for name, n in sorted(report.types.items()))
    click.echo(f"{report.path}: {report.file_bytes / 1e6:.1f} MB, decoded {types} in {report.seconds:.1f} s")
