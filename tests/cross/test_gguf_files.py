# SPDX-License-Identifier: MIT
"""Entropy-coded tensors in GGUF: both readers and writers, dump, split and merge, stock tools,
damaged files."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys

import numpy as np
import pytest
from rewriting import rewrite
from running import logits

from entrollm_gguf import codec, runtime
from entrollm_gguf.codec import EntropyType
from entrollm_gguf.errors import ConversionError, FormatError, ToolError
from entrollm_gguf.eval.chat import Chat
from entrollm_gguf.gguf_io.reader import open_model
from entrollm_gguf.inspect.decode import decode_file
from entrollm_gguf.inspect.report import inspect_file
from entrollm_gguf.inspect.verify import verify_file
from entrollm_gguf.runtime import tree
from entrollm_gguf.runtime.fetch import fetch_sdist
from entrollm_gguf.runtime.pin import read_pin


def write_gguf(path, n_experts: int = 3, tail: bool = False, alignment: int | None = None):
    """A file with an F32, a 2-D EQ8, a 3-D EQ4 and, as last tensor or not, another F32 one. Returns
    the codes."""
    import gguf

    rng = np.random.default_rng(3)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)  # it lacks what a model needs, and is not loaded as one
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_tensor("norm", np.arange(5, dtype=np.float32))
    flat = rng.integers(-20, 20, (33, 64)).astype(np.int8)
    experts = rng.integers(-8, 8, (n_experts, 40, 96)).astype(np.int8)
    for name, kind, q in (("flat", EntropyType.EQ8, flat), ("experts", EntropyType.EQ4, experts)):
        payload = codec.encode(kind, q, np.float16([0.5]), name=name).payload
        writer.add_tensor(name, payload, raw_shape=q.shape, raw_dtype=gguf.GGMLQuantizationType[kind.name])
    if tail:
        writer.add_tensor("tail", np.arange(7, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return flat, experts


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("alignment", [None, 32, 256])
def test_gguf_py_round_trip(tmp_path, tail, alignment):
    path = tmp_path / "a.gguf"
    flat, experts = write_gguf(path, tail=tail, alignment=alignment)
    tensors = {t.name: t for t in open_model(path).tensors()}
    assert tensors["flat"].shape == (33, 64) and tensors["experts"].shape == (3, 40, 96)
    for name, q in (("flat", flat), ("experts", experts)):
        entry = tensors[name]
        assert np.array_equal(codec.Payload(entry.kind, entry.data, entry.shape).codes(), q)
        assert entry.n_bytes == entry.data.size
    assert verify_file(path).problems == ()


def test_a_fourth_dimension_of_one(tmp_path):
    """It means nothing to ggml and nothing to us: both readers have one notion of shape."""
    source = tmp_path / "three.gguf"
    write_gguf(source)

    def edit(infos) -> None:
        for one in infos.values():
            one.dims += [1] * (4 - len(one.dims))

    path = rewrite(source, tmp_path / "four.gguf", edit=edit)
    shapes = [{e.name: e.shape for e in open_model(p).tensors() if e.kind} for p in (source, path)]
    assert shapes[0] == shapes[1] == {"flat": (33, 64), "experts": (3, 40, 96)}
    assert verify_file(path).problems == ()
    coded = [[t for t in inspect_file(p).tensors if t.entropy is not None] for p in (source, path)]
    assert coded[0] == coded[1] and len(coded[0]) == 2
    plain = []
    for of in (source, path):
        out = tmp_path / f"plain-{of.name}"
        decode_file(of, out)
        plain.append({t.name: bytes(t.data) for t in open_model(out).tensors()})
    assert plain[0] == plain[1]

    experts = next(e for e in open_model(path).tensors() if e.name == "experts")
    data, slab_size = bytearray(path.read_bytes()), codec.read_header(experts.kind, experts.data, experts.shape).slab_size
    data[int(experts.reader_tensor.data_offset) + slab_size + 400] ^= 16  # in the second slab
    path.write_bytes(data)
    assert "experts" in verify_file(path).problems[0]


@pytest.mark.parametrize("name, recipe", [("qwen2_moe", "EQ8-mixed"), ("mistral", "EQ8-paper"), ("mistral", "EQ4-mixed")])
def test_gguf_py_dequantizes(converted, name, recipe):
    """Exactly scale * q + offset, in the tensor's shape."""
    import gguf

    for entry in open_model(converted(name, recipe)).tensors():
        if entry.kind is None:
            continue
        payload = codec.Payload(entry.kind, entry.data, entry.shape)
        codes = payload.codes().reshape(-1, *entry.shape[-2:])
        scales, offsets = payload.scales_and_offsets()
        expected = codes * scales[..., None].astype(np.float32) + (0 if offsets is None else offsets[..., None])
        found = gguf.quants.dequantize(entry.data, gguf.GGMLQuantizationType[entry.type_name])
        assert found.shape == entry.shape and found.dtype == np.float32
        assert np.allclose(found, expected.reshape(entry.shape), rtol=1e-6, atol=0), entry.name


