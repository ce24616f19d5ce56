# SPDX-License-Identifier: MIT
"""What llama.cpp's loader refuses, each with one line; and numbers that stand for no type."""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from handmade import recode, write_bert, write_gemma4_experts, write_rwkv6
from running import TOKENS, Trial, log_lines, logits, outcomes, refusal_of_level

from entrollm_gguf import runtime
from entrollm_gguf.codec import EntropyType
from entrollm_gguf.codec import c as codec_c
from entrollm_gguf.gguf_io.reader import open_model
from entrollm_gguf.inspect.decode import decode_file
from entrollm_gguf.inspect.verify import verify_file

FIRST_GAP, EQ8, TYPE_COUNT = 43, 500, 503  # of enum ggml_type: behind upstream's last type; ours; the count
HEADER_OFFSET = 40  # of a slab: the offset of all weights


def refusal(path: Path, monkeypatch, mode: str = "load", mmap: bool = True, progress=None) -> str | None:
    """Load a model: the reason for which it is refused, or None. progress: called with what is done
    before each tensor is loaded."""
    import llama_cpp

    monkeypatch.setenv("GGML_ENTROPY_MODE", mode)
    params = llama_cpp.llama_model_default_params()
    if progress:
        params.progress_callback = llama_cpp.llama_progress_callback(lambda done, _: progress(done) is not False)
    params.load_mode = llama_cpp.LLAMA_LOAD_MODE_MMAP if mmap else llama_cpp.LLAMA_LOAD_MODE_NONE
    params.n_gpu_layers = 0
    with log_lines() as lines:
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    if model:
        llama_cpp.llama_model_free(model)
        return None
    return next(line.partition("error loading model: ")[2] for line in lines if "error loading model: " in line)


# ---- numbers of types ----------------------------------------------------------------------------


def test_functions_of_ggml_take_every_number_below_the_count():
    lib = codec_c.library()
    lib.ggml_row_size.restype, lib.ggml_row_size.argtypes = ctypes.c_size_t, (ctypes.c_int, ctypes.c_int64)
    lib.ggml_blck_size.restype = ctypes.c_int64
    lib.ggml_type_size.restype = ctypes.c_size_t
    lib.ggml_type_sizef.restype = ctypes.c_double
    lib.ggml_type_name.restype = ctypes.c_char_p
    lib.ggml_is_quantized.restype = lib.ggml_quantize_requires_imatrix.restype = lib.ggml_validate_row_data.restype = ctypes.c_bool
    lib.ggml_validate_row_data.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_quantize_chunk.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p)
    floats, out = np.ones(256, np.float32), np.empty(1024, np.uint8)
    for number in range(TYPE_COUNT):
        name, block = lib.ggml_type_name(number), lib.ggml_blck_size(number)
        lib.ggml_type_sizef(number)
        lib.ggml_is_quantized(number)
        lib.ggml_quantize_requires_imatrix(number)
        is_ours = name in (b"eq8", b"eq4", b"ebf16")
        assert (name is None) == (number >= FIRST_GAP and not is_ours)
        assert (lib.ggml_row_size(number, 256) > 0) == (lib.ggml_type_size(number) > 0) == (block > 0)
        if block == 0:
            assert not lib.ggml_validate_row_data(number, out.ctypes.data, 0)
        if block == 0 or is_ours:
            assert lib.ggml_quantize_chunk(number, floats.ctypes.data, out.ctypes.data, 0, 1, 256, None) == 0


