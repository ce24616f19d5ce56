# SPDX-License-Identifier: MIT
"""Tiny random models of many architectures, made from transformers' own configurations.

Widths are multiples of 32 but mostly not of 256. Rows are no multiple of 32 in the vocabulary of
500 tokens, and in keys and values of mistral. Tokenizers: a SentencePiece model trained on the
spot, or SmolLM2's byte-level BPE, which llama.cpp's converter recognises.
"""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from entrollm_gguf.eval.demo_model import english_text

_SPM_VOCABULARY = 500
_COMMON = {"num_hidden_layers": 2, "max_position_embeddings": 256, "hidden_act": "silu"}


@dataclass(frozen=True)
class TinyModel:
    """A model folder and what is special about it."""

    name: str
    folder: Path


def _spm_special() -> dict[str, int]:
    return {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


# name -> (config class, model class, tokenizer, arguments)
_SPECS: dict[str, tuple[str, str, str, dict]] = {
    # width 576 = 2 x 256 + 64; 3 key-value heads; 1056 rows in the feed-forward, no multiple of 64
    "llama": (
        "LlamaConfig", "LlamaForCausalLM", "spm",
        {"hidden_size": 576, "intermediate_size": 1024 + 32, "num_attention_heads": 9, "num_key_value_heads": 3},
    ),
    # 48 rows of keys and values, no multiple of 32
    "mistral": (
        "MistralConfig", "MistralForCausalLM", "spm",
        {"hidden_size": 96, "intermediate_size": 224, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 48},
    ),
    # fused qkv and gate/up
    "phi3": (
        "Phi3Config", "Phi3ForCausalLM", "spm",
        {"hidden_size": 128, "intermediate_size": 288, "num_attention_heads": 4, "num_key_value_heads": 4, "sliding_window": 64,
         "original_max_position_embeddings": 256},
    ),
    # biases on q, k, v
    "qwen2": (
        "Qwen2Config", "Qwen2ForCausalLM", "bpe",
        {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False},
    ),
    # 3-D expert tensors, a shared expert
    "qwen2_moe": (
        "Qwen2MoeConfig", "Qwen2MoeForCausalLM", "bpe",
        {"hidden_size": 64, "intermediate_size": 160, "moe_intermediate_size": 96, "shared_expert_intermediate_size": 128,
         "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False},
    ),
    # tied embedding, norms around everything, head_dim apart from the width
    "gemma3": (
        "Gemma3TextConfig", "Gemma3ForCausalLM", "spm",
        {"hidden_size": 96, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
         "sliding_window": 64, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 32},
    ),
}  # fmt: skip

# Not looked at while the code was written: if these work, the next architecture should work as well
# (docs/models.md).
_HELD_OUT: dict[str, tuple[str, str, str, dict]] = {
    # norms of queries and keys
    "qwen3": (
        "Qwen3Config", "Qwen3ForCausalLM", "bpe",
        {"hidden_size": 96, "intermediate_size": 224, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 32,
         "tie_word_embeddings": True},
    ),
    # experts everywhere, none shared
    "mixtral": (
        "MixtralConfig", "MixtralForCausalLM", "spm",
        {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4,
         "num_experts_per_tok": 2},
    ),
    # learned positions, fused qkv with biases, transposed weights, LayerNorm
    "gpt2": (
        "GPT2Config", "GPT2LMHeadModel", "bpe",
        {"n_embd": 96, "n_head": 3, "n_inner": 384, "n_layer": 2, "n_positions": 256, "n_ctx": 256},
    ),
    # biases everywhere, no gate in the feed-forward
    "starcoder2": (
        "Starcoder2Config", "Starcoder2ForCausalLM", "bpe",
        {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_act": "gelu_pytorch_tanh"},
    ),
    # attention and feed-forward side by side, partial rotation, ALiBi-free descendants of GPT-J
    "gpt_neox": (
        "GPTNeoXConfig", "GPTNeoXForCausalLM", "bpe",
        {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 2, "hidden_act": "gelu"},
    ),
    # norms behind the blocks
    "olmo2": (
        "Olmo2Config", "Olmo2ForCausalLM", "bpe",
        {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 2, "num_key_value_heads": 2},
    ),
    # scaled embeddings, residuals and logits
    "granite": (
        "GraniteConfig", "GraniteForCausalLM", "bpe",
        {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 2, "num_key_value_heads": 1, "embedding_multiplier": 12.0,
         "logits_scaling": 8.0, "residual_multiplier": 0.22, "attention_multiplier": 0.0156},
    ),
    # no attention at all: state space, convolutions
    "mamba": (
        "MambaConfig", "MambaForCausalLM", "bpe",
        {"hidden_size": 64, "state_size": 16, "num_hidden_layers": 2, "conv_kernel": 4, "expand": 2},
    ),
}  # fmt: skip

# Only what folding rests on: which tensors read a norm, gates, values (convert/fold.py).
_FOR_FOLDING: dict[str, tuple[str, str, str, dict]] = {
    # norms whose weights are stored less 1, embeddings times the root of the width; tied
    "gemma": (
        "GemmaConfig", "GemmaForCausalLM", "spm",
        {"hidden_size": 96, "intermediate_size": 192, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 32},
    ),
    # the same with norms around everything and soft caps
    "gemma2": (
        "Gemma2Config", "Gemma2ForCausalLM", "spm",
        {"hidden_size": 96, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
         "sliding_window": 64, "query_pre_attn_scalar": 32},
    ),
    # layers without rotation
    "smollm3": (
        "SmolLM3Config", "SmolLM3ForCausalLM", "bpe",
        {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 2, "num_key_value_heads": 1, "no_rope_layers": [1, 0]},
    ),
    # experts behind norms of queries and keys, none shared
    "qwen3_moe": (
        "Qwen3MoeConfig", "Qwen3MoeForCausalLM", "bpe",
        {"hidden_size": 64, "intermediate_size": 160, "moe_intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1,
         "head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2},
    ),
    # experts of plain gates, norms over all queries and all keys
    "olmoe": (
        "OlmoeConfig", "OlmoeForCausalLM", "bpe",
        {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts": 4,
         "num_experts_per_tok": 2},
    ),
}  # fmt: skip

ARCHITECTURES = tuple(_SPECS)
HELD_OUT = tuple(_HELD_OUT)
FOR_FOLDING = tuple(_FOR_FOLDING)


def build_tiny_model(name: str, folder: Path, bpe_source: Path, dtype: str = "bfloat16", seed: int = 7) -> TinyModel:
    """Write a Hugging Face folder with random weights.

    Args:
        bpe_source: folder with SmolLM2's tokenizer.
    """
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    config_name, class_name, tokenizer, arguments = (_SPECS | _HELD_OUT | _FOR_FOLDING)[name]
    arguments = {**_COMMON, **arguments}
    if tokenizer == "spm":
        arguments |= {"vocab_size": _SPM_VOCABULARY, **_spm_special()}
    else:
        arguments |= {"vocab_size": 49152, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    config = getattr(transformers, config_name)(**arguments)
    torch.manual_seed(seed)
    model = getattr(transformers, class_name)(config)
    apart = torch.Generator().manual_seed(seed)  # a generator of its own, so that the matrices stay what they are
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                # norms lie around the value that means 1 (0 in Gemma), biases around 0
                parameter.add_(torch.randn(parameter.shape, generator=apart), alpha=0.2)
            else:
                # heavier tails than a fresh initialisation: as in trained models, the largest
                # weight is many times the typical one. Not so for the vocabulary: with 4 bits over
                # the range of millions of such values, most tokens would be all zeros
                is_vocabulary = parameter.shape[0] == config.vocab_size
                noise = torch.distributions.Normal(0.0, 1.0) if is_vocabulary else torch.distributions.StudentT(4.0)
                parameter.copy_(noise.sample(parameter.shape) * 0.6 / parameter.shape[-1] ** 0.5)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    if tokenizer == "spm":
        _write_spm(folder)
    else:
        for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            shutil.copy(bpe_source / file, folder / file)
    return TinyModel(name, folder)


def _write_spm(folder: Path) -> None:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(english_text().splitlines()[:4000]),
        model_writer=model,
        vocab_size=_SPM_VOCABULARY,
        model_type="bpe",
        byte_fallback=True,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        user_defined_symbols=["<|endoftext|>"],  # llama.cpp looks it up in models named phi3
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, **tokens}))
