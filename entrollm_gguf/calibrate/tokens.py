# SPDX-License-Identifier: MIT
"""What the model reads: sequences from a text, or ones that it writes itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from entrollm_gguf.calibrate.model import CONTEXT, explained
from entrollm_gguf.errors import ConversionError
from entrollm_gguf.progress import Progress


def sequence_length(config) -> int:
    """CONTEXT, or as many positions as the model has."""
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return min(CONTEXT, positions) if isinstance(positions, int) and positions > 1 else CONTEXT


def cut_text(tokenizer, text: str, n_sequences: int, length: int, model_dir: Path) -> np.ndarray:
    """Sequences from all over the text, i64 (n, length); each begins with the token that the
    tokenizer puts first, if any."""
    first = tokenizer("").input_ids[:1]
    ids = tokenizer(text, add_special_tokens=False).input_ids
    n_text = length - len(first)
    n = min(n_sequences, len(ids) // n_text)
    if n < 1:
        raise ConversionError(f"{model_dir}: the calibration text has {len(ids)} tokens, {n_text} at least are needed; give a longer one")
    starts = np.linspace(0, len(ids) - n_text, n).astype(int)
    return np.array([first + ids[start : start + n_text] for start in starts], dtype=np.int64)


def own_text(model, tokenizer, n_sequences: int, length: int, seed: int, model_dir: Path, progress: Progress | None) -> np.ndarray:
    """Sequences drawn from the model's own predictions, i64 (n, length). Where a document ends,
    another begins."""
    import torch
    import transformers

    # the folder's own configuration has penalties and tokens to stop at, which generate() would add
    # to whatever it is given
    model.generation_config = transformers.GenerationConfig()
    begin = next((token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None), 0)
    torch.manual_seed(seed)
    made: list[np.ndarray] = []
    while (done := sum(map(len, made))) < n_sequences:
        if progress:
            progress(done, n_sequences, "writing text", "sequences")
        with explained(model_dir), torch.inference_mode():
            batch = torch.full((min(16, n_sequences - done), 1), begin, device=model.device)
            out = model.generate(
                batch,
                attention_mask=torch.ones_like(batch),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=length - 1,
                pad_token_id=begin,
            )
            made.append(out.cpu().numpy().astype(np.int64))
    return np.concatenate(made)
