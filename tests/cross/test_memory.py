# SPDX-License-Identifier: MIT
"""Peak memory of a conversion is bounded by the largest tensor, not by the model."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
from models import _write_spm

LAYERS, WIDTH, INNER, VOCABULARY = 24, 512, 768, 500

# prints resident memory after the imports and the peak of the conversion, in kB
_CONVERT = """
import re, sys
import numpy, safetensors, torch, transformers
from entrollm_gguf.convert import llama_cpp, pipeline
llama_cpp.list_architectures()
status = lambda key: int(re.search(key + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])
open("/proc/self/clear_refs", "w").write("5")  # the peak so far was the imports'
print(status("VmRSS"), status("VmHWM"))
pipeline.convert_model(sys.argv[1], sys.argv[2], recipe="EQ8-paper", threads=2)
print(status("VmHWM"))
"""


def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of a llama checkpoint, some 2M weights a layer."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, WIDTH), "lm_head.weight": (VOCABULARY, WIDTH)}
    found["model.norm.weight"] = (WIDTH,)
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        found |= {f"{layer}self_attn.{part}_proj.weight": (WIDTH, WIDTH) for part in "qkvo"}
        found |= {f"{layer}mlp.{part}_proj.weight": (INNER, WIDTH) for part in ("gate", "up")}
        found[f"{layer}mlp.down_proj.weight"] = (WIDTH, INNER)
        found |= {f"{layer}{part}_layernorm.weight": (WIDTH,) for part in ("input", "post_attention")}
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_of_a_conversion(tmp_path):
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(1)
    folder = tmp_path / "model"
    folder.mkdir()
    sizes = shapes()
    save_file(
        {name: torch.randn(shape, dtype=torch.bfloat16) for name, shape in sizes.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
        "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": VOCABULARY, "max_position_embeddings": 256, "rms_norm_eps": 1e-6,
        "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    _write_spm(folder)
    result = subprocess.run([sys.executable, "-c", _CONVERT, folder, tmp_path / "out.gguf"], capture_output=True, text=True, check=True)
    before, forgotten, peak = (1024 * int(word) for word in result.stdout.split()[-3:])
    assert forgotten < before + 10e6
    model = sum(2 * math.prod(shape) for shape in sizes.values())
    largest = max(2 * math.prod(shape) for shape in sizes.values())
    print(f"model {model / 1e6:.0f} MB, largest tensor {largest / 1e6:.1f} MB, conversion {(peak - before) / 1e6:.0f} MB")
    assert model > 100e6 and (tmp_path / "out.gguf").stat().st_size > 0.3 * model
    assert peak - before < 4 * largest + 1e9
    assert peak - before < 0.6 * model
