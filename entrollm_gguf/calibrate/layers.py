# SPDX-License-Identifier: MIT
"""The linear layers of a model, their inputs, and what is added up while the model runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np


def find_layers(model) -> dict[str, Any]:
    """Linear layers by the name of their weight."""
    import torch

    return {_weight_name(name): module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


def _weight_name(module: str) -> str:
    """The name that llama.cpp's converter gives a module's weight: of a model that reads pictures
    as well, the text part counts as the model."""
    return f"{module}.weight".replace("language_model.", "")


def find_sites(model, layers: dict[str, Any], tokens) -> dict[str, str | None]:
    """For each layer by name, the first layer that reads the same input; None for an embedding that
    is not tied. Layers that text does not reach, such as those for pictures, are left out."""
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
    # experts that no token of this sequence reached, if others of their kind were found
    kinds = {_kind(name) for name in found}
    found |= {name: name for name in layers if name not in found and _kind(name) in kinds}
    # a tied embedding is also the output's matrix, and only there does it have inputs that matter
    found[embedding_name(model)] = found.get(_tied_head(model) or "")
    return found


def _kind(name: str) -> str:
    """The name without numbers of layers and experts."""
    return re.sub(r"\.\d+(?=\.)", ".#", name)


def _head_name(model) -> str | None:
    """Name of the output's weight."""
    head = model.get_output_embeddings()
    return next((_weight_name(name) for name, module in model.named_modules() if module is head), None)


def _tied_head(model) -> str | None:
    """The same, if the embedding is used as the output."""
    head = model.get_output_embeddings()
    return _head_name(model) if head is not None and head.weight is model.get_input_embeddings().weight else None


def embedding_name(model) -> str:
    embedding = model.get_input_embeddings()
    return next(_weight_name(name) for name, module in model.named_modules() if module is embedding)


def group_sites(sizes: dict[str, int], limit: int) -> list[list[str]]:
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


class Run:
    """One run over the text: Hessians of some sites, and with gradients the diagonals of all
    layers.

    Args:
        layers: by the name of their weight.
        sites: of all layers that take part, from `find_sites`.
        group: sites whose Hessians are gathered.
    """

    def __init__(self, model, layers: dict[str, Any], sites: dict[str, str | None], group: list[str], with_gradients: bool) -> None:
        import torch

        self._torch = torch
        self._model = model
        self._layers = {name: layers[name] for name in sites if name in layers}  # without the embedding
        self._group = frozenset(group)
        self._with_gradients = with_gradients
        self._hessians: dict[str, Any] = {}  # sums over the tokens that reached a layer, as all others here
        self._n_tokens: dict[str, int] = {}  # that reached a layer: an expert gets few of all
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
        """Mean over the tokens that reached it, f32 (n_in, n_in); None if none did, or only
        zeros."""
        total = self._hessians.pop(site, None)  # pop: memory for the copy
        return None if total is None or not total.any() else total.div_(self._n_tokens[site]).cpu().numpy()

    def diagonals(self, n_tokens: int) -> dict[str, np.ndarray]:
        """Means over the tokens, for `read_complete`: of inputs over those that reached a layer, of
        gradients over all."""
        torch = self._torch
        arrays = {f"columns/{name}": value / self._n_tokens[name] for name, value in self._columns.items()}
        arrays |= {f"rows/{name}": value / n_tokens for name, value in self._rows.items()}
        output = _head_name(self._model)
        if f"columns/{output}" in arrays:
            # the mean over all tokens that could have been drawn, instead of the one that was
            arrays[f"rows/{output}"] = self._head["rows"] / n_tokens
        for name, module in self._layers.items():  # zeros for experts that no token reached
            arrays.setdefault(f"columns/{name}", torch.zeros(module.in_features))
            arrays.setdefault(f"rows/{name}", torch.zeros(module.out_features))
        # A row of the embedding is what a token adds to the residual stream; where it is the
        # output's row as well, both count. It is expressed as `rows` times the mean of `columns`,
        # like all other layers.
        embedding = self._model.get_input_embeddings()
        scale = float(getattr(embedding, "embed_scale", 1.0))  # some models multiply what they looked up (Gemma 3)
        lookups = self._lookups * (scale**2 / (n_tokens * embedding.embedding_dim))
        name, head = embedding_name(self._model), _tied_head(self._model)
        arrays[f"columns/{name}"], arrays[f"rows/{name}"] = torch.ones(embedding.embedding_dim), lookups
        if head is not None:
            arrays[f"columns/{name}"] = arrays[f"columns/{head}"]
            arrays[f"rows/{name}"] = arrays[f"rows/{head}"] + lookups / arrays[f"columns/{head}"].mean()
        return {key: value.float().cpu().numpy() for key, value in arrays.items()}


def _add(sums: dict, name: str, value) -> None:
    sums[name] = sums[name].add_(value) if name in sums else value