def test_cache_types_that_are_none(converted):
    """Every number gives a context, or none and a line. Upstream's own types in which floats can be
    stored give one."""
    import llama_cpp

    model = llama_cpp.llama_model_load_from_file(str(converted("llama", "EQ8-rows")).encode(), llama_cpp.llama_model_default_params())
    taken: dict[str, set[int]] = {"type_k": set(), "type_v": set()}
    with log_lines() as lines:
        for key, numbers in taken.items():
            for number in (-1, *range(TYPE_COUNT + 8)):
                params = llama_cpp.llama_context_default_params()
                params.n_ctx = params.n_batch = params.n_ubatch = 32
                setattr(params, key, number)
                lines.clear()
                context = llama_cpp.llama_init_from_model(model, params)
                if context:
                    numbers.add(number)
                    llama_cpp.llama_free(context)
                elif number >= FIRST_GAP:
                    assert any(f"type {number} cannot be a type of the KV cache" in line for line in lines)
    llama_cpp.llama_model_free(model)
    names = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "IQ4_NL", "Q5_0", "Q5_1")  # kv_cache_types of common/arg.cpp
    for numbers in taken.values():
        assert {gguf.GGMLQuantizationType[name].value for name in names} <= numbers
        assert max(numbers) < FIRST_GAP


def test_quantizing_to_a_number_that_is_no_type(converted, tmp_path):
    import llama_cpp

    source = tmp_path / "plain.gguf"
    decode_file(converted("llama", "EQ8-rows"), source)
    for number in (FIRST_GAP + 4, EQ8):
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.token_embedding_type, params.allow_requantize = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, number, True
        with log_lines() as lines:
            assert llama_cpp.llama_model_quantize(str(source).encode(), str(tmp_path / "q.gguf").encode(), params) != 0
        assert any("token_embd.weight" in line for line in lines if "failed to quantize" in line)


# ---- weights beyond f16 --------------------------------------------------------------------------


def shift_one(source: Path, out: Path, offset: float) -> str:
    """A copy in which all weights of the first matrix with an offset are moved; returns its
    name."""
    data = bytearray(source.read_bytes())
    for entry in open_model(source).tensors():
        at = int(entry.reader_tensor.data_offset)
        if entry.kind is EntropyType.EQ8 and entry.name.startswith("blk.") and data[at + 37] == 1:  # offset_mode
            struct.pack_into("<f", data, at + HEADER_OFFSET, offset)
            out.write_bytes(data)
            return entry.name
    raise AssertionError("no matrix with an offset")


@pytest.mark.parametrize("offset, fits", [(65000.0, True), (-65000.0, True), (65600.0, False), (-70000.0, False), (1e30, False)])
def test_weights_beyond_f16_are_not_decoded_to_it(converted, tmp_path, monkeypatch, offset, fits):
    path = tmp_path / "large.gguf"
    name = shift_one(converted("mistral", "EQ8-paper"), path, offset)
    for mmap in (True, False):
        reason = refusal(path, monkeypatch, "load", mmap)
        assert (reason is None) == fits
        assert fits or (f"tensor '{name}' of type eq8 has weights beyond the range of F16" in reason and "use mode fused" in reason)
    assert refusal(path, monkeypatch, "fused") is None
    if offset < 1e6:  # the products of larger ones leave the range of f32
        assert np.isfinite(logits(path, kv_overrides={"entropy.mode": "fused"})).all()


# ---- tensors that cannot be coded ----------------------------------------------------------------


@pytest.mark.parametrize("mode", ["load", "fused"])
@pytest.mark.parametrize("name", ["blk.1.attn_norm.weight", "output_norm.weight"])
def test_a_vector_that_is_coded_is_refused(converted, tmp_path, monkeypatch, name, mode):
    path = recode(converted("mistral", "EQ8-rows"), tmp_path / "vector.gguf", recoded=(name,))
    reason = refusal(path, monkeypatch, mode)
    assert reason == (
        f"tensor '{name}' is entropy-coded, but to this model it is no weight of a matrix product and no table of rows: convert the file again"
    )


@pytest.mark.parametrize("mode", ["load", "fused"])
def test_a_table_that_is_viewed_and_added_is_refused(tmp_path, monkeypatch, mode):
    plain = write_bert(tmp_path / "plain.gguf")
    assert refusal(plain, monkeypatch, mode) is None
    fine = recode(plain, tmp_path / "fine.gguf", recoded=("position_embd.weight", "blk.0.ffn_up.weight"))
    assert refusal(fine, monkeypatch, mode) is None
    viewed = recode(plain, tmp_path / "viewed.gguf", recoded=("token_types.weight",))
    assert "tensor 'token_types.weight' is entropy-coded" in refusal(viewed, monkeypatch, mode)


