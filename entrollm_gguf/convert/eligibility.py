# SPDX-License-Identifier: MIT
"""Which tensors stay in a stock type, and why. What llama.cpp's converter would leave in F32 never
comes here."""

from __future__ import annotations

from entrollm_gguf.codec import MIN_COLS, shape_is_valid

# Matrices that llama-quantize leaves alone (tensor_allows_quantization in src/llama-quant.cpp), by
# a part of their name. The converter classes keep most of them in F32 already; these are the ones
# they would write as F16 or BF16.
_NOT_QUANTIZED = (
    "_norm.weight",
    "ffn_gate_inp.weight",
    "altup",
    "laurel",
    "per_layer_model_proj",
    "position_embd",
    "token_types",
    "ssm_conv1d",
    "shortconv.conv",
    "indexer.",
    "time_mix_first",
    "time_mix_lerp",
    "time_mix_decay",
    *(f"time_mix_{part}" for part in ("w0", "w1", "w2", "v0", "v1", "v2", "a0", "a1", "a2", "g1", "g2")),
    "attn_rel_b",
    "patch_embd",
    "patch_merger",
    "codebook",
    "code_embd",
)

# Weights that llama.cpp views, reshapes or reads row by row from disk. That needs a stock layout,
# even for matrices.
_VIEWED = {
    "attn_k_b.weight": "viewed by multi-head latent attention",
    "attn_v_b.weight": "viewed by multi-head latent attention",
    "attn_output_a.weight": "reshaped at load",
    "per_layer_token_embd": "read row by row from disk",
}

# The same, where blocks of quantized weights would not work either.
_VIEWED_AS_FLOATS = {
    "ple_conv1d": "viewed as a convolution",
    "indexer_compressor_ape": "added by elements",
    "ple_norm_": "reshaped at load",
    "hc_": "reshaped at load",
}


def reason_to_keep(name: str, shape: tuple[int, ...]) -> str | None:
    """Why a tensor is not entropy-coded, or None if it is.

    Args:
        name: GGUF name, e.g. "blk.0.attn_q.weight".
        shape: true shape in numpy order.
    """
    if len(shape) not in (2, 3):
        return f"{len(shape)} dimensions"
    for part, why in (_VIEWED | _VIEWED_AS_FLOATS).items():
        if part in name:
            return why
    if not name.endswith(".weight") or any(part in name for part in _NOT_QUANTIZED):
        return "not quantized by llama.cpp either"
    if shape[-1] % MIN_COLS != 0:
        return f"{shape[-1]} columns are no multiple of {MIN_COLS}"
    if shape[-2] == 1:
        return "a single row"
    if not shape_is_valid(shape):
        return "outside the limits of the format"
    return None


def can_be_q8_0(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor that is not entropy-coded can be quantized all the same, as llama-quantize
    does.

    Args:
        name, shape: as for `reason_to_keep`.
    """
    return any(part in name for part in _VIEWED) and len(shape) in (2, 3) and shape[-1] % MIN_COLS == 0
