# SPDX-License-Identifier: MIT
"""Statistics from running the model, by transformers: which inputs are large, how they go together, and which outputs the predictions hang on.

For every linear layer y = W x, over the tokens of a text:

- mean of x x^T, the Hessian of the layer's squared output error (GPTQ, arXiv 2210.17323);
- mean of x^2, its diagonal;
- mean of (dL/dy)^2 with L = log p(token), the token drawn from the model's own prediction. This is the diagonal of the Fisher information: half of it, weighted with a small error's square, is the KL
  divergence that the error causes.

The text is the user's, or drawn from the model itself: then no data is needed.

Hessians are what takes memory, so they are gathered for a group of layers at a time, in as many runs over the text as that takes, and each group is kept in the cache when it is done: an interrupted calibration
goes on where it stopped, and another conversion of the same model needs none.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from entrollm_gguf.errors import ConversionError
from entrollm_gguf.runtime.paths import cache_folder

CONTEXT = 512  # tokens of a sequence
_GROUP_BYTES = 2 << 30  # of Hessians that are gathered in one run
_VERSION = 2  # of what is in the cache

Progress = Callable[[int, int, str], None]  # done, total, what


@dataclass(frozen=True)
class ModuleStatistics:
    """Of one linear layer; names and orders are the checkpoint's."""

    columns: np.ndarray  # f32 (n_in,)
    rows: np.ndarray  # f32 (n_out,)
    hessian: Path | None  # .npy, f32 (n_in, n_in); layers that share their input share the file


@dataclass(frozen=True)
class Gathered:
    """What `gather` found."""

    source: str  # for the file's metadata
    modules: dict[str, ModuleStatistics]  # by the name of the weight, "model.layers.0.mlp.up_proj.weight"


