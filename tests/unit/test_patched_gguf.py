# SPDX-License-Identifier: MIT
"""Which gguf packages are refused, and what the line says."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from entrollm_gguf.errors import RuntimeMissingError
from entrollm_gguf.gguf_io.patched import import_gguf

STOCK = SimpleNamespace(GGMLQuantizationType=SimpleNamespace(Q8_0=8))
OLDER = SimpleNamespace(GGMLQuantizationType=SimpleNamespace(Q8_0=8, EQ8=500), entropy=SimpleNamespace())


@pytest.mark.parametrize(
    ("package", "says"),
    [(None, "the patched gguf package is not installed"), (STOCK, "is the stock one"), (OLDER, "belongs to another version")],
)
def test_refused(package, says, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", package)  # None: an import fails
    with pytest.raises(RuntimeMissingError, match=f"{says}.*entrollm runtime build"):
        import_gguf()
