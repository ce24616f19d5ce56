# SPDX-License-Identifier: MIT
"""`entrollm report`: the numbers are those of the other commands, the page needs no other file, and
words from files stay words."""

from __future__ import annotations

import base64
import dataclasses
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from entrollm_gguf.cli import main
from entrollm_gguf.eval.compare import Row, table
from entrollm_gguf.eval.perplexity import PerplexityResult
from entrollm_gguf.eval.report import draw_quality
from entrollm_gguf.gguf_io.reader import open_model
from entrollm_gguf.inspect.decode import decode_file

ROW = Row("a", "a.gguf", 10_000_000, 8.5, 9_000_000, None, None, None, None, None, None)


class Page(HTMLParser):
    """Elements, addresses, and the cells of the table of a report."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.addresses: list[str] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self._in_cell = False
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attrs) -> None:
        self.elements.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action", "poster")]
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag) -> None:
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data) -> None:
        self.text += data
        if self._in_cell:
            self.rows[-1][-1] += data

    def pictures(self) -> list[str]:
        """The SVGs, each a whole XML document without scripts and without addresses outside
        itself."""
        found = []
        for address in self.addresses:
            head, _, body = address.partition(",")
            assert head == "data:image/svg+xml;base64"
            svg = base64.b64decode(body, validate=True).decode("utf-8")
            for element in ElementTree.fromstring(svg).iter():
                assert not element.tag.endswith("script")
                assert all(value.startswith("#") for name, value in element.attrib.items() if name.endswith("href"))
            found.append(svg)
        return found


@pytest.fixture(scope="module")
def files(converted, tmp_path_factory) -> tuple[Path, Path]:
    """The same codes: entropy-coded, and as Q8_0."""
    coded = converted("llama", "EQ8-rows")
    plain = tmp_path_factory.mktemp("plain") / "plain.gguf"
    decode_file(coded, plain)
    return coded, plain


def test_report_with_everything(files, text_file, tmp_path, capsys):
    coded, plain = files
    out = tmp_path / "report.html"
    measured = ["--text", str(text_file), "--ctx", "64", "--chunks", "4"]
    assert main(["report", str(coded), "--reference", str(plain), *measured, "--speed", "-o", str(out)]) == 0
    shown = capsys.readouterr().out
    page = Page(out)
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.elements)
    assert "http" not in page.text and "url(" not in out.read_text()
    quality, tensors = page.pictures()
    assert "entropy-coded" in quality and coded.stem in quality and "Per layer" in tensors

    headings, reference, load, fused = page.rows
    assert [h.replace("\n", " ") for h in headings[:7]] == ["file", "mode", "MB", "KLD", "prompt tok/s", "gen tok/s", "memory MB"]
    assert (reference[0], load[:2], fused[:2]) == ("plain", [coded.stem, "load"], ["", "fused"])
    megabytes = [f"{sum(t.n_bytes for t in open_model(path).tensors()) / 1e6:.1f}" for path in (plain, coded)]
    assert (reference[6], load[6], fused[6]) == (megabytes[0], megabytes[0], megabytes[1])  # decoded at load, it is the other file
    assert float(load[3]) < 1e-3  # the same codes: no divergence
    assert all(float(line[i]) > 0 for line in (reference, load, fused) for i in (4, 5))
    assert main(["perplexity", str(plain), *measured, "--json"]) == 0
    assert float(reference[8]) == pytest.approx(json.loads(capsys.readouterr().out)["ppl"], abs=1e-3)
    for line in page.rows[1:]:
        assert any(all(cell in terminal for cell in line) for terminal in shown.splitlines())


def test_report_of_sizes_alone(files, tmp_path, capsys):
    """Nothing is measured that was not asked for, and no column stands empty."""
    out = tmp_path / "report.html"
    assert main(["report", *map(str, files), "-o", str(out)]) == 0
    page = Page(out)
    assert [h.replace("\n", " ") for h in page.rows[0]] == ["file", "mode", "MB", "memory MB", "bits/ weight"]
    assert len(page.pictures()) == 1 and "Size and quality" not in page.text


def test_names_are_words(files, tmp_path, capsys):
    """Markup, formulas and escape sequences in names reach neither the page, nor the pictures, nor
    the terminal."""
    name = "<b>$x^{$&'\"\x1b[31m[bold]"
    hostile = tmp_path / f"{name}.gguf"
    shutil.copy(files[0], hostile)
    out = tmp_path / "report.html"
    assert main(["report", str(hostile), "-o", str(out)]) == 0
    escaped = name.replace("\x1b", "\\x1b")
    page = Page(out)
    assert page.rows[1][0] == escaped and "b" not in page.elements
    (picture,) = page.pictures()
    assert escaped in "".join(ElementTree.fromstring(picture).itertext())
    shown = capsys.readouterr().out
    assert escaped in shown and "\x1b" not in shown


def test_files_of_one_name_are_told_apart(files, tmp_path):
    (tmp_path / "other").mkdir()
    twin = tmp_path / "other" / files[1].name
    shutil.copy(files[1], twin)
    out = tmp_path / "report.html"
    assert main(["report", str(files[1]), str(twin), "-o", str(out)]) == 0
    assert [line[0] for line in Page(out).rows[1:]] == [str(files[1]), str(twin)]


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["none.gguf"], 1, "none.gguf: no such file"),
        (["foreign.gguf"], 1, "foreign.gguf"),
        (["foreign.gguf", "--reference", "foreign.gguf"], 2, "--reference needs --text"),
        ([], 2, "Missing argument"),
        (["MODEL", "--text", "none.txt"], 1, "none.txt"),
    ],
)
def test_errors_leave_nothing(arguments, code, reason, files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("foreign.gguf").write_bytes(b"not a model" * 100)
    assert main(["report", *(str(files[1]) if one == "MODEL" else one for one in arguments), "-o", "report.html"]) == code
    assert reason in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["foreign.gguf"]


def test_what_a_report_replaces(files, tmp_path, capsys):
    """It replaces a report only with --force, and a model never."""
    out, model = tmp_path / "report.html", tmp_path / "model.gguf"
    out.write_text("mine")
    shutil.copy(files[1], model)
    before = model.read_bytes()
    assert main(["report", str(model), "-o", str(out)]) == 1
    assert "--force" in capsys.readouterr().err and out.read_text() == "mine"
    assert main(["report", str(model), "-o", str(model), "--force"]) == 1
    assert "model.gguf: a report is an .html file" in capsys.readouterr().err and model.read_bytes() == before
    assert main(["report", str(model), "-o", str(out), "--force"]) == 0
    assert "GGUF files compared" in Page(out).text


def test_a_plot_of_odd_figures():
    """A divergence of zero has a place on an axis without 0; NaN has none; and if nothing was
    measured there is no plot."""
    assert draw_quality([ROW]) is None
    same, ruined = (dataclasses.replace(ROW, perplexity=PerplexityResult("", 9.0, 0.1, kld, 0.0)) for kld in (0.0, float("nan")))
    figure = draw_quality([same, ruined])
    assert figure is not None
    (line,) = figure.axes[0].lines
    assert list(line.get_ydata()) == [1e-6]
    figure.canvas.draw()
    by_perplexity = draw_quality([dataclasses.replace(ROW, perplexity=PerplexityResult("", 9.0, 0.1))])
    assert by_perplexity is not None and by_perplexity.axes[0].get_ylabel() == "perplexity"


def test_table_leaves_out_what_nobody_has():
    headings, lines = table([ROW])
    assert headings == ("file", "mode", "MB", "memory\nMB", "bits/\nweight")
    assert lines == [("a", "", "10.0", "9.0", "8.50")]
