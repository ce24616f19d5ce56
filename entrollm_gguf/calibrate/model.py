# SPDX-License-Identifier: MIT
"""What runs the model: where there is room for it, and how it is opened."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from entrollm_gguf.errors import ConversionError, EntroLLMError

CONTEXT = 512  # tokens of a sequence; fewer where the model has fewer positions
GROUP_BYTES = 2 << 30  # of Hessians that are gathered in one run


@dataclass(frozen=True)
class Place:
    """Where the model could run, and in what precision."""

    device: str
    dtype: str  # of torch
    needed: float  # bytes
    free: int

    @property
    def fits(self) -> bool:
        return self.needed < self.free


@contextmanager
def explained(model_dir: Path) -> Iterator[None]:
    """Whatever transformers, torch and the model's code raise becomes one line: they meet arbitrary
    files, so every type of exception is possible."""
    try:
        yield
    except EntroLLMError:
        raise
    except Exception as error:
        import torch

        out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)
        reason = "out of memory" if out_of_memory else f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ConversionError(
            f"{model_dir}: transformers cannot run it for calibration ({reason}); use --imatrix, or convert without calibration"
        ) from error


def find_places(model_dir: Path) -> list[Place]:
    """Where the model could run, best first. The CPU comes last, always."""
    import psutil
    import torch

    with explained(model_dir):
        n_weights, widths = checkpoint_shapes(model_dir)
        n_tokens = text_config(model_dir).vocab_size
        free = [("cuda", torch.cuda.mem_get_info()[0])] if torch.cuda.is_available() else []
    free.append(("cpu", psutil.virtual_memory().available))
    hessians = [4 * width**2 for width in widths]
    largest = max(hessians, default=0)
    # what else takes memory: logits, predictions, gradients; a group of Hessians, and a product to
    # be added to one. Half a gigabyte, and a fifth of the weights, are for activations and the like
    beside = 4 * CONTEXT * n_tokens * 4 + max(min(sum(hessians), GROUP_BYTES), largest) + largest + (1 << 29)
    sizes = {"float32": 4, "bfloat16": 2}
    return [Place(device, dtype, n_weights * size * 1.2 + beside, room) for device, room in free for dtype, size in sizes.items()]


def checkpoint_shapes(model_dir: Path) -> tuple[int, list[int]]:
    """Number of weights in the files that transformers loads, and the widths of the matrices. For
    .bin files the number is an upper bound, and no widths are known."""
    from safetensors import safe_open

    index = model_dir / "model.safetensors.index.json"
    if (model_dir / "model.safetensors").is_file():
        paths = [model_dir / "model.safetensors"]
    elif index.is_file():
        paths = [model_dir / name for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))]
    else:
        return sum(path.stat().st_size for path in model_dir.glob("*.bin")) // 2, []
    shapes: list[list[int]] = []
    for path in paths:
        with safe_open(path, framework="pt") as file:
            shapes += [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 - no mapping
    return sum(int(np.prod(shape, dtype=np.int64)) for shape in shapes), [shape[1] for shape in shapes if len(shape) == 2]


def text_config(model_dir: Path):
    """The part of config.json that is about text, as transformers understands it."""
    import transformers

    return transformers.AutoConfig.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False).get_text_config()


def open_model(model_dir: Path, place: Place):
    """Model without gradients of its parameters, tokenizer."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    own = {"local_files_only": True, "trust_remote_code": False}
    with explained(model_dir):
        model = (
            transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, place.dtype), **own).to(place.device).eval()
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir, **own)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model, tokenizer


@contextmanager
def torch_threads(n: int | None) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(before if n is None else n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def no_denormals() -> Iterator[None]:
    """Probabilities and gradients far below 1e-38 count as zero: the CPU takes many times as long
    for each (2.6 times for the whole run, SmolLM2 on Zen 5)."""
    import torch

    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
