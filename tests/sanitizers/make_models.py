# SPDX-License-Identifier: MIT
"""Small entropy-coded models for the loader's damage tests: `python make_models.py FOLDER`. Prints
their paths."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from models import build_tiny_model

from entrollm_gguf.convert.pipeline import convert_model


def main(folder: Path) -> None:
    """Convert one tiny model with an 8-bit, a 4-bit and the lossless recipe."""
    logging.disable(logging.WARNING)
    model = build_tiny_model("mistral", folder / "model", folder)
    for recipe in ("EQ8-paper", "EQ4-mixed", "EBF16"):
        path = folder / f"{recipe}.gguf"
        convert_model(model.folder, path, recipe=recipe, force=True)
        print(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
