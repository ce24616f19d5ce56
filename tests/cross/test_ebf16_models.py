# SPDX-License-Identifier: MIT
"""Recipe EBF16 on whole models: the weights that llama.cpp's converter writes as BF16, bit by bit,
in two thirds of their size."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter

import gguf
import numpy as np
import pytest
from models import ARCHITECTURES, build_tiny_model
from running import logits

from entrollm_gguf import runtime
from entrollm_gguf.convert.pipeline import convert_model
from entrollm_gguf.gguf_io.patched import import_gguf
from entrollm_gguf.gguf_io.reader import open_model
from entrollm_gguf.inspect.decode import decode_file
from entrollm_gguf.inspect.report import inspect_file
from entrollm_gguf.inspect.verify import verify_file


def contents(path) -> dict[str, tuple[str, bytes]]:
    """Type and bytes of every tensor."""
    return {one.name: (one.type_name, np.asarray(one.data).tobytes()) for one in open_model(path).tensors()}


def stock(folder, out, type_name: str):
    script = runtime.conversion_path() / "convert_hf_to_gguf.py"
    subprocess.run([sys.executable, script, folder, "--outfile", out, "--outtype", type_name], check=True, capture_output=True)
    return out


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bit_by_bit(converted, tiny_model, tmp_path, name):
    coded, plain = converted(name, "EBF16"), tmp_path / "plain.gguf"
    assert verify_file(coded).problems == ()
    assert set(decode_file(coded, plain).types) == {"BF16"}
    expected = contents(stock(tiny_model(name).folder, tmp_path / "stock.gguf", "bf16"))
    assert contents(plain) == expected
    types = Counter(type_name for type_name, _ in contents(coded).values())
    assert types["EBF16"] > 8 and "BF16" not in types


@pytest.mark.parametrize("name", ["llama", "qwen2_moe", "gemma3"])
def test_every_mode_decodes_it(converted, tmp_path, name):
    """Matrix products, experts, tied embeddings: those of the decoded file."""
    coded, plain = converted(name, "EBF16"), tmp_path / "plain.gguf"
    decode_file(coded, plain)
    expected = logits(plain)
    for mode in ("load", "fused", "auto"):
        assert np.array_equal(logits(coded, kv_overrides={"entropy.mode": mode}), expected), mode
    assert np.array_equal(logits(coded, use_mmap=False), expected)


def test_the_entropy_counts_what_is_not_coded(converted, tmp_path, capsys, tiny_model):
    """Sign and mantissa are stored as they are: 8 bits beside the exponent's."""
    from entrollm_gguf.cli import main

    report = inspect_file(converted("llama", "EBF16"))
    assert 8 < report.coded_entropy < report.coded_bits_per_weight < 16
    assert main(["convert", str(tiny_model("llama").folder), str(tmp_path / "m.gguf"), "--recipe", "EBF16", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["entropy_bits_per_weight"] == pytest.approx(report.coded_entropy)


def test_gguf_py_reads_it(converted):
    """gguf.dequantize of the patched package gives the weights of llama.cpp's."""
    tensor = next(t for t in import_gguf().GGUFReader(converted("llama", "EBF16")).tensors if t.tensor_type.name == "EBF16")
    weights = import_gguf().dequantize(tensor.data, tensor.tensor_type)
    assert weights.shape == tuple(reversed(tensor.shape.tolist()))
    one = next(t for t in open_model(converted("llama", "EBF16")).tensors() if t.name == tensor.name)
    from entrollm_gguf import codec

    rows = codec.Payload(one.kind, one.data, one.shape).plain()[1].view("<u2").astype(np.uint32) << 16
    assert np.array_equal(weights, rows.view(np.float32).reshape(weights.shape))


def test_weights_that_are_no_bf16_stay_as_they_are(smollm2_hf, tmp_path):
    """An f16 and an f32 checkpoint: not a bit is lost, and what stays is told."""
    for dtype, kept in (("float16", "F16"), ("float32", "F32")):
        folder = tmp_path / dtype
        folder.mkdir()
        build_tiny_model("mistral", folder, smollm2_hf, dtype=dtype)
        out = tmp_path / f"{dtype}.gguf"
        report = convert_model(folder, out, recipe="EBF16")
        stays = [record for record in report.tensors if record.kept]
        assert len(stays) > 8 and all(record.kept == "its weights are no bf16 numbers" for record in stays)
        assert {record.type_name for record in stays} == {kept}
        expected = {name: data for name, (_, data) in contents(stock(folder, tmp_path / f"{dtype}-stock.gguf", "f32")).items()}
        types = gguf.GGMLQuantizationType
        for name, (type_name, data) in contents(out).items():
            rows = gguf.dequantize(
                np.frombuffer(data, np.uint8).reshape(1, -1).view(np.float16 if type_name == "F16" else np.float32), types[type_name]
            )
            assert rows.tobytes() == expected[name], name
