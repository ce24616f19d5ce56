# SPDX-License-Identifier: MIT
"""Every architecture converts, its file is sound, and in load mode it gives the logits of the
decoded-back plain file."""

from __future__ import annotations

import numpy as np
import pytest
from models import ARCHITECTURES
from running import logits

from entrollm_gguf.inspect.decode import decode_file
from entrollm_gguf.inspect.report import inspect_file
from entrollm_gguf.inspect.verify import verify_file

# EQ8-paper: F16 with offset; EQ8-mixed: Q8_0 or F16; EQ8-rows: Q8_0; EQ4-paper: Q4_1; EQ4-mixed:
# Q4_0 or Q4_1; EQ4-rows: Q4_0
RECIPES = ("EQ8-paper", "EQ8-mixed", "EQ8-rows", "EQ4-paper", "EQ4-mixed", "EQ4-rows")


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_load_mode_equals_the_decoded_file(converted, tmp_path, name, recipe):
    path = converted(name, recipe)
    assert verify_file(path).problems == ()
    plain = tmp_path / "plain.gguf"
    report = decode_file(path, plain)
    assert report.types
    ours, decoded = logits(path), logits(plain)
    assert np.isfinite(ours).all() and ours.std() > 0
    assert np.array_equal(ours, decoded)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_without_mmap_the_same(converted, name):
    path = converted(name, "EQ8-mixed")
    assert np.array_equal(logits(path), logits(path, use_mmap=False))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_matrices_are_coded(converted, name):
    report = inspect_file(converted(name, "EQ8-mixed"))
    for tensor in report.tensors:
        wanted = len(tensor.shape) >= 2 and "ffn_gate_inp" not in tensor.name
        assert (tensor.type == "EQ8") == wanted, tensor
    if name == "mistral":
        assert any(t.type == "EQ8" and t.shape[-2] % 32 and "attn_k" in t.name for t in report.tensors)
    if name == "qwen2_moe":
        assert any(len(t.shape) == 3 and t.type == "EQ8" for t in report.tensors)
    if name == "gemma3":  # tied
        assert not any(t.name == "output.weight" for t in report.tensors)


def test_close_to_the_float_model(converted, tiny_model):
    """8 bits with one scale per tensor: the conversion did not permute or transpose anything."""
    import torch
    import transformers
    from running import TOKENS

    for name in ("llama", "qwen2", "qwen2_moe", "gemma3"):
        folder = tiny_model(name).folder
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.inference_mode():
            reference = model(torch.tensor([TOKENS])).logits[0].numpy()
        ours = logits(converted(name, "EQ8-mixed"))[:, : reference.shape[1]]
        correlation = np.corrcoef(reference.ravel(), ours.ravel())[0, 1]
        assert correlation > 0.97, (name, correlation)
