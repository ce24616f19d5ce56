# SPDX-License-Identifier: MIT
"""Statistics from running the model, by transformers: which inputs are large, how they go together, and which outputs the predictions hang on.

For every linear layer y = W x:

- mean of x x^T over the tokens that came to it, the Hessian of the layer's squared output error (GPTQ, arXiv 2210.17323);
- mean of x^2, its diagonal;
- mean of (dL/dy)^2 over all tokens of the text, with L = log p(token), the token drawn from the model's own prediction. This is the diagonal of the Fisher information: half of it, weighted with a small error's
  square, is the KL divergence that the error causes. An expert that few tokens come to has little of it, and that is how seldom it is asked enters: once.

The text is the user's, or drawn from the model itself: then no data is needed.

Hessians are what takes memory, so they are gathered for a group of layers at a time, in as many runs over the text as that takes, and each group is kept in the cache when it is done: an interrupted calibration
goes on where it stopped, and another conversion of the same model needs none. What the cache holds is believed only as far as it can be read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock, Timeout

from entrollm_gguf.errors import ConversionError, EntroLLMError
from entrollm_gguf.runtime.paths import cache_folder
from entrollm_gguf.texts import read_text

CONTEXT = 512  # tokens of a sequence; fewer where the model has fewer positions
_GROUP_BYTES = 2 << 30  # of Hessians that are gathered in one run
_VERSION = 3  # of what is in the cache

# What reading a file of the cache raises if it is missing, cut short or something else.
_DAMAGE = (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile)

Progress = Callable[[int, int, str], None]  # done, total, what


@dataclass(frozen=True)
class ModuleStatistics:
    """Of one linear layer; names and orders are the checkpoint's."""

    columns: np.ndarray  # f32 (n_in,); zeros if no token came to it
    rows: np.ndarray  # f32 (n_out,)
    hessian: Path | None  # .npy, f32 (n_in, n_in); layers that share their input share the file; None if no token came


@dataclass(frozen=True)
class Gathered:
    """What `gather` found."""

    source: str  # for the file's metadata
    modules: dict[str, ModuleStatistics]  # by the name of the weight, "model.layers.0.mlp.up_proj.weight"


@dataclass(frozen=True)
class _Place:
    """Where the model could run, and in what precision."""

    device: str
    dtype: str  # of torch
    needed: float  # bytes
    free: int

    @property
    def fits(self) -> bool:
        return self.needed < self.free


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

    The model runs in the first that has room of: GPU in f32, GPU in bf16, CPU in f32, CPU in bf16. Memory that is free at the moment thus decides on the precision. Each has statistics of its own in the cache, and
    those that are there are taken before any are gathered in a lower precision.

    Args:
        model_dir: model folder; transformers must know the architecture.
        text: a UTF-8 file; None for text that the model writes itself.
        n_sequences: of CONTEXT tokens each; fewer if the text is shorter. They are taken evenly from the whole text.
        seed: of everything random, 0 to 2^63 - 1.
        threads: on the CPU; torch's own choice by default.
        names: of the checkpoint's weights as the converter has them. If transformers knows none of them, that is said before the long runs.
    Raises:
        TextError: the text is none.
        ConversionError: transformers cannot load or run the model, memory or the cache's disk is too small, the text is too short, or no name is known.
    """
    model_dir = Path(model_dir)
    content, what = None, f"own text, seed {seed}"
    if text is not None:
        content = read_text(text)
        what = f"text sha256:{hashlib.sha256(content.encode()).hexdigest()[:16]}, seed {seed}"
    places = _places(model_dir)
    files = _hash_files(model_dir)
    for place in places:
        folder = cache_folder() / "calibration" / _key(files, what, n_sequences, place)
        if not (place.fits or (folder / "complete.json").is_file()):
            continue
        with _locked(folder, n_sequences, progress):
            found = _load(folder, what)
            if found is None and place.fits:
                with _torch_threads(threads):
                    _gather_into(folder, model_dir, place, content, n_sequences, seed, names, progress)
                found = _read(folder, what)
        if found is not None:
            return found
    raise ConversionError(
        f"{model_dir}: calibration needs {places[-1].needed * 1e-9:.1f} GB of free memory, {places[-1].free * 1e-9:.1f} are there; "
        "use an importance matrix instead (--imatrix, made by llama-imatrix)"
    )


def _hash_files(model_dir: Path) -> bytes:
    """Of weights, configuration and tokenizer, whatever it consists of."""
    digest = hashlib.sha256()
    for path in sorted(path for kind in ("json", "safetensors", "bin", "model", "txt") for path in model_dir.glob(f"*.{kind}")):
        with open(path, "rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.digest()


def _key(files: bytes, what: str, n_sequences: int, place: _Place) -> str:
    """Name in the cache: everything that the statistics depend on."""
    import transformers

    settings = [_VERSION, what, n_sequences, CONTEXT, place.device, place.dtype, transformers.__version__]
    return hashlib.sha256(json.dumps(settings).encode() + files).hexdigest()[:16]


# ---- what runs the model


@contextmanager
def _explained(model_dir: Path) -> Iterator[None]:
    """Whatever transformers, torch and the model's code raise becomes a line: they meet arbitrary files, so that every type of exception is possible."""
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