def test_scales_that_are_coded_are_refused(tmp_path):
    """They bear the name of the matrix beside them."""
    plain = write_gemma4_experts(tmp_path / "plain.gguf")
    names = ("blk.0.ffn_gate_inp.scale", "blk.1.ffn_down_exps.scale")
    paths = [recode(plain, tmp_path / f"{name}.gguf", (name,)) for name in names]
    assert outcomes([Trial(plain)])[0].refusal is None
    for mode in ("load", "fused"):
        for name, found in zip(names, outcomes([Trial(path, mode) for path in paths]), strict=True):
            assert f"tensor '{name}' is entropy-coded" in (found.refusal or "")


# ---- integers ------------------------------------------------------------------------------------


def test_integers_in_place_of_weights(tmp_path):
    """Of a norm, a bias, what is multiplied by elements, a matrix and a table of rows: refused
    before any op meets them."""
    plain = write_rwkv6(tmp_path / "plain.gguf")
    shapes = {t.name: t.data.shape for t in gguf.GGUFReader(plain).tensors}
    names = (
        "output_norm.weight",
        "blk.0.attn_norm.bias",
        "blk.1.time_mix_lerp_x.weight",
        "blk.1.channel_mix_key.weight",
        "token_embd.weight",
    )
    types = {np.int8: "i8", np.int16: "i16", np.int32: "i32", np.int64: "i64", np.float64: "f64"}
    made = {
        f"tensor '{name}' is of type {type_name}, which cannot be used there": recode(
            plain, tmp_path / f"{name}-{type_name}.gguf", replaced={name: np.ones(shapes[name], dtype)}
        )
        for name in names
        for dtype, type_name in types.items()
    }
    for reason, found in zip(made, outcomes([Trial(path) for path in made.values()]), strict=True):
        assert reason in (found.refusal or "")
    reason, path = next(iter(made.items()))
    assert reason in verify_file(path).problems[0]


@pytest.mark.parametrize("type_name", ["F16", "BF16", "Q8_0"])
def test_stock_types_in_place_of_norms_and_biases(tmp_path, type_name):
    """The CPU adds and multiplies f32 alone: refused before any op meets them."""
    plain = write_rwkv6(tmp_path / "plain.gguf")
    names = ("output_norm.weight", "blk.0.attn_norm.bias", "blk.1.time_mix_lerp_x.weight")
    stock = gguf.GGMLQuantizationType[type_name]
    paths = [recode(plain, tmp_path / f"{name}.gguf", retyped={name: stock}) for name in names]
    for name, path, found in zip(names, paths, outcomes([Trial(path) for path in paths]), strict=True):
        assert f"failed to find a compatible buffer type for tensor {name}" in (found.refusal or "")
        assert name in verify_file(path).problems[0]


# ---- alignment -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["load", "fused"])
def test_an_alignment_that_cannot_be_mapped(converted, tmp_path, monkeypatch, mode):
    source = converted("mistral", "EQ8-mixed")
    path = recode(source, tmp_path / "aligned.gguf", alignment=8)
    assert refusal(path, monkeypatch, mode, mmap=True).startswith(
        "general.alignment is below 32, which mapping the file needs: use --load-mode none"
    )
    assert refusal(path, monkeypatch, mode, mmap=False) is None
    override = {"entropy.mode": mode}
    assert np.array_equal(logits(path, TOKENS, kv_overrides=override, use_mmap=False), logits(source, TOKENS, kv_overrides=override))


# ---- switches in the environment -----------------------------------------------------------------


