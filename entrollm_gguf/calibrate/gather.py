# SPDX-License-Identifier: MIT
"""Statistics from running the model with transformers: which inputs are large, how they go
together, and on which outputs the predictions depend.

For every linear layer y = W x:

- mean of x x^T over the tokens that reach it, the Hessian of the layer's squared output error
  (GPTQ, arXiv 2210.17323);
- mean of x^2, its diagonal;
- mean of (dL/dy)^2 over all tokens of the text, where L = log p(token) and the token is drawn from
  the model's own prediction. This is the diagonal of the Fisher information: a small error causes a
  KL divergence of half of it times the error's square. For an expert that few tokens reach, the
  mean is small, and so its errors count for little.

The text is the user's, or drawn from the model itself: then no data is needed.

Hessians take the most memory. They are therefore gathered for a group of layers at a time, in as
many runs over the text as that takes, and each group is kept in the cache when it is done: an
interrupted calibration goes on where it stopped, and another conversion of the same model needs
none. What the cache holds is believed only as far as it can be read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from pathlib import Path

import numpy as np

from entrollm_gguf.calibrate.cache import (
    Gathered,
    check_room,
    hessian_file,
    hessian_is_whole,
    kept_diagonals,
    kept_tokens,
    load_complete,
    locked,
    read_complete,
    save,
)
from entrollm_gguf.calibrate.layers import Run, embedding_name, find_layers, find_sites, group_sites
from entrollm_gguf.calibrate.model import CONTEXT, GROUP_BYTES, Place, explained, find_places, no_denormals, open_model, torch_threads
from entrollm_gguf.calibrate.tokens import cut_text, own_text, sequence_length
from entrollm_gguf.errors import ConversionError
from entrollm_gguf.progress import Progress
from entrollm_gguf.runtime.paths import cache_folder
from entrollm_gguf.texts import read_text

_VERSION = 3  # of what is in the cache


def gather(
    model_dir: str | Path,
    text: str | Path | None,
    *,
    n_sequences: int = 40,
    seed: int = 0,
    threads: int | None = None,
    names: Collection[str] | None = None,
    progress: Progress | None = None,
) -> Gathered:
    """Run a text through a Hugging Face model.

    Tried in this order: GPU in f32, GPU in bf16, CPU in f32, CPU in bf16. The first with enough
    free memory runs the model, so free memory decides the precision. Statistics are cached for
    each; cached ones of a higher precision are used before new ones of a lower are gathered.

    Args:
        model_dir: model folder; transformers must know the architecture.
        text: a UTF-8 file; None for text that the model writes itself.
        n_sequences: of CONTEXT tokens each; fewer if the text is shorter. They are taken evenly
            from the whole text.
        seed: of everything random, 0 to 2^63 - 1.
        threads: on the CPU; torch's own choice by default.
        names: of the checkpoint's weights as the converter has them. If transformers knows none of
            them, an error says so before the long runs.
    Raises:
        TextError: the file is no text.
        ConversionError: transformers cannot load or run the model, memory or the cache's disk is
            too small, the text is too short, or no name is known.
    """
    model_dir = Path(model_dir)
    content, what = None, f"own text, seed {seed}"
    if text is not None:
        content = read_text(text)
        what = f"text sha256:{hashlib.sha256(content.encode()).hexdigest()[:16]}, seed {seed}"
    places = find_places(model_dir)
    files = _hash_files(model_dir)
    for place in places:
        folder = cache_folder() / "calibration" / _key(files, what, n_sequences, place)
        if not (place.fits or (folder / "complete.json").is_file()):
            continue
        with locked(folder, n_sequences, progress):
            found = load_complete(folder, what)
            if found is None and place.fits:
                with torch_threads(threads):
                    _gather_into(folder, model_dir, place, content, n_sequences, seed, names, progress)
                found = read_complete(folder, what)
        if found is not None:
            return found
    raise ConversionError(
        f"{model_dir}: calibration needs {places[-1].needed * 1e-9:.1f} GB of free memory, {places[-1].free * 1e-9:.1f} are there; "
        "use an importance matrix instead (--imatrix, made by llama-imatrix)"
    )


def _hash_files(model_dir: Path) -> bytes:
    """Hash of weights, configuration and tokenizer, whatever files these consist of."""
    digest = hashlib.sha256()
    for path in sorted(path for kind in ("json", "safetensors", "bin", "model", "txt") for path in model_dir.glob(f"*.{kind}")):
        with open(path, "rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.digest()


def _key(files: bytes, what: str, n_sequences: int, place: Place) -> str:
    """Name in the cache: everything that the statistics depend on."""
    import transformers

    settings = [_VERSION, what, n_sequences, CONTEXT, place.device, place.dtype, transformers.__version__]
    return hashlib.sha256(json.dumps(settings).encode() + files).hexdigest()[:16]


def _gather_into(
    folder: Path,
    model_dir: Path,
    place: Place,
    text: str | None,
    n_sequences: int,
    seed: int,
    names: Collection[str] | None,
    progress: Progress | None,
) -> None:
    """Do all runs over the text; what is already whole in the folder is not made again."""
    import torch

    for part in folder.glob("part-*"):  # of a process that was killed: the folder is ours now
        part.unlink(missing_ok=True)
    model, tokenizer = open_model(model_dir, place)
    layers = find_layers(model)
    if names is not None and not {*layers, embedding_name(model)} & set(names):
        raise ConversionError(
            f"{model_dir}: the names of the weights are not those that transformers uses: no statistics would fit; use --imatrix"
        )
    kept = kept_tokens(folder / "tokens.npy", model.get_input_embeddings().num_embeddings)
    if kept is None:
        with explained(model_dir):
            length = sequence_length(model.config.get_text_config())
            cut = None if text is None else cut_text(tokenizer, text, n_sequences, length, model_dir)
        made = own_text(model, tokenizer, n_sequences, length, seed, model_dir, progress) if cut is None else cut
        save(folder / "tokens.npy", lambda file: np.save(file, made))
        kept = made
    tokens = torch.from_numpy(kept).to(place.device)

    with explained(model_dir):
        sites = find_sites(model, layers, tokens[:1])
    widths = {site: layers[site].in_features for site in sites.values() if site is not None}
    whole = {site for site, width in widths.items() if hessian_is_whole(hessian_file(folder, site), width)}
    missing = {site: 4 * width**2 for site, width in widths.items() if site not in whole}
    diagonals = kept_diagonals(folder / "diagonals.npz", sites)
    if diagonals is not None:
        missing = {site: size for site, size in missing.items() if diagonals[f"columns/{site}"].any()}
    check_room(folder, sum(missing.values()))
    number = 0
    while groups := group_sites(missing, GROUP_BYTES) or ([[]] if diagonals is None else []):
        run = Run(model, layers, sites, groups[0], with_gradients=diagonals is None)
        with run.hooked(), no_denormals():
            generator = torch.Generator(device=place.device).manual_seed(seed)
            for i, sequence in enumerate(tokens):
                with explained(model_dir):
                    run.feed(sequence[None], generator)
                if progress:
                    progress(number * len(tokens) + i + 1, (number + len(groups)) * len(tokens), "calibrating", "sequences")
        for site in groups[0]:
            with explained(model_dir):
                hessian = run.hessian(site)
            if hessian is not None:
                save(hessian_file(folder, site), lambda file, array=hessian: np.save(file, array))
                whole.add(site)
        if diagonals is None:
            with explained(model_dir):
                found = run.diagonals(tokens.numel())
            save(folder / "diagonals.npz", lambda file, arrays=found: np.savez(file, **arrays))
            diagonals = found
        # the first run tells which experts no token reaches
        missing = {site: size for site, size in missing.items() if site not in groups[0] and diagonals[f"columns/{site}"].any()}
        number += 1
    complete = {"tokens": list(tokens.shape), "hessians": {name: site if site in whole else None for name, site in sites.items()}}
    save(folder / "complete.json", lambda file: file.write(json.dumps(complete).encode()))
