# SPDX-License-Identifier: MIT
"""Weights that a graph of llama.cpp views, reshapes or multiplies by elements: coded in a hostile
file, they are decoded at load or refused by name, never worse."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from handmade import recode, write_gemma3n, write_gemma4, write_rwkv6, write_rwkv7
from running import Outcome, Trial, outcomes

from entrollm_gguf.codec import EntropyType
from entrollm_gguf.convert.pipeline import convert_model
from entrollm_gguf.inspect.decode import decode_file
from entrollm_gguf.inspect.verify import verify_file

NO_MATRIX = "tensor '{}' is entropy-coded, but to this model it is no weight of a matrix product and no table of rows: convert the file again"  # fmt: skip
# An architecture, parts of the names of its weights that are no matrices of products, and a weight
# that its graph views. Whatever else has a width that can be coded computes.
CASES = [
    (write_rwkv6, ("norm", "bias", "time_mix_ln", "lerp", "time_mix_first", "time_mix_decay.weight"), "blk.0.time_mix_w2.weight"),
    (write_rwkv7, ("norm", "bias", "time_mix_ln", "lerp", "_w0.", "_a0.", "_v0.", "_k_k", "_k_a", "_r_k"), "blk.0.time_mix_w2.weight"),
    (write_gemma3n, ("norm", "scale"), "per_layer_token_embd.weight"),
    (write_gemma4, ("norm",), "per_layer_token_embd.weight"),
]
NAMES = [write.__name__.removeprefix("write_") for write, *_ in CASES]


def nmse(found: np.ndarray, right: np.ndarray) -> float:
    return float(np.square(found - right).sum() / np.square(right).sum())


def all_names(plain: Path) -> list[str]:
    """Tensors that a file can hold in a coded type."""
    return [t.name for t in gguf.GGUFReader(plain).tensors if t.shape[0] % 32 == 0 and (len(t.shape) < 4 or t.shape[3] == 1)]


def candidates(plain: Path) -> list[str]:
    """Those of one layer, and of none; the values of rwkv7's first layer are not used."""
    return [name for name in all_names(plain) if "blk." not in name or name.startswith("blk.1." if "time_mix_v" in name else "blk.0.")]


@pytest.mark.parametrize("write, refused, viewed", CASES, ids=NAMES)
def test_every_weight_alone(write, refused, viewed, tmp_path):
    """And all that compute at once; given tokens and, as for images, vectors."""
    plain = write(tmp_path / "plain.gguf")
    names = candidates(plain)
    assert viewed in names and len(names) > 20
    made = {name: (name,) for name in names} | {"all": tuple(n for n in all_names(plain) if not any(part in n for part in refused))}
    files = {label: recode(plain, tmp_path / f"{label}.gguf", recoded) for label, recoded in made.items()}
    assert verify_file(files["all"]).problems == ()
    are_refused = {label for label in made if any(part in label for part in refused)}
    decoded = {label: tmp_path / f"{label}-decoded.gguf" for label in made if label not in are_refused}
    for label, out in decoded.items():
        decode_file(files[label], out)

    trials = [Trial(path, mode, embeddings) for path in files.values() for mode in ("load", "fused") for embeddings in (False, True)]
    trials += [Trial(path, "", embeddings) for path in decoded.values() for embeddings in (False, True)]
    found = dict(zip(trials, outcomes(trials), strict=True))
    for label, path in files.items():
        for embeddings in (False, True):
            for mode in ("load", "fused"):
                one = found[Trial(path, mode, embeddings)]
                if label in are_refused:
                    assert one == Outcome(NO_MATRIX.format(label), None)
                else:
                    right = found[Trial(decoded[label], "", embeddings)]
                    assert one.refusal is None and nmse(one.logits, right.logits) < 1e-5, (label, mode)


@pytest.mark.parametrize("write, refused, viewed", CASES, ids=NAMES)
def test_the_same_in_sixteen_bits(write, refused, viewed, tmp_path):
    """EBF16 becomes BF16 in either mode, which graphs may view."""
    plain, path, decoded = write(tmp_path / "plain.gguf"), tmp_path / "coded.gguf", tmp_path / "decoded.gguf"
    names = tuple(n for n in all_names(plain) if not any(part in n for part in refused))
    assert viewed in names
    norm = next(n for n in all_names(plain) if "norm" in n)
    bad = recode(plain, tmp_path / "bad.gguf", (norm,), kind=EntropyType.EBF16)
    decode_file(recode(plain, path, names, kind=EntropyType.EBF16), decoded)
    trials = [Trial(one, mode, vectors) for vectors in (False, True) for one, mode in ((decoded, ""), (path, "load"), (path, "fused"))]
    *found, last = outcomes([*trials, Trial(bad)])
    assert last == Outcome(NO_MATRIX.format(norm), None)
    for right, load, fused in (found[:3], found[3:]):
        assert np.array_equal(load.logits, right.logits) and np.array_equal(fused.logits, right.logits)


def test_four_dimensions_are_refused(tmp_path):
    """rwkv's fused lerps: whatever a payload holds, its header knows three."""
    plain = write_rwkv6(tmp_path / "plain.gguf")
    path = recode(plain, tmp_path / "coded.gguf", ("blk.0.time_mix_lerp_fused.weight",))
    for found in outcomes([Trial(path, "load"), Trial(path, "fused")]):
        assert "failed to load model" in found.refusal
    with pytest.raises(Exception, match=r"coded\.gguf.*time_mix_lerp_fused"):
        verify_file(path)


@pytest.mark.parametrize("write, refused, viewed", CASES, ids=NAMES)
def test_the_converter_leaves_them_alone(write, refused, viewed, tmp_path):
    plain, out = write(tmp_path / "plain.gguf"), tmp_path / "out.gguf"
    types = {t.name: t.type_name for t in convert_model(plain, out, recipe="EQ8-rows").tensors}
    coded = {name for name, type_name in types.items() if type_name == "EQ8"}
    assert len(coded) > 10 and types[viewed] == ("Q8_0" if "embd" in viewed else "F32")
    if "rwkv" in write.__name__:  # their large matrices are among them
        assert {f"blk.0.time_mix_{part}.weight" for part in ("key", "value", "receptance", "output")} <= coded
    assert not [name for name in coded if any(part in name for part in refused)]
    right, found = outcomes([Trial(plain), Trial(out, "fused")])
    assert found.refusal is None and nmse(found.logits, right.logits) < 0.01