def refused_switch(path: Path, **environment: str) -> str:
    """What llama-completion says of a model that it refuses. A process of its own: some switches
    are read once."""
    command = [runtime.tool("llama-completion"), "-m", path, "-p", "a", "-n", "1", "-no-cnv", "--no-warmup"]
    result = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL
    )
    assert result.returncode == 1, (result.returncode, result.stderr)  # an error, no signal
    return result.stderr


@pytest.mark.parametrize("mode", ["load", "fused"])
def test_a_kernel_level_that_is_none(converted, mode):
    said = refused_switch(converted("mistral", "EQ8-rows"), GGML_ENTROPY_MODE=mode, GGML_ENTROPY_KERNEL="avx3")
    assert f"error loading model: {refusal_of_level('avx3')}\n" in said


@pytest.mark.parametrize(
    "name, value, allowed",
    [
        ("GGML_ENTROPY_MODE", "fuse", "auto, load or fused"),
        ("GGML_ENTROPY_MODE", "LOAD", "auto, load or fused"),
        ("GGML_ENTROPY_MEMORY_MIB", "4G", "a number of MiB"),
        ("GGML_ENTROPY_MEMORY_MIB", "-1", "a number of MiB"),
        ("GGML_ENTROPY_MEMORY_MIB", "nan", "a number of MiB"),
        ("GGML_ENTROPY_PRODUCTS", "theirs", "own or stock"),
    ],
)
def test_a_value_that_the_switch_does_not_know(converted, name, value, allowed):
    said = refused_switch(converted("mistral", "EQ8-rows"), **{name: value})
    assert f"error loading model: unknown value '{value}' of {name}: use {allowed}\n" in said


def test_an_empty_switch_is_the_default(converted, monkeypatch):
    monkeypatch.setenv("GGML_ENTROPY_MEMORY_MIB", "")
    assert refusal(converted("mistral", "EQ8-rows"), monkeypatch, mode="") is None


# ---- files that change ---------------------------------------------------------------------------


def first_coded(path: Path) -> tuple[str, int]:
    """Name and place of the first payload in the file."""
    coded = [entry for entry in open_model(path).tensors() if entry.kind is not None]
    entry = min(coded, key=lambda entry: entry.reader_tensor.data_offset)
    return entry.name, int(entry.reader_tensor.data_offset)


def damage_head(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(b"gone")  # where the magic number was


@pytest.mark.parametrize("mode", ["load", "fused"])
def test_a_file_that_changes_while_it_is_loaded(converted, tmp_path, monkeypatch, mode):
    path = tmp_path / "changing.gguf"
    path.write_bytes(converted("mistral", "EQ8-rows").read_bytes())
    name, at = first_coded(path)
    reason = refusal(path, monkeypatch, mode, progress=lambda done: damage_head(path, at))
    assert reason == f"tensor '{name}' of type eq8: the file was changed while it was loaded: load it again"


USE_AFTER_CHANGE = """
import sys
from llama_cpp import Llama
path, at = sys.argv[1], int(sys.argv[2])
model = Llama(path, n_ctx=32, n_batch=32, verbose=False, kv_overrides={"entropy.mode": "fused"})
model.eval([1, 2])
with open(path, "r+b") as file:
    file.seek(at)
    file.write(b"gone")
print("changed", flush=True)
model.eval([3, 4])
"""


def test_a_file_that_changes_under_a_running_model(converted, tmp_path):
    path = tmp_path / "changing.gguf"
    path.write_bytes(converted("mistral", "EQ8-rows").read_bytes())
    name, at = first_coded(path)
    result = subprocess.run(
        [sys.executable, "-c", USE_AFTER_CHANGE, path, str(at)],
        env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        capture_output=True,
        text=True,
        errors="replace",
    )
    assert result.stdout == "changed\n" and result.returncode == -signal.SIGABRT
    assert (
        f"tensor '{name}' of type eq8: no entropy-coded data (wrong magic): "
        "the file was changed after the model was loaded: load it again\n"
    ) in result.stderr
