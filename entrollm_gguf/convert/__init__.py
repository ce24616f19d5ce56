# SPDX-License-Identifier: MIT
"""Conversion of Hugging Face models to entropy-coded GGUF files. `convert` is the Python API; `entrollm convert` the command."""

from entrollm_gguf.convert.pipeline import ConversionReport, convert
from entrollm_gguf.convert.recipes import DEFAULT_RECIPE, RECIPES, Recipe

__all__ = ["DEFAULT_RECIPE", "RECIPES", "ConversionReport", "Recipe", "convert"]
