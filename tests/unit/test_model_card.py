# SPDX-License-Identifier: MIT
"""Whatever README.md and generation_config.json contain, metadata are written, with a warning where
something was left out."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

from entrollm_gguf.convert.model_card import tolerant_metadata
from entrollm_gguf.errors import ConversionWarning
from entrollm_gguf.gguf_io.patched import import_gguf
from entrollm_gguf.gguf_io.reader import open_model


def metadata(folder: Path) -> tuple[dict, list[str]]:
    """general.* of a GGUF that has the metadata of a model folder, and the warnings."""
    gguf = import_gguf()
    path = folder / "out.gguf"
    with warnings.catch_warnings(record=True) as caught, tolerant_metadata(folder):
        warnings.simplefilter("always", ConversionWarning)
        found = gguf.Metadata.load(None, folder, None, 0)
    found.name = found.name or "a name"
    writer = gguf.GGUFWriter(path, "llama")
    found.set_gguf_meta_model(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = open_model(path)
    return {key: model.field(key) for key in model.readers[0].fields if key.startswith("general.")}, [str(one.message) for one in caught]


def test_a_good_card_is_kept(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags: [a, b]\nlanguage: [en, no]\nbase_model: org/some-model-7b\n---\nText\n")
    found, warned = metadata(tmp_path)
    assert (found["general.license"], found["general.tags"], found["general.languages"]) == ("mit", ["a", "b"], ["en", "no"])
    assert found["general.base_model.0.organization"] == "Org" and warned == []


@pytest.mark.parametrize(
    "card",
    [b"---\ntags: [a, b: c\n---\n", b"---\nlicense: : mit\n---\n", "---\nauthor: J\xf6rg\n---\n".encode("latin-1"), b"---\n\x00\n---\n"],
)
def test_unreadable_cards(tmp_path, card):
    (tmp_path / "README.md").write_bytes(card)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.5}')
    found, (warned,) = metadata(tmp_path)
    assert "README.md: cannot be read" in warned and "\n" not in warned
    assert found["general.sampling.temp"] == 0.5


@pytest.mark.parametrize(
    "card, key, value",
    [
        ("name: 12", "general.name", "12"),
        ("version: 2024-01-01", "general.version", "2024-01-01"),
        ("version: 1.5", "general.version", "1.5"),
        ("license_link: 2024-01-01", "general.license.link", "2024-01-01"),
        ("license: [mit, null, 3]", "general.license", "mit,3"),
        ("tags: [null, a, 3]", "general.tags", ["a", "3"]),
        ("tags: [null]", "general.tags", None),
        ("language: [null]", "general.languages", None),
        ("base_model: [{name: 3, version: null}]", "general.base_model.0.name", "3"),
        ('author: "\\ud800x"', "general.author", "?x"),
        ("license: null", "general.license", None),
    ],
)
def test_entries_become_texts(tmp_path, card, key, value):
    (tmp_path / "README.md").write_text(f"---\n{card}\n---\n")
    found, warned = metadata(tmp_path)
    assert found.get(key) == value and warned == []


@pytest.mark.parametrize(
    "card", ["license: {a: b}", "name: {a: b}", "tags: [{a: b}]", "datasets: [3, [4]]", "base_model: [[a]]", "model_name: [{}]"]
)
def test_entries_of_no_use(tmp_path, card):
    (tmp_path / "README.md").write_text(f"---\n{card}\nauthor: me\n---\n")
    found, warned = metadata(tmp_path)
    assert found["general.author"] == "me"
    assert all("README.md" in one for one in warned)


@pytest.mark.parametrize("content", ["{", "[]", "\xff", '{"temperature": "hot", "top_k": 1e99, "top_p": null}', '{"top_k": "many"}'])
def test_generation_config(tmp_path, content):
    (tmp_path / "generation_config.json").write_bytes(content.encode("latin-1"))
    found, _ = metadata(tmp_path)
    assert not any(key.startswith("general.sampling") for key in found)
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": "0.5", "top_k": 50.0}))
    found, _ = metadata(tmp_path)
    assert (found["general.sampling.temp"], found["general.sampling.top_k"]) == (0.5, 50)
