# SPDX-License-Identifier: MIT
"""The HTML report of `entrollm report` and `entrollm demo`: one file, nothing in it from elsewhere,
pictures as SVG."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from entrollm_gguf.console import printable
from entrollm_gguf.errors import ConversionError
from entrollm_gguf.eval.compare import MEMORY_NOTE, Row, table
from entrollm_gguf.gguf_io.output import atomic_output, check_output
from entrollm_gguf.inspect.plot import draw_file
from entrollm_gguf.inspect.report import FileReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TEMPLATE = "report.html.j2"
_LEAST_KLD = 1e-6  # as many digits as llama-perplexity prints; an axis in powers of ten has no 0


@dataclass(frozen=True)
class _Picture:
    """A file's tensors, drawn."""

    title: str
    caption: str
    source: str  # data: URI


def check_report_path(path: Path, force: bool) -> None:
    """Refuse early what would fail after everything was measured.

    Raises:
        ConversionError, OutputExistsError: not an .html file (a model may not be replaced by
            mistake), or see gguf_io.output.
    """
    if path.suffix.lower() not in (".html", ".htm"):
        raise ConversionError(f"{path}: a report is an .html file; name it so")
    check_output(path, force)


def write_report(
    path: str | Path,
    rows: Sequence[Row],
    reports: Mapping[str, FileReport],
    *,
    title: str,
    environment: Mapping[str, str],
    notes: Iterable[str] = (),
    force: bool = False,
) -> None:
    """Write a comparison as one HTML file: size-quality plot, table, and a picture of the tensors
    of each entropy-coded file.

    Args:
        rows: what was measured, see `compare`.
        reports: by the rows' names.
        title: what was measured, on what.
        environment: where, see `compare.environment`.
        notes: what a reader of the figures has to know.
        force: replace an existing file.
    Raises:
        ConversionError, OutputExistsError: see check_report_path; a full disk.

    >>> from entrollm_gguf import compare, inspect_file, write_report
    >>> reports = {"ours": inspect_file("model.gguf")}
    >>> rows = compare(reports)
    >>> write_report("report.html", rows, reports, title="A tiny model", environment={"cpu": "any"})
    >>> Path("report.html").read_text()[:15]
    '<!DOCTYPE html>'
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    path = Path(path)
    check_report_path(path, force)
    plot = draw_quality(rows)
    headings, lines = table(rows)
    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    page = templates.get_template(_TEMPLATE).render(
        title=printable(title),
        plot=None if plot is None else _data_uri(plot),
        headings=headings,
        lines=[[printable(cell) for cell in line] for line in lines],
        notes=[printable(note) for note in (*notes, MEMORY_NOTE)],
        pictures=[_picture(row, reports[row.name]) for row in rows if row.is_coded],
        environment=environment,
    )
    with atomic_output(path, force) as temporary:
        temporary.write_text(page, encoding="utf-8")


def draw_quality(rows: Sequence[Row]) -> Figure | None:
    """Size against quality: KL divergence where there is a reference, else perplexity; None if no
    quality was measured."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    results = [(row, row.perplexity) for row in rows if row.perplexity is not None]
    if not results:
        return None
    diverging = [(row, max(found.kld_mean, _LEAST_KLD)) for row, found in results if found.kld_mean is not None]
    points = [(row, value) for row, value in diverging or [(row, found.ppl) for row, found in results] if math.isfinite(value)]
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    # names of the two families on different sides of their points, since these often lie close
    # together
    for is_coded, label, marker, offset in ((False, "stock types", "s", (6, -12)), (True, "entropy-coded", "o", (6, 5))):
        family = [(row.file_bytes / 1e6, value, row.name) for row, value in points if row.is_coded == is_coded]
        if not family:
            continue
        axes.plot([x for x, _, _ in family], [y for _, y, _ in family], marker, ms=7, label=label)
        for x, y, name in family:
            axes.annotate(printable(name), (x, y), xytext=offset, textcoords="offset points", fontsize=9, parse_math=False)
    axes.set_yscale("log")
    # plain numbers: a formatter of powers would write formulas; between powers of ten only where
    # few of those are
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
    axes.set_xlim(0, 1.15 * max((row.file_bytes / 1e6 for row, _ in points), default=1))  # room for the name of the largest
    axes.set_xlabel("file, MB")
    axes.set_ylabel("mean KL divergence from the reference, nats" if diverging else "perplexity")
    axes.grid(True, which="major", alpha=0.3)
    axes.legend()
    return figure


def _picture(row: Row, report: FileReport) -> _Picture:
    figure, tensor = draw_file(report)
    caption = (
        f"{row.file}: {report.coded_n_weights} of {report.n_weights} weights coded, {row.coded_bits_per_weight or 0:.3f} bits each, "
        f"entropy {row.entropy or 0:.3f}. Codes of {tensor}."
    )
    return _Picture(printable(row.name), printable(caption), _data_uri(figure))


def _data_uri(figure: Figure) -> str:
    """An SVG for <img>: there, scripts and links inside it are dead, and identifiers do not clash
    with those of the other pictures."""
    from matplotlib import rc_context

    with (
        io.BytesIO() as buffer,
        rc_context({"svg.fonttype": "none"}),
    ):  # text stays text, since the browser knows letters that our font lacks
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
