# SPDX-License-Identifier: MIT
"""Conversion of Hugging Face models to entropy-coded GGUF files. `convert_model` is the Python API;
`entrollm convert` the command."""

from entrollm_gguf.convert.pipeline import ConversionReport, convert_model
from entrollm_gguf.convert.recipes import DEFAULT_RECIPE, RECIPES, Recipe

__all__ = ["DEFAULT_RECIPE", "RECIPES", "ConversionReport", "Recipe", "convert_model"]