def test_gguf_py_dequantizes_no_damaged_data(converted):
    import gguf

    entry = next(t for t in open_model(converted("mistral", "EQ8-mixed")).tensors() if t.kind)
    damaged = np.array(entry.data)
    damaged[96] = 77  # raw bits of the code
    for data, reason in ((damaged, "code parameters"), (entry.data[:-1], "shorter"), (entry.data[:99], "shorter")):
        with pytest.raises(ValueError, match=reason):
            gguf.quants.dequantize(data, gguf.GGMLQuantizationType.EQ8)


def test_transformers_reads_our_files(converted, tiny_model):
    import torch
    from transformers import AutoModelForCausalLM

    path = converted("mistral", "EQ8-mixed")
    ours = dict(AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name).named_parameters())
    theirs = dict(AutoModelForCausalLM.from_pretrained(tiny_model("mistral").folder, dtype=torch.float32).named_parameters())
    assert ours.keys() == theirs.keys()
    for name, weights in theirs.items():
        error = (ours[name] - weights).square().mean() / weights.square().mean()
        assert error < 1e-2, (name, error)


def test_gguf_dump(tmp_path):
    path = tmp_path / "a.gguf"
    write_gguf(path)
    command = [sys.executable, "-m", "gguf.scripts.gguf_dump", "--json", str(path)]
    tensors = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)["tensors"]
    assert tensors["flat"]["type"] == "EQ8" and tensors["flat"]["shape"] == [64, 33]
    assert tensors["experts"]["type"] == "EQ4" and tensors["experts"]["shape"] == [96, 40, 3]
    text = subprocess.run([sys.executable, "-m", "gguf.scripts.gguf_dump", str(path)], capture_output=True, text=True, check=True).stdout
    assert "EQ8" in text


def test_split_and_merge_keep_payloads(converted, tmp_path):
    source = converted("qwen2_moe", "EQ8-mixed")
    split = runtime.tool("llama-gguf-split")
    subprocess.run([split, "--split", "--split-max-tensors", "9", source, tmp_path / "part"], check=True, capture_output=True)
    parts = sorted(tmp_path.glob("part-*.gguf"))
    assert len(parts) > 2
    subprocess.run([split, "--merge", parts[0], tmp_path / "merged.gguf"], check=True, capture_output=True)
    original = {t.name: bytes(t.data) for t in open_model(source).tensors()}
    assert {t.name: bytes(t.data) for t in open_model(tmp_path / "merged.gguf").tensors()} == original
    assert {t.name: bytes(t.data) for t in open_model(parts[0]).tensors()} == original  # the parts read as one
    assert verify_file(parts[0]).problems == ()
    expected = logits(source)
    assert np.array_equal(logits(parts[0]), expected)
    assert np.array_equal(logits(tmp_path / "merged.gguf"), expected)
    with pytest.raises(FormatError, match="first part"):
        open_model(parts[1])


