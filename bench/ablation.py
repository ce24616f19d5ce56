# SPDX-License-Identifier: MIT
"""What each part of the rate quantizer brings: the same size with one part changed or left out.
`python bench/ablation.py OUT_FOLDER RESULTS.json [BITS ...]`.

Model, texts and measure are those of bench/quality.py, and OUT_FOLDER may be its folder. Parts are
changed through the constants that hold them, so that the code needs no switches for this.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import quality
from provenance import provenance

from entrollm_gguf.convert import basis, budget, pipeline, survey
from entrollm_gguf.convert.basis import Calibration
from entrollm_gguf.eval.perplexity import ReferenceLogits

CHUNKS = 8


@contextlib.contextmanager
def changed(target, **values) -> Iterator[None]:
    """Attributes of a module or class, for a while."""
    with contextlib.ExitStack() as stack:
        for name, value in values.items():
            stack.enter_context(mock.patch.object(target, name, value))
        yield


def folding_with(exponent: float):
    """Use another exponent of column equalisation."""
    plan = basis.plan_folding
    return changed(basis, plan_folding=lambda *args, **keywords: plan(*args, exponent=exponent, **keywords))


def without_feedback():
    """No Hessians."""
    return changed(survey, _hessian=lambda name, basis: None)


def embedding_with(factor: float):
    """Multiply the embedding's step by a factor, on top of what its sensitivity says."""
    own = budget.Survey.factor
    return changed(budget.Survey, factor=lambda self, name: own(self, name) * (factor if name == "token_embd.weight" else 1))


VARIANTS = {
    "all parts": contextlib.nullcontext,
    "no column equalisation": lambda: folding_with(0.0),
    "column equalisation, exponent 0.2": lambda: folding_with(0.2),
    "column equalisation, exponent 0.4": lambda: folding_with(0.4),
    "no error feedback": without_feedback,
    "rows alike": lambda: changed(budget, _BETWEEN_ROWS=0.0),
    "tensors alike": lambda: changed(budget, _BETWEEN_TENSORS=0.0),
    "tensors by all their sensitivity": lambda: changed(budget, _BETWEEN_TENSORS=1.0),
    "embedding's step x 0.8": lambda: embedding_with(0.8),
    "embedding's step x 1.25": lambda: embedding_with(1.25),
}


def main() -> None:
    """Make a file of each variant, measure it, and delete it."""
    if len(sys.argv) < 3:
        raise SystemExit("usage: ablation.py OUT_FOLDER RESULTS.json [BITS ...]")
    wanted = sys.argv[3:] or ["4"]
    begun = provenance(f"python bench/ablation.py OUT_FOLDER RESULTS.json {' '.join(wanted)}")
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    folder, reference_file = quality.make_reference(out)
    calibration = Calibration(text=out / "calibration.txt")
    rows = []
    with ReferenceLogits(reference_file, out / "scored.txt", chunks=CHUNKS) as reference:
        for bits in map(float, wanted):
            for name, variant in VARIANTS.items():
                path = out / "ablation.gguf"
                with variant():
                    pipeline.convert_model(folder, path, bits=bits, calibration=calibration, force=True)
                result = reference.compare(path)
                rows.append({"bits": bits, "variant": name, "bits_per_weight": quality.tensor_bits(path), **dataclasses.asdict(result)})
                print(
                    f"{bits} {name:36} {rows[-1]['bits_per_weight']:.3f} bits per weight, KLD {result.kld_mean:.4f} +- {result.kld_error:.4f}",
                    flush=True,
                )
                path.unlink()
    data = {**begun, "rows": rows, "chunks": CHUNKS}
    Path(sys.argv[2]).write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
