# SPDX-License-Identifier: MIT
"""A model card for the Hugging Face hub: what the file is, in the numbers of `entrollm inspect`,
and how it is run."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import jinja2

from entrollm_gguf.errors import ConversionError
from entrollm_gguf.gguf_io.output import atomic_output, check_output
from entrollm_gguf.gguf_io.reader import ModelFile, open_model
from entrollm_gguf.inspect.report import FileReport


def check_card_path(path: Path, force: bool) -> None:
    """Refuse early what would fail after everything was measured.

    Raises:
        ConversionError, OutputExistsError: not an .md file (a model may not be replaced by
            mistake), or see gguf_io.output.
    """
    if path.suffix.lower() != ".md":
        raise ConversionError(f"{path}: a model card is an .md file; name it so")
    check_output(path, force)


def write_card(path: str | Path, report: FileReport, *, force: bool = False) -> None:
    """Write the card of an entropy-coded file. Nothing is claimed of its quality: that takes a
    reference and a text (`entrollm report`).

    Args:
        path: README.md, mostly.
        report: of the file, which is read once more for its metadata.
    Raises:
        ConversionError: not an .md file, or a file without entropy-coded tensors.
        OutputExistsError: the output exists and `force` is not given.
    """
    out = Path(path)
    check_card_path(out, force)
    if not report.coded_n_weights:
        raise ConversionError(f"{report.path}: has no entropy-coded tensors; a card is for files that have")
    text = card_of(open_model(Path(report.path)), report)
    with atomic_output(out, force) as temporary:
        temporary.write_text(text, encoding="utf-8")


def card_of(model: ModelFile, report: FileReport) -> str:
    """The card as Markdown with the hub's front matter."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("entrollm_gguf.inspect", "."),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
    )
    coded = [one for one in report.tensors if one.entropy is not None]
    decoded = Counter(one.decodes_to for one in coded)
    return environment.get_template("card.md.j2").render(
        title=_line(model.text("general.name")) or Path(report.path).stem,
        file=Path(report.path).name,
        base_models=_base_models(model),
        license=_line(model.text("general.license")),
        megabytes=f"{report.n_bytes / 1e6:.1f}",
        bits=f"{report.bits_per_weight:.2f}",
        recipe=_line(report.recipe) or "not told",
        calibration=_line(model.text("entrollm.calibration")),
        coded_bits=f"{report.coded_bits_per_weight:.3f}",
        entropy=f"{report.coded_entropy:.3f}",
        types=", ".join(f"{n} {name}" for name, n in Counter(one.type for one in report.tensors).most_common()),
        coded_megabytes=f"{report.coded_bytes / 1e6:.1f}",
        device_megabytes=f"{report.coded_device_bytes / 1e6:.1f}",
        decoded=", ".join(f"{n} matrices to {name}" for name, n in decoded.most_common()),
    )


def _base_models(model: ModelFile) -> list[str]:
    """OWNER/NAME of the models that the file was made from, as far as its metadata tells."""
    own = model.text("general.repo_url")
    count = model.field("general.base_model.count")
    given = [model.text(f"general.base_model.{i}.repo_url") for i in range(count)] if isinstance(count, int) and 0 < count < 100 else []
    prefix = "https://huggingface.co/"
    return [_line(url.removeprefix(prefix)) for url in ([own] if own else given) if url and url.startswith(prefix)]


def _line(text: str | None) -> str:
    """A text from the file, without characters that would break a line or a table."""
    return " ".join("".join(c if c.isprintable() else " " for c in text or "").replace("|", "/").split())
