# SPDX-License-Identifier: MIT
"""Files that say odd things: legal ones are read, others end in one line, and nothing in them
reaches the terminal unchanged."""

from __future__ import annotations

import json
import struct
import subprocess
import sys

import numpy as np
import pytest
from rewriting import array, key, rewrite, text

from entrollm_gguf import codec
from entrollm_gguf.cli import main
from entrollm_gguf.errors import FormatError, ToolError
from entrollm_gguf.gguf_io.reader import open_model
from entrollm_gguf.inspect.decode import decode_file
from entrollm_gguf.inspect.verify import verify_file

U32, F32, STRING, ARRAY = 4, 6, 8, 9


@pytest.fixture(scope="module")
def small(converted):
    return converted("mistral", "EQ8-mixed")


def one_line(capsys) -> str:
    """What the command said, which has to be one line, an error."""
    error = capsys.readouterr().err.strip()
    assert error.startswith("entrollm: error: ") and "\n" not in error and "Traceback" not in error
    return error


# ---- what the loader refuses ---------------------------------------------------------------------


def _set(name: str, /, **changes):
    def edit(infos) -> None:
        for field, value in changes.items():
            setattr(infos[name], field, value)

    return edit


@pytest.mark.parametrize(
    "edit",
    [
        _set("output_norm.weight", dims=[48, 2]),
        _set("output_norm.weight", dims=[64]),
        _set("output_norm.weight", type=1),  # F16
        _set("blk.0.attn_norm.weight", type=8),  # Q8_0
        _set("blk.0.attn_norm.weight", type=42000),
        _set("blk.0.attn_norm.weight", offset=0),
        _set("blk.0.ffn_up.weight", type=8),
        _set("blk.0.ffn_up.weight", type=501),
        _set("blk.1.ffn_up.weight", name=b"blk.1.ffn_upp.weight"),
        lambda infos: infos.pop("output_norm.weight"),
    ],
)
def test_verify_refuses_what_the_loader_refuses(small, tmp_path, edit, capsys):
    path = rewrite(small, tmp_path / "changed.gguf", edit=edit)
    assert main(["verify", str(path)]) == 1
    assert "changed.gguf" in capsys.readouterr().err


def test_verify_asks_the_loader(small, tmp_path):
    """A sound file, the same with one more key, and one with a key missing."""
    assert verify_file(rewrite(small, tmp_path / "a.gguf", keys=[key("x.y", U32, struct.pack("<I", 1))])).problems == ()
    (problem,) = verify_file(rewrite(small, tmp_path / "b.gguf", without="llama.block_count")).problems
    assert "llama.cpp refuses it" in problem and "block_count" in problem


def test_how_the_loader_can_end(small, tmp_path, monkeypatch):
    """It refuses, aborts, or does not start at all; the command survives all of these."""
    from entrollm_gguf.gguf_io import loader

    def ends(script: str) -> str | None:
        program = tmp_path / "program.sh"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setattr(loader.sys, "executable", str(program))
        return loader.why_not_loaded(small)

    assert ends("exit 0") is None
    assert ends("echo first; echo second; exit 3") == "refuses it: first"
    assert ends("echo 'GGML_ASSERT(x) failed' >&2; kill -ABRT $$") == "ends by SIGABRT after: GGML_ASSERT(x) failed"
    with pytest.raises(ToolError, match=r"mistral.*cannot be started: ImportError: no library"):
        ends("echo Traceback >&2; echo 'ImportError: no library' >&2; exit 1")


def _copy(source, out, *, alignment: int | None = None, replace: dict[str, np.ndarray] | None = None):
    """A file with the same keys, another alignment, or other F32 tensors, which are entropy-coded
    as a single row."""
    import gguf

    model = open_model(source)
    writer = gguf.GGUFWriter(out, "llama")
    for field in model.readers[0].fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture")):
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=field.types[-1])
    if alignment:
        writer.add_custom_alignment(alignment)
    for entry in model.tensors():
        data, shape, dtype = entry.data, entry.reader_tensor.raw_shape, entry.reader_tensor.tensor_type
        if entry.name in (replace or {}):
            data, shape, dtype = replace[entry.name], (entry.shape[-1],), gguf.GGMLQuantizationType.EQ8
        writer.add_tensor(entry.name, data, raw_shape=shape, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def test_small_alignment(small, tmp_path):
    (problem,) = verify_file(_copy(small, tmp_path / "a.gguf", alignment=8)).problems
    assert "general.alignment is 8" in problem and "32" in problem
    assert verify_file(_copy(small, tmp_path / "b.gguf", alignment=64)).problems == ()


def test_coded_tensor_of_one_dimension(small, tmp_path):
    name = "blk.0.attn_norm.weight"
    payload = codec.encode(codec.EntropyType.EQ8, np.ones((1, 96), np.int8), np.float16([1]), name=name).payload
    path = _copy(small, tmp_path / "a.gguf", replace={name: payload})
    (problem,) = verify_file(path).problems
    assert name in problem and "one dimension" in problem


# ---- metadata ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, extra",
    [
        ("x.none", key("x.none", ARRAY, array(U32))),
        ("x.none", key("x.none", ARRAY, array(STRING))),
        ("x.text", key("x.text", STRING, text(b"\xff\xfe"))),
        ("x.texts", key("x.texts", ARRAY, array(STRING, text(b"\xff"), text("a")))),
        ("x.nan", key("x.nan", F32, struct.pack("<f", float("nan")))),
    ],
    ids=["no-numbers", "no-strings", "no-utf8", "no-utf8-in-array", "nan"],
)
def test_odd_metadata_is_copied(small, tmp_path, name, extra, capsys):
    """llama.cpp reads it, so it is legal: no command stumbles, and copies hold it byte for byte."""
    path, plain, new = rewrite(small, tmp_path / "odd.gguf", keys=[extra]), tmp_path / "plain.gguf", tmp_path / "new.gguf"
    for command in (["verify", str(path)], ["inspect", str(path)], ["decode", str(path), str(plain)]):
        assert main(command) == 0, capsys.readouterr().err
    assert extra in plain.read_bytes()
    subprocess.run(
        [sys.executable, "-m", "gguf.scripts.gguf_new_metadata", "--general-name", "x", path, new], check=True, capture_output=True
    )
    assert extra in new.read_bytes()