@pytest.mark.parametrize("change", [{"split.no": 2}, {"split.no": None}, {"split.count": 2}, {"name": "other"}, {"name": "first"}])
def test_parts_of_another_split(tmp_path, change):
    import gguf

    def write(number: int, name: str, **changes) -> None:
        writer = gguf.GGUFWriter(tmp_path / f"m-{number:05}-of-00003.gguf", "llama")
        for key, value in {"split.no": number - 1, "split.count": 3, "split.tensors.count": 3, **changes}.items():
            if value is not None:
                writer.add_uint16(key, value)
        writer.add_tensor(name, np.zeros(4, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    for number, name in enumerate(("first", "second", "third"), start=1):
        write(number, name)
    path = tmp_path / "m-00001-of-00003.gguf"
    assert verify_file(path).n_tensors == 3
    write(2, **{"name": "second", **change})
    if change == {"name": "other"}:  # a part that could be the right one
        assert verify_file(path).n_tensors == 3
        write(1, "first", **{"split.tensors.count": 4})
    with pytest.raises(FormatError, match=r"m-0000[12]-of-00003\.gguf: .*(is another part than its name says|do not belong together)"):
        verify_file(path)


def test_a_full_disk_names_the_output(tmp_path):
    source, out = tmp_path / "a.gguf", tmp_path / "out.gguf"
    write_gguf(source)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(ConversionError, match=r"out\.gguf: no space left"):
            decode_file(source, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not out.exists() and not list(tmp_path.glob(".*"))


def test_every_cut_is_reported(tmp_path):
    path = tmp_path / "a.gguf"
    write_gguf(path, tail=True)
    whole = path.read_bytes()
    lengths = {*range(0, 600), *range(600, len(whole), 97), *range(len(whole) - 60, len(whole))}
    for n in sorted(lengths):
        path.write_bytes(whole[:n])
        try:
            problems = verify_file(path).problems
        except FormatError as error:
            problems = (str(error),)
        assert problems, n
        assert all("\n" not in p for p in problems)
    path.write_bytes(whole + b"\0")
    assert "too many" in verify_file(path).problems[0]


def test_every_flipped_payload_byte_is_reported(tmp_path):
    path = tmp_path / "a.gguf"
    write_gguf(path, n_experts=2)
    whole = path.read_bytes()
    for entry in [t for t in open_model(path).tensors() if t.kind]:
        start = int(entry.reader_tensor.data_offset)
        for i in range(start, start + entry.n_bytes, 7):
            path.write_bytes(whole[:i] + bytes([whole[i] ^ 0x10]) + whole[i + 1 :])
            try:
                problems = verify_file(path).problems
            except FormatError as error:
                problems = (str(error),)
            assert problems, (entry.name, i - start)


def test_loading_a_damaged_file_is_refused(converted, tmp_path):
    source = converted("mistral", "EQ8-mixed")
    data = bytearray(source.read_bytes())
    entry = next(t for t in open_model(source).tensors() if t.kind)
    data[int(entry.reader_tensor.data_offset) + 96] = 77  # raw bits of the code
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(data)
    with pytest.raises(ToolError, match=r"damaged\.gguf"):
        Chat(damaged)
    bench = subprocess.run([runtime.tool("llama-bench"), "-m", damaged, "-p", "8", "-n", "0"], capture_output=True, text=True)
    assert bench.returncode != 0
    completion = subprocess.run(
        [runtime.tool("llama-completion"), "-m", damaged, "-p", "a", "-n", "1", "-no-cnv"],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert completion.returncode != 0
    assert "impossible code parameters" in completion.stderr and entry.name in completion.stderr


@pytest.mark.parametrize("mode, said", [("", "decoded"), ("fused", "stay as they are")])
def test_the_mode_is_told_by_default(converted, monkeypatch, mode, said):
    """One line, at the tools' own verbosity, on stderr; the other lines of libllama stay hidden."""
    monkeypatch.setenv("GGML_ENTROPY_MODE", mode)
    command = [runtime.tool("llama-completion"), "-m", converted("mistral", "EQ8-mixed"), "-p", "a", "-n", "1", "-no-cnv", "--no-warmup"]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    lines = [line for line in result.stderr.splitlines() if "llama_entropy:" in line]
    assert result.returncode == 0 and len(lines) == 1 and said in lines[0], result.stderr
    assert "llama_entropy" not in result.stdout and "llama_model_loader" not in result.stderr


def test_modes(converted):
    path = converted("mistral", "EQ8-mixed")
    command = [runtime.tool("llama-completion"), "-m", path, "-p", "a", "-n", "1", "-no-cnv", "--no-warmup"]

    def run(mode: str | None, *more: str):
        import os

        environment = {k: v for k, v in os.environ.items() if k != "GGML_ENTROPY_MODE"}
        if mode:
            environment["GGML_ENTROPY_MODE"] = mode
        return subprocess.run(
            [*command, *more], env=environment, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL
        )

    assert run(None).returncode == 0
    assert run("load").returncode == 0
    assert run("fused").returncode == 0
    refused = run("nonsense")
    assert refused.returncode != 0 and "unknown value 'nonsense' of GGML_ENTROPY_MODE: use auto, load or fused" in refused.stderr
    assert run("nonsense", "--override-kv", "entropy.mode=str:load").returncode == 0
    assert run(None, "--override-kv", "entropy.mode=str:nonsense").returncode != 0


def test_llama_quantize_refuses(converted, tmp_path):
    out = tmp_path / "q.gguf"
    result = subprocess.run(
        [runtime.tool("llama-quantize"), converted("mistral", "EQ8-mixed"), out, "Q8_0"], capture_output=True, text=True
    )
    assert result.returncode != 0
    assert "entrollm decode" in result.stderr + result.stdout


def test_llama_export_lora_refuses(converted, tmp_path):
    out = tmp_path / "merged.gguf"
    command = [runtime.tool("llama-export-lora"), "-m", converted("mistral", "EQ8-mixed"), "--lora", tmp_path / "none.gguf", "-o", out]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode != 0 and not out.exists()
    assert "is entropy-coded: decode the file first with `entrollm decode`" in result.stderr + result.stdout


def test_stock_tools_refuse_by_themselves(tmp_path):
    """gguf-py of the pinned source, without our patches, meets our ids with its own words."""
    path = tmp_path / "a.gguf"
    write_gguf(path)
    pin = read_pin()
    stock = tree.unpacked_source(fetch_sdist(pin), pin) / tree.LLAMA_CPP / "gguf-py"
    # isolated: neither the patched package nor PYTHONPATH comes first
    code = f"import sys; sys.path.insert(0, {str(stock)!r}); import gguf; print(gguf.__file__); gguf.GGUFReader({str(path)!r})"
    result = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert result.returncode != 0 and result.stdout.startswith(str(stock))
    # some versions of numpy write np.uint32(500)
    assert re.fullmatch(r"ValueError: .*\b500\b.* is not a valid GGMLQuantizationType", result.stderr.rstrip().splitlines()[-1])


def test_every_way_to_load(converted, tmp_path):
    """The overlay's own test: all load modes, repacking, progress, cancelling, the mode switch;
    logits equal to the plain file's."""
    coded, plain = converted("qwen2", "EQ8-mixed"), tmp_path / "plain.gguf"
    decode_file(coded, plain)
    result = subprocess.run([runtime.tool("test-entropy-equal"), coded, plain, "5e-4"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-1000:]
    assert result.stdout.rstrip().endswith(" passed, 0 failed")


@pytest.mark.parametrize("recipe", ["EQ8-paper", "EQ4-mixed"])
def test_damaged_files_do_not_crash_the_loader(converted, recipe):
    """A sample of what `make test-asan` does in full, without sanitizers."""
    command = [
        runtime.tool("test-entropy-load"),
        converted("mistral", recipe),
        "--stride",
        "211",
        "--truncations",
        "100",
        "--rewrites",
        "100",
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-1000:]
