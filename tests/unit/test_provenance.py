# SPDX-License-Identifier: MIT
"""Files of results say how they came about, all in the same words."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.insert(0, str(BENCH))

import provenance  # noqa: E402

# scripts whose first sentence names a file of results
SCRIPTS = [path for path in sorted(BENCH.rglob("*.py")) if re.search(r"(OUT|RESULTS)\.json", path.read_text().split('"""')[1])]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_begins_its_results_with_it(path):
    text = path.read_text()
    assert "from provenance import provenance" in text and re.search(r"\*\*(begun|provenance\()", text)
    assert "rev-parse" not in text and "import environment" not in text


def test_every_script_can_be_imported():
    """They name parts of the package that tests do not."""
    names = [path.stem for path in sorted(BENCH.glob("*.py"))]
    assert len(names) > 8
    code = f"import importlib, sys; sys.path.insert(0, {str(BENCH)!r}); [importlib.import_module(name) for name in {names}]"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_what_it_says(monkeypatch):
    monkeypatch.setattr(provenance, "environment", lambda: {"cpu": "some"})
    said = provenance.provenance("python some.py OUT.json")
    assert list(said) == ["command", "commit", "environment"] and said["environment"] == {"cpu": "some"}
    assert said["command"] == "python some.py OUT.json" and re.fullmatch(r"[0-9a-f]{40}(-dirty)?", said["commit"])