def _places(model_dir: Path) -> list[_Place]:
    """Where the model could run, best first. The CPU comes last, always."""
    import psutil
    import torch

    with _explained(model_dir):
        n_weights, widths = _checkpoint(model_dir)
        n_tokens = _text_config(model_dir).vocab_size
        free = [("cuda", torch.cuda.mem_get_info()[0])] if torch.cuda.is_available() else []
    free.append(("cpu", psutil.virtual_memory().available))
    hessians = [4 * width**2 for width in widths]
    largest = max(hessians, default=0)
    # what is beside the weights: logits, predictions, gradients; a group of Hessians, and a product to be added to one. Half a gigabyte and a fifth are for activations and the like
    beside = 4 * CONTEXT * n_tokens * 4 + max(min(sum(hessians), _GROUP_BYTES), largest) + largest + (1 << 29)
    sizes = {"float32": 4, "bfloat16": 2}
    return [_Place(device, dtype, n_weights * size * 1.2 + beside, room) for device, room in free for dtype, size in sizes.items()]


def _checkpoint(model_dir: Path) -> tuple[int, list[int]]:
    """Number of weights in the files that transformers loads, and the widths of the matrices; from .bin files an upper bound, and the width of none."""
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


def _text_config(model_dir: Path):
    """The part of config.json that is about text, as transformers understands it."""
    import transformers

    return transformers.AutoConfig.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False).get_text_config()


def _open(model_dir: Path, place: _Place):
    """Model without gradients of its parameters, tokenizer."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    own = {"local_files_only": True, "trust_remote_code": False}
    with _explained(model_dir):
        model = (
            transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, place.dtype), **own).to(place.device).eval()
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir, **own)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model, tokenizer


@contextmanager
def _torch_threads(n: int | None) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(before if n is None else n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _no_denormals() -> Iterator[None]:
    """Probabilities and gradients far below 1e-38 count as zero: the CPU takes many times as long for each (2.6 times for the whole run, SmolLM2 on Zen 5)."""
    import torch

    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


# ---- the cache


def _cannot_keep(folder: Path, error: OSError) -> ConversionError:
    reason = error.strerror or " ".join(str(error).split())
    return ConversionError(f"{folder}: statistics cannot be kept there ({reason}); free its disk, or name another folder by ENTROLLM_CACHE")


@contextmanager
def _locked(folder: Path, n_sequences: int, progress: Progress | None) -> Iterator[None]:
    """One process at a time gathers into a folder; others wait, and find the statistics."""
    lock = FileLock(folder.with_name(folder.name + ".lock"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if progress:
                progress(0, n_sequences, "waiting for another calibration of the model (sequences)")
            lock.acquire()
    except OSError as error:
        raise _cannot_keep(folder, error) from error
    try:
        yield
    finally:
        lock.release()


def _save(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """A file of the cache, whole or not at all.

    Raises:
        ConversionError: the disk is full or cannot be written.
    """
    part = path.with_name(f"part-{os.getpid()}-{path.name}")
    try:
        with open(part, "wb") as file:
            write(file)
        part.replace(path)
    except OSError as error:
        raise _cannot_keep(path.parent, error) from error
    finally:
        part.unlink(missing_ok=True)


def _hessian_file(folder: Path, site: str) -> Path:
    """By name, not by number: whatever run made it, it is this layer's."""
    return folder / f"hessian-{re.sub(r'[^A-Za-z0-9._-]', '_', site.removesuffix('.weight'))}.npy"


