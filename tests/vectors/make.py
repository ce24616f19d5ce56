# SPDX-License-Identifier: MIT
"""Golden vectors: small tensors with their payload and codes, for every decoder of docs/format.md (section 10).

    python tests/vectors/make.py     # writes this folder again; the only way that its files change

`index.json` has an entry per vector: `name`, `type`, `shape` (n_rows, n_cols or n_slabs, n_rows, n_cols), `scales` and `offsets` (hex of
little-endian f16 and f32, slab after slab, one or one per row; offsets may be null), `tile_cols`, `encoder`, `sha256` of the payload and `xxh64` of each
slab. `NAME.payload` is the tensor as it stands in a GGUF, `NAME.codes` its codes, one int8 each, row after row.

Random bytes come from SHAKE-256 of the vector's name: no library's generator has to stay as it is. `encoder: codec` means that this project's
codec makes these very bytes; `encoder: reference` are valid payloads of other tables than it would choose.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from reference.encoder import Class, encode_slab

from entrollm_gguf import codec
from entrollm_gguf.codec import EntropyType

FOLDER = Path(__file__).resolve().parent
EQ8, EQ4 = EntropyType.EQ8, EntropyType.EQ4

# two classes that overlap a third, and the escape over everything
OVERLAPPING: list[Class] = [(128, 3, 1), (120, 4, 2), (0, 8, 2)]
# the longest codes there are: the escape has a prefix of 7 bits and 8 extra bits
LONGEST: list[Class] = [(128, 0, 1), (129, 0, 2), (127, 0, 3), (130, 0, 4), (126, 0, 5), (131, 0, 6), (0, 8, 7), (125, 0, 7)]


@dataclass(frozen=True)
class Vector:
    """One vector. `codes` names a distribution of make_codes; `classes` is for the reference encoder, None for the codec."""

    name: str
    kind: EntropyType
    shape: tuple[int, ...]
    codes: str = "bell"
    scale: str = "one"  # one, row
    offset: str = "none"  # none, one, row
    tile_cols: int | None = None
    classes: list[Class] | None = None


def all_vectors() -> list[Vector]:
    """Both types; each mode of scale and offset; rows 1, 31, 32, 33; slices; slabs; tables of every kind."""
    vectors = []
    for kind in (EQ8, EQ4):
        stem = kind.name.lower()
        vectors += [
            Vector(f"{stem}-1x32", kind, (1, 32)),
            Vector(f"{stem}-31x64-offset-one", kind, (31, 64), offset="one"),
            Vector(f"{stem}-32x32-rows", kind, (32, 32), scale="row"),
            Vector(f"{stem}-33x96-rows-offset-rows", kind, (33, 96), scale="row", offset="row"),
            Vector(f"{stem}-33x160-short-slice", kind, (33, 160), tile_cols=64),
            Vector(f"{stem}-3x2x64-slabs", kind, (3, 2, 64), scale="row", offset="row"),
            Vector(f"{stem}-one-symbol", kind, (33, 32), codes="one symbol"),
            Vector(f"{stem}-zero-scale", kind, (2, 32), codes="zero scale", scale="row"),
            Vector(f"{stem}-escapes", kind, (33, 128), codes="escapes"),
            Vector(f"{stem}-uniform", kind, (8, 256), codes="uniform"),
            Vector(f"{stem}-ragged", kind, (40, 128), codes="ragged", scale="row"),
            Vector(f"{stem}-overlapping-classes", kind, (3, 64), codes="narrow", classes=OVERLAPPING, tile_cols=64),
            Vector(f"{stem}-longest-codes", kind, (33, 64), codes="uniform", classes=LONGEST, tile_cols=32),
        ]
    # 1024 codes of up to 15 bits fill more than 255 words: tile_cols is halved
    vectors.append(Vector("eq8-long-lane", EQ8, (4, 1024), codes="one far row", tile_cols=1024))
    return vectors


def random_bytes(name: str, n: int) -> np.ndarray:
    """n bytes that depend on the name alone, as int64."""
    return np.frombuffer(hashlib.shake_256(name.encode()).digest(n), np.uint8).astype(np.int64)


def make_codes(vector: Vector) -> np.ndarray:
    """Codes int8 of the vector's shape."""
    low, high = vector.kind.code_range
    n = int(np.prod(vector.shape))
    noise = random_bytes(vector.name, 5 * n).reshape(5, n)
    bell = (noise[:4].sum(axis=0) - 510) * (high + 1) // 1024  # four dice: within half of the range
    q = bell
    if vector.codes == "one symbol":
        q = np.full(n, 3)
    elif vector.codes == "uniform":
        q = noise[0] * (high - low + 1) // 256 + low
    elif vector.codes == "narrow":
        q = noise[0] % 16 - 8
    elif vector.codes == "escapes":  # a narrow core, single codes anywhere
        q = np.where(noise[4] < 8, noise[0] * (high - low + 1) // 256 + low, bell // max(1, (high + 1) // 8))
    elif vector.codes == "ragged":  # rows of zeros between others
        rows = np.arange(n) // vector.shape[-1]
        q = np.where(rows % 3 == 0, bell, 0)
    elif vector.codes == "one far row":
        q = np.where(np.arange(n) // vector.shape[-1] == 1, noise[0] + low, 0)
        q[: vector.shape[-1]] = bell[: vector.shape[-1]] // 32
    assert q.min() >= low and q.max() <= high
    return q.astype(np.int8).reshape(vector.shape)


def make_grid(vector: Vector) -> tuple[np.ndarray, np.ndarray | None]:
    """Scales f16 and offsets f32, both (n_slabs, 1 or n_rows). Offsets are multiples of the scale by 8, so that EQ4's minimum is an f16."""
    n_slabs, n_rows = (1, *vector.shape)[-3:-1]
    noise = random_bytes(vector.name + "/grid", 2 * n_slabs * n_rows).reshape(2, n_slabs, n_rows)
    scales = ((noise[0] + 1) / 4096).astype(np.float16)[:, : n_rows if vector.scale == "row" else 1]
    if vector.codes == "zero scale":
        scales = np.zeros_like(scales)
    if vector.offset == "none":
        return scales, None
    factors = (noise[1] % 3 - 1).astype(np.float32)[:, : n_rows if vector.offset == "row" else 1]
    return scales, 8 * scales.astype(np.float32) * factors


def make_payload(vector: Vector, codes: np.ndarray, scales: np.ndarray, offsets: np.ndarray | None) -> bytes:
    """The tensor as it stands in a GGUF."""
    if vector.classes is None:
        return codec.encode(vector.kind, codes, scales, offsets, tile_cols=vector.tile_cols).payload.tobytes()
    assert vector.tile_cols is not None and codes.ndim == 2
    kind = 1 if vector.kind is EQ8 else 2
    return encode_slab(codes, kind, scales[0], None if offsets is None else offsets[0], vector.tile_cols, vector.classes)


def write(folder: Path) -> None:
    """All vectors and their index."""
    index = []
    for vector in all_vectors():
        codes, (scales, offsets) = make_codes(vector), make_grid(vector)
        payload = make_payload(vector, codes, scales, offsets)
        slab_size = struct.unpack_from("<Q", payload, 16)[0]
        index.append(
            {
                "name": vector.name,
                "type": vector.kind.name,
                "shape": list(vector.shape),
                "scales": scales.astype("<f2").tobytes().hex(),
                "offsets": None if offsets is None else offsets.astype("<f4").tobytes().hex(),
                "tile_cols": vector.tile_cols,
                "encoder": "codec" if vector.classes is None else "reference",
                "sha256": hashlib.sha256(payload).hexdigest(),
                "xxh64": [payload[at + 8 : at + 16][::-1].hex() for at in range(0, len(payload), slab_size)],
            }
        )
        (folder / f"{vector.name}.payload").write_bytes(payload)
        (folder / f"{vector.name}.codes").write_bytes(codes.tobytes())
    (folder / "index.json").write_text(json.dumps(index, indent=1) + "\n")


if __name__ == "__main__":
    for old in [*FOLDER.glob("*.payload"), *FOLDER.glob("*.codes")]:
        old.unlink()
    write(FOLDER)
