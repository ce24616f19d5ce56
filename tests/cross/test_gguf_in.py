# SPDX-License-Identifier: MIT
"""A GGUF of llama.cpp's converter gives the same tensors as its folder. Files that were quantized
before, split or coded, or that are no model, are told apart."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from models import ARCHITECTURES

from entrollm_gguf import runtime
from entrollm_gguf.cli import main
from entrollm_gguf.convert.basis import Calibration
from entrollm_gguf.convert.pipeline import convert_model, plan_model
from entrollm_gguf.errors import ConversionError, ConversionWarning, FormatError
from entrollm_gguf.gguf_io.patched import import_gguf
from entrollm_gguf.gguf_io.reader import open_model
from entrollm_gguf.inspect.verify import verify_file


@pytest.fixture(scope="module")
def as_gguf(tiny_model, tmp_path_factory):
    """Function: (architecture, type) -> GGUF as convert_hf_to_gguf.py writes it. Each is made
    once."""
    folder = tmp_path_factory.mktemp("stock")

    def get(name: str, type_name: str) -> Path:
        path = folder / f"{name}-{type_name}.gguf"
        if not path.is_file():
            script = runtime.conversion_path() / "convert_hf_to_gguf.py"
            command = [sys.executable, script, tiny_model(name).folder, "--outfile", path, "--outtype", type_name]
            subprocess.run(command, check=True, capture_output=True)
        return path

    return get


def quantized(path: Path, type_name: str) -> Path:
    out = path.with_name(f"{path.stem}-{type_name}.gguf")
    if not out.is_file():
        subprocess.run([runtime.tool("llama-quantize"), path, out, type_name], check=True, capture_output=True)
    return out


def tensors(path: Path) -> dict:
    return {one.name: one for one in open_model(path).tensors()}


@pytest.mark.parametrize("type_name", ["bf16", "f32"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_as_from_the_folder(as_gguf, converted, tmp_path, name, type_name):
    """The checkpoints are bf16, so that both types hold them exactly."""
    recipe = "EQ8-rows"
    out = tmp_path / "out.gguf"
    convert_model(as_gguf(name, type_name), out, recipe=recipe)
    assert verify_file(out).problems == ()
    ours, wanted = tensors(out), tensors(converted(name, recipe))
    assert list(ours) == list(wanted)
    for one, other in zip(ours.values(), wanted.values(), strict=True):
        assert (one.type_name, one.shape) == (other.type_name, other.shape)
        assert np.array_equal(one.data, other.data), one.name
    ours, wanted = open_model(out).readers[0].fields, open_model(converted(name, recipe)).readers[0].fields
    assert {key: field.contents() for key, field in ours.items() if not key.startswith("GGUF.")} == {
        key: field.contents() for key, field in wanted.items() if not key.startswith("GGUF.")
    }


def test_to_bits_and_with_a_plan(as_gguf, tiny_model, tmp_path):
    path = as_gguf("llama", "bf16")
    convert_model(path, tmp_path / "ours.gguf", bits=5)
    convert_model(tiny_model("llama").folder, tmp_path / "wanted.gguf", bits=5)
    assert all(
        np.array_equal(one.data, tensors(tmp_path / "wanted.gguf")[name].data) for name, one in tensors(tmp_path / "ours.gguf").items()
    )
    assert plan_model(path, bits=5).step == plan_model(tiny_model("llama").folder, bits=5).step


def test_an_importance_matrix(as_gguf, tmp_path, text_file):
    path = as_gguf("qwen2", "f16")
    text = tmp_path / "text.txt"
    text.write_text(text_file.read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    imatrix = tmp_path / "imatrix.gguf"
    command = [runtime.tool("llama-imatrix"), "-m", path, "-f", text, "-o", imatrix, "-c", "128", "--chunks", "4"]
    subprocess.run(command, check=True, capture_output=True)
    convert_model(path, tmp_path / "out.gguf", recipe="EQ8-4.5", calibration=Calibration(imatrix=imatrix))
    assert verify_file(tmp_path / "out.gguf").problems == ()
    assert open_model(tmp_path / "out.gguf").text("entrollm.calibration")


def test_what_was_quantized_before(as_gguf, tmp_path):
    original = as_gguf("llama", "f16")
    for type_name, warned in (("Q8_0", False), ("Q4_0", True), ("Q5_1", True), ("IQ4_NL", True)):
        source, out = quantized(original, type_name), tmp_path / f"{type_name}.gguf"
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            report = convert_model(source, out, recipe="EQ8-rows")
        assert (
            any(issubclass(one.category, ConversionWarning) and "what that lost stays lost" in str(one.message) for one in said) == warned
        )
        assert verify_file(out).problems == ()
        n_bits = 8 * sum(one.n_bytes for one in tensors(source).values())
        assert report.bits_before == pytest.approx(n_bits / report.n_weights)
        gguf = import_gguf()
        added = {record.name: record.added_error for record in report.tensors}
        for name, one in tensors(out).items():
            if one.type_name == "EQ8":
                before = tensors(source)[name]
                weights = gguf.quants.dequantize(before.data, gguf.GGMLQuantizationType[before.type_name]).reshape(one.shape)
                again = gguf.quants.dequantize(one.data, gguf.GGMLQuantizationType.EQ8).reshape(one.shape)
                error = np.square(weights - again, dtype=np.float64).mean() / np.square(weights, dtype=np.float64).mean()
                assert error <= 2e-3, name
                assert added[name] == pytest.approx(error, rel=1e-3), name


def test_the_summary_compares(as_gguf, tmp_path, capsys):
    """Bits before and after and the error added, where weights were quantized before, and there
    alone."""
    for type_name, compared in (("Q4_0", True), (None, False)):
        source = as_gguf("llama", "f16") if type_name is None else quantized(as_gguf("llama", "f16"), type_name)
        out = tmp_path / f"{type_name}.gguf"
        assert main(["convert", str(source), str(out), "--recipe", "EQ8-paper"]) == 0
        said = " ".join("".join(capsys.readouterr()).split())
        assert ("quantized again" in said) == compared
        if compared:
            assert re.search(
                r"quantized again \d\.\d\d bits per weight before, \d\.\d\d now; adds an error of \d\.\de-0\d of a matrix's energy, at most",
                said,
            )


def test_a_split_file(as_gguf, tmp_path):
    whole = as_gguf("llama", "bf16")
    command = [runtime.tool("llama-gguf-split"), "--split", "--split-max-tensors", "6", whole, tmp_path / "part"]
    subprocess.run(command, check=True, capture_output=True)
    first = next(tmp_path.glob("part-00001-of-*.gguf"))
    convert_model(first, tmp_path / "ours.gguf", recipe="EQ4-rows")
    convert_model(whole, tmp_path / "wanted.gguf", recipe="EQ4-rows")
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "wanted.gguf").read_bytes()
    second = sorted(tmp_path.glob("part-*.gguf"))[1]
    with pytest.raises(ConversionError, match="same file"):
        convert_model(first, second, force=True)
    with pytest.raises(FormatError, match="name the first part"):
        convert_model(sorted(tmp_path.glob("part-*.gguf"))[1], tmp_path / "x.gguf")


def test_what_is_refused(as_gguf, converted, tmp_path, capsys):
    coded = converted("llama", "EQ8-rows")
    with pytest.raises(ConversionError, match="entropy-coded already"):
        convert_model(coded, tmp_path / "x.gguf")
    writer = import_gguf().GGUFWriter(tmp_path / "adapter.gguf", "llama")
    writer.add_type("adapter")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert main(["convert", str(tmp_path / "adapter.gguf"), str(tmp_path / "x.gguf")]) == 1
    assert "is no model but of the kind 'adapter'" in capsys.readouterr().err
    (tmp_path / "model.bin").write_bytes(b"x")
    assert main(["convert", str(tmp_path / "model.bin"), str(tmp_path / "x.gguf")]) == 1
    assert "name a .gguf file, or the folder" in capsys.readouterr().err
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(as_gguf("llama", "bf16").read_bytes()[:-1000])
    assert main(["convert", str(cut), str(tmp_path / "x.gguf")]) == 1
    assert str(cut) in capsys.readouterr().err
    assert not (tmp_path / "x.gguf").exists()


def test_input_and_output_in_one(as_gguf, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(as_gguf("llama", "bf16").read_bytes())
    with pytest.raises(ConversionError, match="same file"):
        convert_model(path, path, force=True)


def test_calibration(as_gguf, tmp_path, text_file):
    """It works where transformers reads the file and its vocabulary; elsewhere a line names
    llama-imatrix."""
    text = tmp_path / "text.txt"
    text.write_text(text_file.read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    known = Calibration(text=text, n_sequences=4)
    with pytest.raises(ConversionError, match="made by llama-imatrix"):
        convert_model(as_gguf("granite", "bf16"), tmp_path / "x.gguf", recipe="EQ8-4.5", calibration=known)
    path = as_gguf("llama", "bf16")
    convert_model(path, tmp_path / "out.gguf", recipe="EQ8-4.5", calibration=known)
    assert verify_file(tmp_path / "out.gguf").problems == ()
    assert "text sha256" in open_model(tmp_path / "out.gguf").text("entrollm.calibration")