def _hessian_is_whole(path: Path, width: int) -> bool:
    try:
        return np.load(path, mmap_mode="r").shape == (width, width)
    except _DAMAGE:
        return False


def _read(folder: Path, what: str) -> Gathered:
    """Complete statistics; raises one of _DAMAGE if they are not."""
    complete = json.loads((folder / "complete.json").read_text(encoding="utf-8"))
    n, length = complete["tokens"]
    modules = {}
    with np.load(folder / "diagonals.npz") as arrays:
        for name, site in complete["hessians"].items():
            columns, path = arrays[f"columns/{name}"], None if site is None else _hessian_file(folder, site)
            if path is not None and not _hessian_is_whole(path, len(columns)):
                raise ValueError(f"{path} is damaged")
            modules[name] = ModuleStatistics(columns, arrays[f"rows/{name}"], path)
    return Gathered(f"{what}, {n} x {length} tokens", modules)


def _load(folder: Path, what: str) -> Gathered | None:
    """Complete statistics, or None if there are none; then nothing says any longer that they are complete."""
    try:
        return _read(folder, what)
    except _DAMAGE:
        try:
            (folder / "complete.json").unlink(missing_ok=True)
        except OSError as error:
            raise _cannot_keep(folder, error) from error
        return None


def _kept_tokens(path: Path, vocabulary: int) -> np.ndarray | None:
    """Tokens of an interrupted calibration, i64 (n, length)."""
    try:
        tokens = np.load(path)
        return tokens if tokens.ndim == 2 and tokens.size and tokens.min() >= 0 and tokens.max() < vocabulary else None
    except _DAMAGE:
        return None


def _kept_diagonals(path: Path, names: Collection[str]) -> dict[str, np.ndarray] | None:
    """Diagonals of an interrupted calibration."""
    try:
        with np.load(path) as arrays:
            return {f"{part}/{name}": arrays[f"{part}/{name}"] for part in ("columns", "rows") for name in names}
    except _DAMAGE:
        return None


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ConversionError(
            f"{folder}: statistics take {needed * 1e-9:.1f} GB, {free * 1e-9:.1f} are free there; "
            "name a folder on a larger disk by ENTROLLM_CACHE, or use an importance matrix instead (--imatrix)"
        )