@pytest.mark.parametrize(
    "extra",
    [
        key("split.count", STRING, text("two")),
        key("split.count", F32, struct.pack("<f", float("nan"))),
        key("split.count", ARRAY, array(U32)),
        key(b"x.\xff", U32, struct.pack("<I", 1)),
        key("x.y", 77, b""),
        key("x.y", ARRAY, struct.pack("<IQ", U32, 1 << 62)),
        key("x.y", STRING, struct.pack("<Q", 1 << 62)),
    ],
    ids=["count-text", "count-nan", "count-array", "key-no-utf8", "type-unknown", "array-beyond-file", "string-beyond-file"],
)
@pytest.mark.parametrize("command", ["verify", "inspect", "decode"])
def test_impossible_metadata(small, tmp_path, extra, command, capsys):
    path = rewrite(small, tmp_path / "odd.gguf", keys=[extra])
    assert main([command, str(path), *([str(tmp_path / "out.gguf")] if command == "decode" else [])]) == 1
    assert "odd.gguf" in one_line(capsys) and not (tmp_path / "out.gguf").exists()


def test_our_keys_of_other_types(small, tmp_path, capsys):
    """Nothing depends on them."""
    for name, extra in (
        ("entrollm.recipe", key("entrollm.recipe", U32, struct.pack("<I", 7))),
        ("entrollm.tensor.names", key("entrollm.tensor.names", ARRAY, array(U32, struct.pack("<I", 7)))),
        ("entrollm.tensor.schemes", key("entrollm.tensor.schemes", F32, struct.pack("<f", float("nan")))),
        ("entrollm.tensor.schemes", key("entrollm.tensor.schemes", ARRAY, array(STRING))),
    ):
        path = rewrite(small, tmp_path / "odd.gguf", keys=[extra], without=name)
        assert main(["inspect", str(path)]) == 0, capsys.readouterr().err
        assert main(["inspect", str(path), "--json"]) == 0


def test_architecture_of_another_type(small, tmp_path):
    path = rewrite(small, tmp_path / "odd.gguf", keys=[key("general.architecture", U32, bytes(4))], without="general.architecture")
    with pytest.raises(FormatError, match=r"odd\.gguf.*general\.architecture"):
        decode_file(path, tmp_path / "plain.gguf")
    assert verify_file(path).problems


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_a_small_file_that_claims_much(tmp_path, command, capsys):
    path = tmp_path / "claims.gguf"
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + key("a", ARRAY, struct.pack("<IQ", U32, 1 << 30)))
    assert path.stat().st_size == 49
    assert main([command, str(path)]) == 1
    assert "claims.gguf" in one_line(capsys)


# ---- what a file says, printed -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["[/x]", "[bold]x", ":smile:", "\x1b[31mred", "a\nb\tc\x00", "\u202egfe", "$\\frac{1}$", "ä€"])
def test_names_are_shown_as_they_are(small, tmp_path, name, capsys):
    """As words, and neither as markup nor as escape sequences: in tables, messages and pictures."""

    def edit(infos) -> None:
        infos["output_norm.weight"].name = name.encode()
        infos["blk.0.ffn_up.weight"].name = name.encode() + b"2"

    keys = [key("entrollm.recipe", STRING, text(name))]
    path = rewrite(small, tmp_path / "named.gguf", edit=edit, keys=keys, without="entrollm.recipe")
    plot = ["--plot", str(tmp_path / "named.png"), "--plot-tensor", f"{name}2"] if name[0] in "$\x1b" else []
    assert main(["inspect", str(path), *plot]) == 0, capsys.readouterr().err
    shown = "".join(capsys.readouterr())
    hostile = {c for c in name if not c.isprintable()}
    assert not hostile & set(shown) - {"\n"}
    assert hostile or name in shown
    assert main(["inspect", str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert name in {t["name"] for t in report["tensors"]} and report["recipe"] == name
    assert main(["verify", str(path)]) == 1  # another name gives another hash
    assert not hostile & set(capsys.readouterr().err) - {"\n"}


def test_a_name_that_is_no_utf8(small, tmp_path, capsys):
    path = rewrite(small, tmp_path / "named.gguf", edit=_set("output_norm.weight", name=b"\xff\xfe"))
    for command in ("verify", "inspect"):
        assert main([command, str(path)]) == 1
        assert "named.gguf" in one_line(capsys)


def test_the_last_resort(small, monkeypatch, capsys):
    def fault(*_, **__):
        raise RuntimeError("of two\nlines \x1b[0m")

    monkeypatch.setattr("entrollm_gguf.inspect.verify.verify_file", fault)
    assert main(["verify", str(small)]) == 1
    error = one_line(capsys)
    assert "RuntimeError: of two lines" in error and "report" in error and "--debug" in error and "\x1b" not in error
    with pytest.raises(RuntimeError):
        main(["--debug", "verify", str(small)])