def gather(
    model_dir: str | Path, text: str | Path | None, *, n_sequences: int = 40, seed: int = 0, progress: Progress | None = None
) -> Gathered:
    """Run a text through a Hugging Face model.

    Args:
        model_dir: model folder; transformers must know the architecture.
        text: a UTF-8 file; None for text that the model writes itself.
        n_sequences: of 512 tokens each; fewer if the text is shorter. They are taken evenly from the whole text.
        seed: of everything random.
    Raises:
        ConversionError: transformers cannot load the model, memory is too small for it, or the text is too short.
    """
    model_dir = Path(model_dir)
    content, what = None, f"own text, seed {seed}"
    if text is not None:
        try:
            content = Path(text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConversionError(f"{text}: cannot be read as UTF-8 text ({error}); name a plain text file") from error
        what = f"text sha256:{hashlib.sha256(content.encode()).hexdigest()[:16]}, seed {seed}"
    digest = hashlib.sha256(json.dumps([_VERSION, what, n_sequences, CONTEXT]).encode())
    for path in sorted([*model_dir.glob("*.json"), *model_dir.glob("*.safetensors"), *model_dir.glob("*.bin")]):
        with open(path, "rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    folder = cache_folder() / "calibration" / digest.hexdigest()[:16]
    source = f"{what}, {n_sequences} x {CONTEXT} tokens"
    if not (folder / "complete.json").is_file():
        _gather_into(folder, model_dir, content, n_sequences, seed, progress)
    return Gathered(source, _load(folder))


def _load(folder: Path) -> dict[str, ModuleStatistics]:
    sites = json.loads((folder / "complete.json").read_text())
    with np.load(folder / "diagonals.npz") as arrays:
        return {
            name: ModuleStatistics(
                arrays[f"columns/{name}"], arrays[f"rows/{name}"], None if site is None else folder / f"hessian-{site}.npy"
            )
            for name, site in sites.items()
        }


def _gather_into(folder: Path, model_dir: Path, text: str | None, n_sequences: int, seed: int, progress: Progress | None) -> None:
    """All runs over the text; what is in the folder already is not made again."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer, device = _open(model_dir)
    tokens_file = folder / "tokens.npy"
    if not tokens_file.is_file():
        if text is None:
            _save(tokens_file, _own_text(model, tokenizer, n_sequences, seed, device, progress))
        else:
            _save(tokens_file, _cut(tokenizer, text, n_sequences, model_dir))
    tokens = torch.from_numpy(np.load(tokens_file)).to(device)

    sites = _sites(model, tokens[:1])
    sizes = {site: _linear(model, name).weight.shape[1] ** 2 * 4 for name, site in sites.items() if site is not None}
    groups = _groups({site: size for site, size in sizes.items() if not (folder / f"hessian-{site}.npy").is_file()}, _GROUP_BYTES)
    diagonals = folder / "diagonals.npz"
    if not diagonals.is_file() and not groups:
        groups = [[]]
    for number, group in enumerate(groups):
        with_gradients = not diagonals.is_file()
        run = _Run(model, {name: site for name, site in sites.items() if site in group}, with_gradients)
        with run.hooked(), _no_denormals():
            generator = torch.Generator(device=device).manual_seed(seed)
            for i, sequence in enumerate(tokens):
                run.feed(sequence[None], generator)
                if progress:
                    progress(number * len(tokens) + i + 1, len(groups) * len(tokens), "calibrating (sequences)")
        for site, hessian in run.hessians.items():
            width = math.isqrt(sizes[site] // 4)
            mean = np.zeros((width, width), np.float32) if hessian is None else (hessian / tokens.numel()).cpu().numpy()
            _save(folder / f"hessian-{site}.npy", mean)
        if with_gradients:
            part = folder / "part.npz"
            np.savez(part, **run.diagonals(tokens.numel()))
            part.replace(diagonals)
    (folder / "complete.json").write_text(json.dumps(sites))


@contextmanager
def _no_denormals() -> Iterator[None]:
    """Probabilities and gradients far below 1e-38 count as zero: the CPU takes many times as long for each (2.6 times for the whole run, SmolLM2 on Zen 5)."""
    import torch

    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def _save(path: Path, array: np.ndarray) -> None:
    part = path.with_name(f"part-{os.getpid()}.npy")
    np.save(part, array)
    part.replace(path)


def _open(model_dir: Path):
    """Model without gradients of its parameters, tokenizer, device."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    import psutil
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available
    n_weights = sum(path.stat().st_size for path in [*model_dir.glob("*.safetensors"), *model_dir.glob("*.bin")]) // 2
    # half a gigabyte and a fifth for activations, gradients and the like
    dtype = next((kind for kind, size in ((torch.float32, 4), (torch.bfloat16, 2)) if n_weights * size * 1.2 + (1 << 29) < free), None)
    if dtype is None:
        raise ConversionError(
            f"{model_dir}: calibration needs {n_weights * 2.4e-9 + 0.5:.1f} GB of free memory, {free * 1e-9:.1f} are there; "
            "use an importance matrix instead (--imatrix, made by llama-imatrix)"
        )
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, local_files_only=True).to(device).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConversionError(
            f"{model_dir}: transformers cannot load it for calibration ({reason}); use --imatrix, or convert without calibration"
        ) from error
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model, tokenizer, device


def _cut(tokenizer, text: str, n_sequences: int, model_dir: Path) -> np.ndarray:
    """Sequences from all over the text, i64 (n, CONTEXT); each begins with the token that the tokenizer puts first, if any."""
    first = tokenizer("").input_ids[:1]
    ids = tokenizer(text, add_special_tokens=False).input_ids
    length = CONTEXT - len(first)
    n = min(n_sequences, len(ids) // length)
    if n < 1:
        raise ConversionError(f"{model_dir}: the calibration text has {len(ids)} tokens, {length} at least are needed")
    starts = np.linspace(0, len(ids) - length, n).astype(int)
    return np.array([first + ids[start : start + length] for start in starts], dtype=np.int64)


def _own_text(model, tokenizer, n_sequences: int, seed: int, device: str, progress: Progress | None) -> np.ndarray:
    """Sequences drawn from the model's own predictions, i64 (n, CONTEXT)."""
    import torch

    begin = next((token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None), 0)
    torch.manual_seed(seed)
    made: list[np.ndarray] = []
    while sum(map(len, made)) < n_sequences:
        done = sum(map(len, made))
        if progress:
            progress(done, n_sequences, "writing text (sequences)")
        batch = torch.full((min(16, n_sequences - done), 1), begin, device=device)
        with torch.inference_mode():
            out = model.generate(
                batch,
                attention_mask=torch.ones_like(batch),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                min_new_tokens=CONTEXT - 1,
                max_new_tokens=CONTEXT - 1,
                pad_token_id=begin,
            )
        made.append(out.cpu().numpy().astype(np.int64))
    return np.concatenate(made)


def _linear(model, name: str):
    return model.get_submodule(name.removesuffix(".weight"))


def _sites(model, tokens) -> dict[str, int | None]:
    """Linear layers by the name of their weight -> number of their input; those that read the same input share it. None for an embedding of its own."""
    import torch

    found: dict[str, int | None] = {}
    inputs: list = []

    def look(name: str):
        def hook(module, args, output):
            x = args[0]
            number = next((i for i, seen in enumerate(inputs) if seen is x), None)
            if number is None:
                number = len(inputs)
                inputs.append(x)  # kept alive, so that no other tensor takes its place
            found[name] = number

        return hook

    handles = [
        module.register_forward_hook(look(f"{name}.weight"))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    try:
        with torch.no_grad():
            model(tokens)
    finally:
        for handle in handles:
            handle.remove()
    # experts that no token of this sequence came to
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and f"{name}.weight" not in found:
            found[f"{name}.weight"] = len(inputs)
            inputs.append(None)
    # a tied embedding is the output's matrix, too, and that is where its inputs matter
    found[_embedding_name(model)] = found.get(_tied_head(model) or "")
    return found


def _head_name(model) -> str | None:
    """Name of the output's weight."""
    head = model.get_output_embeddings()
    return next((f"{name}.weight" for name, module in model.named_modules() if module is head), None)


def _tied_head(model) -> str | None:
    """The same if it is the embedding."""
    head = model.get_output_embeddings()
    return _head_name(model) if head is not None and head.weight is model.get_input_embeddings().weight else None


def _embedding_name(model) -> str:
    embedding = model.get_input_embeddings()
    return next(f"{name}.weight" for name, module in model.named_modules() if module is embedding)


def _groups(sizes: dict[int, int], limit: int) -> list[list[int]]:
    """Sites in groups of at most limit bytes; a single one may be larger."""
    groups: list[list[int]] = []
    room = 0
    for site, size in sizes.items():
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1].append(site)
        room -= size
    return groups


class _Run:
    """One run over the text: Hessians of some sites, and with gradients the diagonals of all layers."""

    def __init__(self, model, sites: dict[str, int | None], with_gradients: bool) -> None:
        import torch

        self._torch = torch
        self._model = model
        self._with_gradients = with_gradients
        self._first: dict[int, str] = {}
        for name, site in sites.items():
            if site is not None:
                self._first.setdefault(site, name)
        self.hessians = {site: None for site in self._first}
        self._columns: dict[str, object] = {}
        self._rows: dict[str, object] = {}
        self._head: dict[str, object] = {}  # sum of p (1 - p) for each token of the vocabulary
        self._lookups = None  # sum of (dL/de)^2 for each token of the vocabulary
        self._tokens = None

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Within, `feed` gathers."""
        torch, handles = self._torch, []
        of_site = {name: site for site, name in self._first.items()}
        for name, module in self._model.named_modules():
            if isinstance(module, torch.nn.Linear):
                handles.append(module.register_forward_hook(self._look(f"{name}.weight", of_site.get(f"{name}.weight"))))
        if self._with_gradients:
            handles.append(self._model.get_input_embeddings().register_forward_hook(self._look_up))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _look(self, name: str, site: int | None):
        def hook(module, args, output):
            x = args[0].detach().reshape(-1, args[0].shape[-1]).float()
            if site is not None:
                product = x.T @ x
                self.hessians[site] = product if self.hessians[site] is None else self.hessians[site].add_(product)
            if self._with_gradients:
                _add(self._columns, name, x.square().sum(0))
                if output.requires_grad:
                    output.register_hook(lambda gradient: _add(self._rows, name, gradient.float().reshape(-1, gradient.shape[-1]).square().sum(0)))

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

    def diagonals(self, n_tokens: int) -> dict[str, np.ndarray]:
        """Means over the tokens, for `_load`."""
        arrays = {f"columns/{name}": value / n_tokens for name, value in self._columns.items()}
        arrays |= {f"rows/{name}": value / n_tokens for name, value in self._rows.items()}
        output = _head_name(self._model)
        if f"columns/{output}" in arrays:
            # the mean over what could have been drawn, instead of the one token of so many that was
            arrays[f"rows/{output}"] = self._head["rows"] / n_tokens
        for name, module in self._model.named_modules():  # zeros for experts that no token came to
            if isinstance(module, self._torch.nn.Linear):
                arrays.setdefault(f"columns/{name}.weight", self._torch.zeros(module.in_features))
                arrays.setdefault(f"rows/{name}.weight", self._torch.zeros(module.out_features))
        # A row of the embedding is what a token adds to the residual stream; where it is the output's row too, both count. In terms of
        # `rows` times the mean of `columns`, as for all other layers.
        embedding = self._model.get_input_embeddings()
        lookups = self._lookups / (n_tokens * embedding.embedding_dim)
        name, head = _embedding_name(self._model), _tied_head(self._model)
        arrays[f"columns/{name}"], arrays[f"rows/{name}"] = self._torch.ones(embedding.embedding_dim), lookups
        if head is not None:
            arrays[f"columns/{name}"] = arrays[f"columns/{head}"]
            arrays[f"rows/{name}"] = arrays[f"rows/{head}"] + lookups / arrays[f"columns/{head}"].mean()
        return {key: value.float().cpu().numpy() for key, value in arrays.items()}


def _add(sums: dict, name: str, value) -> None:
    sums[name] = sums[name].add_(value) if name in sums else value