def _gather_into(
    folder: Path,
    model_dir: Path,
    place: _Place,
    text: str | None,
    n_sequences: int,
    seed: int,
    names: Collection[str] | None,
    progress: Progress | None,
) -> None:
    """All runs over the text; what is whole in the folder already is not made again."""
    import torch

    for part in folder.glob("part-*"):  # of a process that was killed: the folder is ours now
        part.unlink(missing_ok=True)
    model, tokenizer = _open(model_dir, place)
    layers = _layers(model)
    if names is not None and not {*layers, _embedding_name(model)} & set(names):
        raise ConversionError(
            f"{model_dir}: the names of the weights are not those that transformers uses: no statistics would fit; use --imatrix"
        )
    kept = _kept_tokens(folder / "tokens.npy", model.get_input_embeddings().num_embeddings)
    if kept is None:
        with _explained(model_dir):
            length = _sequence_length(model.config.get_text_config())
            cut = None if text is None else _cut(tokenizer, text, n_sequences, length, model_dir)
        made = _own_text(model, tokenizer, n_sequences, length, seed, model_dir, progress) if cut is None else cut
        _save(folder / "tokens.npy", lambda file: np.save(file, made))
        kept = made
    tokens = torch.from_numpy(kept).to(place.device)

    with _explained(model_dir):
        sites = _sites(model, layers, tokens[:1])
    widths = {site: layers[site].in_features for site in sites.values() if site is not None}
    whole = {site for site, width in widths.items() if _hessian_is_whole(_hessian_file(folder, site), width)}
    missing = {site: 4 * width**2 for site, width in widths.items() if site not in whole}
    diagonals = _kept_diagonals(folder / "diagonals.npz", sites)
    if diagonals is not None:
        missing = {site: size for site, size in missing.items() if diagonals[f"columns/{site}"].any()}
    _check_room(folder, sum(missing.values()))
    number = 0
    while groups := _groups(missing, _GROUP_BYTES) or ([[]] if diagonals is None else []):
        run = _Run(model, layers, sites, groups[0], with_gradients=diagonals is None)
        with run.hooked(), _no_denormals():
            generator = torch.Generator(device=place.device).manual_seed(seed)
            for i, sequence in enumerate(tokens):
                with _explained(model_dir):
                    run.feed(sequence[None], generator)
                if progress:
                    progress(number * len(tokens) + i + 1, (number + len(groups)) * len(tokens), "calibrating (sequences)")
        for site in groups[0]:
            with _explained(model_dir):
                hessian = run.hessian(site)
            if hessian is not None:
                _save(_hessian_file(folder, site), lambda file, array=hessian: np.save(file, array))
                whole.add(site)
        if diagonals is None:
            with _explained(model_dir):
                found = run.diagonals(tokens.numel())
            _save(folder / "diagonals.npz", lambda file, arrays=found: np.savez(file, **arrays))
            diagonals = found
        # the first run tells which experts no token comes to
        missing = {site: size for site, size in missing.items() if site not in groups[0] and diagonals[f"columns/{site}"].any()}
        number += 1
    complete = {"tokens": list(tokens.shape), "hessians": {name: site if site in whole else None for name, site in sites.items()}}
    _save(folder / "complete.json", lambda file: file.write(json.dumps(complete).encode()))


# ---- the text


def _sequence_length(config) -> int:
    """CONTEXT, or as many positions as the model has."""
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return min(CONTEXT, positions) if isinstance(positions, int) and positions > 1 else CONTEXT


