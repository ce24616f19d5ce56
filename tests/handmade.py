# SPDX-License-Identifier: MIT
"""Tiny models written tensor by tensor, without a checkpoint: architectures whose graphs do odd
things with weights, and files that no converter makes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np

from entrollm_gguf import codec
from entrollm_gguf.codec import EntropyType
from entrollm_gguf.quant.lossless import quantize_lossless

N_VOCAB = 128
Shapes = dict[str, tuple[int, ...]]


def coded(array: np.ndarray, name: str, kind: EntropyType = EntropyType.EQ8) -> np.ndarray:
    """Payload of a float matrix, vector or stack of matrices as EQ8, coarsely, or cut to EBF16."""
    shape = array.shape if array.ndim == 3 else (-1, array.shape[-1])
    if kind is EntropyType.EBF16:
        cut = (array.reshape(shape).view(np.uint32) & 0xFFFF0000).view(np.float32)
        made = quantize_lossless(cut, kind)
        return codec.encode(kind, made.codes, made.scales, rests=made.rests, name=name).payload
    scale = np.float16(np.abs(array).max() / 100)
    codes = np.rint(array.reshape(shape) / np.float32(scale)).astype(np.int8)
    return codec.encode(EntropyType.EQ8, codes, np.array([scale]), name=name).payload


def recode(
    source: Path,
    out: Path,
    recoded: tuple[str, ...] = (),
    alignment: int | None = None,
    replaced: dict[str, np.ndarray] | None = None,
    kind: EntropyType = EntropyType.EQ8,
    retyped: dict[str, gguf.GGMLQuantizationType] | None = None,
) -> Path:
    """A copy of a GGUF file with some F32 tensors coded, or with another alignment: with one, the
    data begins 8 bytes behind a multiple of 32.

    Args:
        kind: of those that are coded.
        replaced: other data, of any type that GGUF has for numpy's.
        retyped: stock types for F32 tensors.
    """
    reader = gguf.GGUFReader(source)
    for n_padding in range(0, 256 if alignment else 1, 8):
        writer = gguf.GGUFWriter(out, reader.get_field("general.architecture").contents())
        for field in reader.fields.values():
            if not field.name.startswith(("GGUF.", "general.architecture", "general.alignment")):
                value_type = field.types[0]
                item_type = field.types[-1] if value_type == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(field.name, field.contents(), value_type, item_type)
        if alignment:
            writer.add_custom_alignment(alignment)
            writer.add_string("test.padding", " " * n_padding)
        for tensor in reader.tensors:
            if tensor.name in recoded:
                payload = coded(tensor.data, tensor.name, kind)
                writer.add_tensor(tensor.name, payload, raw_shape=tensor.data.shape, raw_dtype=gguf.GGMLQuantizationType[kind.name])
            elif replaced and tensor.name in replaced:
                writer.add_tensor(tensor.name, replaced[tensor.name])
            elif retyped and tensor.name in retyped:
                data = gguf.quants.quantize(tensor.data, retyped[tensor.name])
                writer.add_tensor(tensor.name, data, raw_dtype=retyped[tensor.name])
            else:
                writer.add_tensor(tensor.name, tensor.data, raw_shape=tensor.raw_shape, raw_dtype=tensor.tensor_type)
        _close(writer)
        if not alignment or gguf.GGUFReader(out).data_offset % 32 == 8:
            return out
    raise AssertionError("no padding gives that place")


def write_model(path: Path, architecture: str, keys: Callable[[gguf.GGUFWriter], None], shapes: Shapes) -> Path:
    """A model of random F32 weights, without a vocabulary.

    Args:
        keys: adds what the architecture needs.
        shapes: of all tensors by name, in numpy's order; vectors lie around 1 if they are norms,
            else around 0.
    """
    rng = np.random.default_rng(5)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(N_VOCAB)
    writer.add_context_length(64)
    keys(writer)
    for name, shape in shapes.items():
        is_vector = np.prod(shape) == max(shape)
        values = rng.standard_normal(shape) * (0.1 if is_vector else shape[-1] ** -0.5)
        writer.add_tensor(name, (values + ("norm.weight" in name)).astype(np.float32))
    _close(writer)
    return path


def _close(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _weights(shapes: Shapes, n_layers: int = 0) -> Shapes:
    """Names with `.weight`, for all layers where they stand for one."""
    names = {name: shape for name, shape in shapes.items() if not name.startswith("blk.")}
    for layer in range(n_layers):
        names |= {name.replace("blk.", f"blk.{layer}."): shape for name, shape in shapes.items() if name.startswith("blk.")}
    return {name if name.endswith((".bias", ".scale")) else f"{name}.weight": shape for name, shape in names.items()}


def _norms(width: int, *names: str) -> Shapes:
    return {name + part: (width,) for name in names for part in ("", ".bias")}


def write_bert(path: Path) -> Path:
    """One layer; it adds the first row of its token types."""
    width = 64

    def keys(writer: gguf.GGUFWriter) -> None:
        writer.add_embedding_length(width)
        writer.add_feed_forward_length(96)
        writer.add_block_count(1)
        writer.add_head_count(2)
        writer.add_layer_norm_eps(1e-5)
        writer.add_causal_attention(False)
        writer.add_pooling_type(gguf.PoolingType.NONE)
        writer.add_token_type_count(2)

    shapes = {"token_embd": (N_VOCAB, width), "token_types": (2, width), "position_embd": (64, width)}
    shapes |= {f"blk.attn_{part}": (width, width) for part in ("q", "k", "v", "output")}
    shapes |= {"blk.ffn_up": (96, width), "blk.ffn_down": (width, 96)}
    shapes |= _norms(width, "token_embd_norm", "blk.attn_output_norm", "blk.layer_output_norm")
    return write_model(path, "bert", keys, _weights(shapes, 1))


def write_rwkv6(path: Path) -> Path:
    """Two layers; time_mix_w2 is viewed as five matrices, time_mix_first is no matrix of a product,
    lerps are multiplied by elements."""
    width, rank, n_ff = 64, 32, 96

    def keys(writer: gguf.GGUFWriter) -> None:
        writer.add_embedding_length(width)
        writer.add_block_count(2)
        writer.add_layer_norm_eps(1e-5)
        writer.add_rescale_every_n_layers(6)
        writer.add_wkv_head_size(32)
        writer.add_time_mix_extra_dim(rank)
        writer.add_time_decay_extra_dim(rank)
        writer.add_feed_forward_length(n_ff)
        writer.add_head_count(0)

    shapes: Shapes = {"token_embd": (N_VOCAB, width), "output": (N_VOCAB, width)}
    shapes |= _norms(width, "token_embd_norm", "output_norm", "blk.attn_norm", "blk.attn_norm_2", "blk.time_mix_ln")
    shapes |= {"blk.time_mix_w1": (5 * rank, width), "blk.time_mix_w2": (5, width, rank)}
    shapes |= {"blk.time_mix_lerp_x": (1, 1, width), "blk.time_mix_lerp_fused": (5, 1, 1, width)}
    shapes |= {"blk.time_mix_first": (width // 32, 32), "blk.time_mix_decay": (width,)}
    shapes |= {"blk.time_mix_decay_w1": (rank, width), "blk.time_mix_decay_w2": (width, rank)}
    shapes |= {f"blk.time_mix_{part}": (width, width) for part in ("key", "value", "receptance", "gate", "output")}
    shapes |= {f"blk.channel_mix_lerp_{part}": (1, 1, width) for part in "kr"}
    shapes |= {"blk.channel_mix_key": (n_ff, width), "blk.channel_mix_value": (width, n_ff), "blk.channel_mix_receptance": (width, width)}
    return write_model(path, "rwkv6", keys, _weights(shapes, 2))


def write_rwkv7(path: Path) -> Path:
    """Two layers; time_mix_lerp_fused has four dimensions, time_mix_r_k is reshaped."""
    width, rank, n_ff = 64, 32, 96

    def keys(writer: gguf.GGUFWriter) -> None:
        writer.add_embedding_length(width)
        writer.add_block_count(2)
        writer.add_layer_norm_eps(1e-5)
        writer.add_wkv_head_size(32)
        writer.add_decay_lora_rank(rank)
        writer.add_iclr_lora_rank(rank)
        writer.add_value_residual_mix_lora_rank(rank)
        writer.add_gate_lora_rank(rank)
        writer.add_feed_forward_length(n_ff)
        writer.add_head_count(0)

    shapes: Shapes = {"token_embd": (N_VOCAB, width), "output": (N_VOCAB, width)}
    shapes |= _norms(width, "token_embd_norm", "output_norm", "blk.attn_norm", "blk.attn_norm_2", "blk.time_mix_ln")
    for part in "wav":
        shapes |= {f"blk.time_mix_{part}0": (width,)}
    for part in "wavg":
        shapes |= {f"blk.time_mix_{part}1": (rank, width), f"blk.time_mix_{part}2": (width, rank)}
    shapes |= {"blk.time_mix_lerp_fused": (6, 1, 1, width), "blk.channel_mix_lerp_k": (1, 1, width)}
    shapes |= {f"blk.time_mix_{part}": (width,) for part in ("k_k", "k_a", "r_k")}
    shapes |= {f"blk.time_mix_{part}": (width, width) for part in ("key", "value", "receptance", "output")}
    shapes |= {"blk.channel_mix_key": (n_ff, width), "blk.channel_mix_value": (width, n_ff)}
    return write_model(path, "rwkv7", keys, _weights(shapes, 2))


def _write_gemma(path: Path, architecture: str, extra: Callable[[gguf.GGUFWriter], None], per_layer: int, more: Shapes) -> Path:
    width, n_ff, n_layers = 64, 96, 2

    def keys(writer: gguf.GGUFWriter) -> None:
        writer.add_embedding_length(width)
        writer.add_block_count(n_layers)
        writer.add_feed_forward_length(n_ff)
        writer.add_head_count(2)
        writer.add_head_count_kv(1)
        writer.add_key_length(32)
        writer.add_value_length(32)
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_sliding_window(16)
        writer.add_embedding_length_per_layer_input(per_layer)
        extra(writer)

    shapes: Shapes = {"token_embd": (N_VOCAB, width), "per_layer_token_embd": (N_VOCAB, per_layer * n_layers)}
    shapes |= {"per_layer_model_proj": (per_layer * n_layers, width), "per_layer_proj_norm": (per_layer,), "output_norm": (width,)}
    shapes |= {"blk.attn_q": (64, width), "blk.attn_k": (32, width), "blk.attn_v": (32, width), "blk.attn_output": (width, 64)}
    shapes |= {"blk.attn_q_norm": (32,), "blk.attn_k_norm": (32,)}
    shapes |= {f"blk.{part}_norm": (width,) for part in ("attn", "post_attention", "ffn", "post_ffw", "post")}
    shapes |= {"blk.ffn_gate": (n_ff, width), "blk.ffn_up": (n_ff, width), "blk.ffn_down": (width, n_ff)}
    shapes |= {"blk.inp_gate": (per_layer, width), "blk.proj": (width, per_layer)}
    return write_model(path, architecture, keys, _weights(shapes | more, n_layers))


def write_gemma3n(path: Path) -> Path:
    """Two layers; it views the first row of its per-layer embeddings where it is given no tokens,
    as with images."""
    width, n_altup, rank = 64, 4, 64

    def keys(writer: gguf.GGUFWriter) -> None:
        writer.add_altup_active_idx(0)
        writer.add_altup_num_inputs(n_altup)
        writer.add_sliding_window_pattern([True, False])

    more: Shapes = {"altup_proj": (n_altup - 1, width, width), "altup_unembd_proj": (n_altup - 1, width, width)}
    more |= {
        "blk.altup_correct_coef": (n_altup, n_altup),
        "blk.altup_predict_coef": (n_altup**2, n_altup),
        "blk.altup_router": (n_altup, width),
    }
    more |= {"blk.laurel_l": (rank, width), "blk.laurel_r": (width, rank)}
    more |= {f"blk.{part}": (width,) for part in ("altup_correct_scale", "altup_router_norm", "laurel_post_norm")}
    return _write_gemma(path, "gemma3n", keys, 256, more)  # the loader does not ask for another length


def write_gemma4(path: Path) -> Path:
    """Two layers, per-layer embeddings as in gemma3n."""

    def keys(writer: gguf.GGUFWriter) -> None:
        writer.add_key_length_swa(32)
        writer.add_value_length_swa(32)
        writer.add_sliding_window_pattern([True, False])

    return _write_gemma(path, "gemma4", keys, 32, {"rope_freqs": (16,)})


def write_gemma4_experts(path: Path) -> Path:
    """The same with experts, whose router and matrices have scales beside them: tensors of other
    shapes under the names of matrices."""
    width, n_experts, n_ff = 64, 32, 32

    def keys(writer: gguf.GGUFWriter) -> None:
        writer.add_key_length_swa(32)
        writer.add_value_length_swa(32)
        writer.add_sliding_window_pattern([True, False])
        writer.add_expert_count(n_experts)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(n_ff)

    more: Shapes = {"rope_freqs": (16,), "blk.ffn_gate_inp": (n_experts, width), "blk.ffn_gate_inp.scale": (width,)}
    more |= {f"blk.{part}": (width,) for part in ("pre_ffw_norm_2", "post_ffw_norm_1", "post_ffw_norm_2")}
    more |= {"blk.ffn_gate_up_exps": (n_experts, 2 * n_ff, width), "blk.ffn_down_exps": (n_experts, width, n_ff)}
    return _write_gemma(path, "gemma4", keys, 32, more | {"blk.ffn_down_exps.scale": (n_experts,)})
