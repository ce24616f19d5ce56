# SPDX-License-Identifier: MIT
"""Gemma 3n: the converter class hands over its tables already evaluated, and half of its weights
are an embedding that is read row by row."""

from __future__ import annotations

import numpy as np
import pytest
from models import _write_spm
from running import logits

from entrollm_gguf.convert.pipeline import convert_model


@pytest.fixture(scope="module")
def gemma3n(tmp_path_factory):
    """A tiny model, f32."""
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("gemma3n")
    config = transformers.Gemma3nTextConfig(
        vocab_size=500, vocab_size_per_layer_input=500, bos_token_id=1, eos_token_id=2, pad_token_id=0, hidden_size=96, intermediate_size=192,
        num_hidden_layers=5, num_attention_heads=3, num_key_value_heads=1, head_dim=32, hidden_size_per_layer_input=256, laurel_rank=64,
        num_kv_shared_layers=0, sliding_window=64, activation_sparsity_pattern=None, max_position_embeddings=256,
        layer_types=["sliding_attention"] * 4 + ["full_attention"],
    )  # fmt: skip
    torch.manual_seed(1)
    transformers.Gemma3nForCausalLM(config).save_pretrained(folder)
    _write_spm(folder)
    # transformers writes a name that neither it nor llama.cpp reads
    path = folder / "model.safetensors"
    tensors = {
        name.replace("per_layer_model.language_model_projection", "per_layer_model_projection"): w for name, w in load_file(path).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def test_tables(gemma3n, tmp_path):
    report = convert_model(gemma3n, tmp_path / "out.gguf", recipe="EQ8-rows")
    types = {t.name: t.type_name for t in report.tensors}
    assert types["per_layer_token_embd.weight"] == "Q8_0" and types["token_embd.weight"] == "EQ8"
    assert {t.type_name for t in report.tensors if t.scheme.startswith("kept: not quantized by llama.cpp")} <= {"F16", "F32"}
    assert not [t.name for t in report.tensors if t.type_name == "BF16"]  # a rounding of this f32 checkpoint that nobody asked for
    assert np.isfinite(logits(tmp_path / "out.gguf")).all()