def _cut(tokenizer, text: str, n_sequences: int, length: int, model_dir: Path) -> np.ndarray:
    """Sequences from all over the text, i64 (n, length); each begins with the token that the tokenizer puts first, if any."""
    first = tokenizer("").input_ids[:1]
    ids = tokenizer(text, add_special_tokens=False).input_ids
    n_text = length - len(first)
    n = min(n_sequences, len(ids) // n_text)
    if n < 1:
        raise ConversionError(f"{model_dir}: the calibration text has {len(ids)} tokens, {n_text} at least are needed; give a longer one")
    starts = np.linspace(0, len(ids) - n_text, n).astype(int)
    return np.array([first + ids[start : start + n_text] for start in starts], dtype=np.int64)


def _own_text(model, tokenizer, n_sequences: int, length: int, seed: int, model_dir: Path, progress: Progress | None) -> np.ndarray:
    """Sequences drawn from the model's own predictions, i64 (n, length). Where a document ends, another begins."""
    import torch
    import transformers

    # the folder's own has penalties, and tokens to stop at: generate() adds them to whatever it is given
    model.generation_config = transformers.GenerationConfig()
    begin = next((token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None), 0)
    torch.manual_seed(seed)
    made: list[np.ndarray] = []
    while (done := sum(map(len, made))) < n_sequences:
        if progress:
            progress(done, n_sequences, "writing text (sequences)")
        with _explained(model_dir), torch.inference_mode():
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


# ---- layers and their inputs


def _layers(model) -> dict[str, Any]:
    """Linear layers by the name of their weight."""
    import torch

    return {_weight_name(name): module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


def _weight_name(module: str) -> str:
    """As llama.cpp's converter calls a module's weight: the text part of a model that knows pictures, too, is the model."""
    return f"{module}.weight".replace("language_model.", "")


def _sites(model, layers: dict[str, Any], tokens) -> dict[str, str | None]:
    """Layers by name -> the first layer that reads the same input. None for an embedding of its own. Layers that text does not come to, as those for pictures, are left out."""
    import torch

    found: dict[str, str | None] = {}
    inputs: list[tuple[Any, str]] = []  # kept alive, so that no other tensor takes an input's place

    def look(name: str):
        def hook(module, args, output):
            site = next((first for seen, first in inputs if seen is args[0]), None)
            if site is None:
                site = name
                inputs.append((args[0], name))
            found[name] = site

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in layers.items()]
    try:
        with torch.no_grad():
            model(tokens)
    finally:
        for handle in handles:
            handle.remove()
    # experts that no token of this sequence came to: their like in other places were found
    kinds = {_kind(name) for name in found}
    found |= {name: name for name in layers if name not in found and _kind(name) in kinds}
    # a tied embedding is the output's matrix, too, and that is where its inputs matter
    found[_embedding_name(model)] = found.get(_tied_head(model) or "")
    return found


def _kind(name: str) -> str:
    """The name without numbers of layers and experts."""
    return re.sub(r"\.\d+(?=\.)", ".#", name)


def _head_name(model) -> str | None:
    """Name of the output's weight."""
    head = model.get_output_embeddings()
    return next((_weight_name(name) for name, module in model.named_modules() if module is head), None)


def _tied_head(model) -> str | None:
    """The same if it is the embedding."""
    head = model.get_output_embeddings()
    return _head_name(model) if head is not None and head.weight is model.get_input_embeddings().weight else None


def _embedding_name(model) -> str:
    embedding = model.get_input_embeddings()
    return next(_weight_name(name) for name, module in model.named_modules() if module is embedding)


def _groups(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Sites in groups of at most limit bytes; a single one may be larger."""
    groups: list[list[str]] = []
    room = 0
    for site, size in sizes.items():
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1].append(site)
        room -= size
    return groups


class _Run:
    """One run over the text: Hessians of some sites, and with gradients the diagonals of all layers.

    Args:
        layers: by the name of their weight.
        sites: of all layers that take part, from `_sites`.
        group: sites whose Hessians are gathered.
    """

    def __init__(self, model, layers: dict[str, Any], sites: dict[str, str | None], group: list[str], with_gradients: bool) -> None:
        import torch

        self._torch = torch
        self._model = model
        self._layers = {name: layers[name] for name in sites if name in layers}  # without the embedding
        self._group = frozenset(group)
        self._with_gradients = with_gradients
        self._hessians: dict[str, Any] = {}  # sums over the tokens that came to a layer, as all others here
        self._n_tokens: dict[str, int] = {}  # that came to a layer: few of all to an expert
        self._columns: dict[str, Any] = {}
        self._rows: dict[str, Any] = {}
        self._head: dict[str, Any] = {}  # sum of p (1 - p) for each token of the vocabulary
        self._lookups = None  # sum of (dL/de)^2 for each token of the vocabulary
        self._tokens = None

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Within, `feed` gathers."""
        handles = [
            module.register_forward_hook(self._look(name))
            for name, module in self._layers.items()
            if self._with_gradients or name in self._group
        ]
        if self._with_gradients:
            handles.append(self._model.get_input_embeddings().register_forward_hook(self._look_up))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _look(self, name: str):
        def hook(module, args, output):
            x = args[0].detach().reshape(-1, args[0].shape[-1]).float()
            self._n_tokens[name] = self._n_tokens.get(name, 0) + len(x)
            if name in self._group:
                _add(self._hessians, name, x.T @ x)
            if self._with_gradients:
                _add(self._columns, name, x.square().sum(0))
                if output.requires_grad:
                    output.register_hook(
                        lambda gradient: _add(self._rows, name, gradient.float().reshape(-1, gradient.shape[-1]).square().sum(0))
                    )

        return hook

    def _look_up(self, module, args, output):
        if self._lookups is None:
            self._lookups = self._torch.zeros(module.num_embeddings, device=output.device)

        def hook(gradient):
            self._lookups.index_add_(0, self._tokens.reshape(-1), gradient.float().square().sum(-1).reshape(-1))

        output = output.detach().requires_grad_(True)  # where the gradients end
        output.register_hook(hook)
        return output

    def feed(self, tokens, generator) -> None:
        """One sequence, (1, n)."""
        torch = self._torch
        self._tokens = tokens
        if not self._with_gradients:
            with torch.no_grad():
                self._model(tokens)
            return
        logits = self._model(tokens, use_cache=False).logits
        with torch.no_grad():
            error = torch.softmax(logits[0].float(), -1)
            _add(self._head, "rows", (error - error.square()).sum(0))
            drawn = torch.multinomial(error, 1, generator=generator)
            error.scatter_add_(1, drawn, -torch.ones_like(drawn, dtype=error.dtype))  # the gradient of -log p(drawn)
        logits.backward(gradient=error[None].to(logits.dtype))

    def hessian(self, site: str) -> np.ndarray | None:
        """Mean over the tokens that came to it, f32 (n_in, n_in); None if none did, or with nothing but zeros."""
        total = self._hessians.pop(site, None)  # pop: memory for the copy
        return None if total is None or not total.any() else total.div_(self._n_tokens[site]).cpu().numpy()

    def diagonals(self, n_tokens: int) -> dict[str, np.ndarray]:
        """Means over the tokens, for `_read`: of inputs over those that came to a layer, of gradients over all."""
        torch = self._torch
        arrays = {f"columns/{name}": value / self._n_tokens[name] for name, value in self._columns.items()}
        arrays |= {f"rows/{name}": value / n_tokens for name, value in self._rows.items()}
        output = _head_name(self._model)
        if f"columns/{output}" in arrays:
            # the mean over what could have been drawn, instead of the one token of so many that was
            arrays[f"rows/{output}"] = self._head["rows"] / n_tokens
        for name, module in self._layers.items():  # zeros for experts that no token came to
            arrays.setdefault(f"columns/{name}", torch.zeros(module.in_features))
            arrays.setdefault(f"rows/{name}", torch.zeros(module.out_features))
        # A row of the embedding is what a token adds to the residual stream; where it is the output's row too, both count. In terms of
        # `rows` times the mean of `columns`, as for all other layers.
        embedding = self._model.get_input_embeddings()
        scale = float(getattr(embedding, "embed_scale", 1.0))  # some multiply what they looked up (Gemma 3)
        lookups = self._lookups * (scale**2 / (n_tokens * embedding.embedding_dim))
        name, head = _embedding_name(self._model), _tied_head(self._model)
        arrays[f"columns/{name}"], arrays[f"rows/{name}"] = torch.ones(embedding.embedding_dim), lookups
        if head is not None:
            arrays[f"columns/{name}"] = arrays[f"columns/{head}"]
            arrays[f"rows/{name}"] = arrays[f"rows/{head}"] + lookups / arrays[f"columns/{head}"].mean()
        return {key: value.float().cpu().numpy() for key, value in arrays.items()}


def _add(sums: dict, name: str, value) -> None:
    sums[name] = sums[name].add_(value) if name in sums else value
