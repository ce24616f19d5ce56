# SPDX-License-Identifier: MIT
"""What a file tells about its making."""

from __future__ import annotations

from typing import Any

from entrollm_gguf import __version__
from entrollm_gguf.convert.basis import Basis
from entrollm_gguf.convert.encode import TensorRecord
from entrollm_gguf.convert.fold import EXPONENT
from entrollm_gguf.convert.recipes import Recipe

FORMAT_VERSION = 2


def metadata(recipe: Recipe, records: tuple[TensorRecord, ...], basis: Basis) -> dict[str, Any]:
    """What the file tells about its making; keys in docs/metadata.md."""
    found = {
        "entrollm.version": __version__,
        "entrollm.format_version": FORMAT_VERSION,
        "entrollm.recipe": recipe.name,
        "entrollm.quantizer": recipe.quantizer,
        "entrollm.tensor.names": [r.name for r in records],
        "entrollm.tensor.schemes": [r.scheme for r in records],
    }
    if basis.statistics is not None:
        found["entrollm.calibration"] = basis.statistics.source
    if basis.folding.columns:
        found["entrollm.fold_exponent"] = str(EXPONENT)
    return found
