# SPDX-License-Identifier: MIT
"""Recipes: a name, a tensor type and a quantizer. They are data; to users they are what the types
of llama-quantize are."""

from __future__ import annotations

from dataclasses import dataclass

from entrollm_gguf.codec import EntropyType
from entrollm_gguf.errors import ConversionError


@dataclass(frozen=True)
class Recipe:
    """How the matrices of a model are quantized and coded. 1-D tensors stay F32 in every recipe.

    >>> RECIPES["EQ8"].bits_for(calibrated=False), RECIPES["EQ8"].bits_for(calibrated=True)
    (7.25, 6.25)
    """

    name: str
    kind: EntropyType
    quantizer: str  # as the file's metadata has it; key of entrollm_gguf.quant.QUANTIZERS unless by_rate
    summary: str  # one line for --help
    bits: float | None = None  # per entropy-coded weight, where by_rate
    calibrated_bits: float | None = None  # the same with calibration by a text; None means `bits`
    exact: bool = False  # no weight changes by a bit
    by_rate: bool = False  # a step is chosen for a size, and there is no fixed grid

    def bits_for(self, calibrated: bool) -> float | None:
        """Bits per entropy-coded weight that a conversion aims at, None for recipes with a fixed
        grid."""
        return self.calibrated_bits if calibrated and self.calibrated_bits is not None else self.bits


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "EQ8",
            EntropyType.EQ8,
            "step",
            "close to Q8_0 in quality: 7.25 bits per weight, 6.25 with calibration",
            7.25,
            6.25,
            by_rate=True,
        ),
        *(
            Recipe(f"EQ8-{bits}", EntropyType.EQ8, "step", f"{bits} bits per weight; {hint}", bits, by_rate=True)
            for bits, hint in (
                (6.0, "better with calibration"),
                (5.0, "better with calibration"),
                (4.5, "better with calibration"),
                (4.0, "better with calibration"),
                (3.5, "better with calibration; the loss shows"),
                (3.0, "the smallest; better with calibration, the loss is large"),
            )
        ),
        Recipe("EQ8-paper", EntropyType.EQ8, "paper", "EntroLLM uint8, published sign rule, one scale per tensor"),
        Recipe("EQ8-mixed", EntropyType.EQ8, "mixed", "8 bits, symmetric or asymmetric, whichever codes smaller"),
        Recipe("EQ8-rows", EntropyType.EQ8, "rows", "8 bits, symmetric, a scale for each row; close to lossless"),
        Recipe(
            "EQ8-kept", EntropyType.EQ8, "kept", "codes that an int8 or int4 checkpoint has, bit by bit (its default); the rest as EQ8-rows"
        ),
        Recipe("EQ4-paper", EntropyType.EQ4, "paper", "EntroLLM uint4; small, but the model's quality collapses"),
        Recipe("EQ4-mixed", EntropyType.EQ4, "mixed", "4 bits, symmetric or asymmetric; quality collapses as well"),
        Recipe("EQ4-rows", EntropyType.EQ4, "rows", "4 bits, symmetric, a scale for each row"),
        Recipe("EBF16", EntropyType.EBF16, "lossless", "bf16 checkpoints bit by bit, in about 11 bits; decoded at load", exact=True),
    )
}

#: What --bits and --size make; it has no fixed step, so it is not among the names.
RATE = Recipe("EQ8-rate", EntropyType.EQ8, "step", "a step chosen for the size that is wanted", by_rate=True)

DEFAULT_RECIPE = "EQ8"
DEFAULT_FOR_INTEGERS = "EQ8-kept"  # checkpoints whose weights are integers with a scale for each row


def find_recipe(name: str) -> Recipe:
    """The recipe of that name; case does not matter.

    Raises:
        ConversionError: there is none.
    """
    for recipe in RECIPES.values():
        if recipe.name.lower() == name.lower():
            return recipe
    raise ConversionError(f"{name}: no such recipe; choose one of {', '.join(RECIPES)}")
