# SPDX-License-Identifier: MIT
"""A llama of random weights, about 1.07 G of them, as a Hugging Face folder: for measurements where
no model of that size can be had.

Shapes are TinyLlama's (22 layers, 2048 wide), vocabulary and tokenizer SmolLM2's. Rows are
Gaussian, each with a deviation of its own (log-normal), and one row in 200 has weights of six times
that with heavy tails: about what quantizers meet in real matrices. The output of such a model means
nothing.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

N_LAYERS, N_EMBD, N_FF, N_HEADS, N_KV_HEADS = 22, 2048, 5632, 32, 4
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def matrix(generator: np.random.Generator, n_rows: int, n_cols: int) -> np.ndarray:
    """Weights f32 (n_rows, n_cols)."""
    deviation = 0.02 * np.exp(0.25 * generator.standard_normal((n_rows, 1), np.float32))
    weights = deviation * generator.standard_normal((n_rows, n_cols), np.float32)
    outliers = generator.random(n_rows) < 1 / 200
    weights[outliers] = 6 * deviation[outliers] * generator.standard_t(4, (int(outliers.sum()), n_cols)).astype(np.float32)
    return weights


def build_llama(folder: Path, tokenizer_from: Path) -> None:
    """Write the model (bf16), a shard for each layer.

    Args:
        folder: made; must not exist.
        tokenizer_from: a Hugging Face folder whose tokenizer is copied.
    """
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    for name in _TOKENIZER:
        if (tokenizer_from / name).is_file():
            shutil.copy(tokenizer_from / name, folder)
    config = json.loads((tokenizer_from / "config.json").read_text())
    config.update(
        architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=N_EMBD, intermediate_size=N_FF, num_hidden_layers=N_LAYERS,
        num_attention_heads=N_HEADS, num_key_value_heads=N_KV_HEADS, head_dim=N_EMBD // N_HEADS, tie_word_embeddings=True,
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2))

    generator = np.random.default_rng(0)
    n_kv = N_EMBD // N_HEADS * N_KV_HEADS
    shapes = {
        "self_attn.q_proj": (N_EMBD, N_EMBD),
        "self_attn.k_proj": (n_kv, N_EMBD),
        "self_attn.v_proj": (n_kv, N_EMBD),
        "self_attn.o_proj": (N_EMBD, N_EMBD),
        "mlp.gate_proj": (N_FF, N_EMBD),
        "mlp.up_proj": (N_FF, N_EMBD),
        "mlp.down_proj": (N_EMBD, N_FF),
    }

    def random(n_rows: int, n_cols: int) -> torch.Tensor:
        return torch.from_numpy(matrix(generator, n_rows, n_cols)).to(torch.bfloat16)

    ones = torch.ones(N_EMBD, dtype=torch.bfloat16)
    places: dict[str, str] = {}
    for i in range(N_LAYERS + 1):
        if i < N_LAYERS:
            prefix = f"model.layers.{i}."
            tensors = {f"{prefix}{name}.weight": random(*shape) for name, shape in shapes.items()}
            tensors |= {f"{prefix}{name}.weight": ones.clone() for name in ("input_layernorm", "post_attention_layernorm")}
        else:
            tensors = {"model.embed_tokens.weight": random(config["vocab_size"], N_EMBD), "model.norm.weight": ones}
        file = f"model-{i + 1:05}-of-{N_LAYERS + 1:05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
