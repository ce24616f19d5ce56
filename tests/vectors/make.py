# SPDX-License-Identifier: MIT
"""Golden vectors: small tensors with their payload and codes, for every decoder of docs/format.md
(section 10).

    python tests/vectors/make.py     # writes this folder again; the only way that its files change

`index.json` has an entry per vector: `name`, which is the tensor's name too, as the hash takes it
in; `type`, `shape` (n_rows, n_cols or n_slabs, n_rows, n_cols), `scales` and `offsets` (hex of
little-endian f16 and f32, slab after slab, one or one per row; offsets may be null), `tile_cols`,
`encoder`, `sha256` of the payload, `xxh64` of each slab, `codes`, the parameters of each slab's
code (raw_bits, bin_bits, tail, base and class_base), and `lanes_sha256` of the device layout
(section 8), all slabs. `NAME.payload` is the tensor as it stands in a GGUF, `NAME.codes` its codes,
one int8 each, row after row.

Random bytes come from SHAKE-256 of the vector's name: no library's generator has to stay as it is.
Vectors of EBF16 have an index of their own, `ebf16.json` (`write_ebf16`).

`encoder: codec` means that this project's codec makes exactly these bytes; `encoder: reference`
marks valid payloads of other codes than it would choose, whose device layout has more room than it
needs.
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

from reference.decoder import Code, parse_code
from reference.encoder import encode_tensor, make_code

from entrollm_gguf import codec
from entrollm_gguf.codec import EntropyType

FOLDER = Path(__file__).resolve().parent
EQ8, EQ4 = EntropyType.EQ8, EntropyType.EQ4

# one code per number of raw bits, with all kinds of k, both tail shapes, and a direct interval off
# the middle, so that classes are used
CODES_BY_RAW_BITS = {
    1: make_code(1, 0, 2, 0),
    2: make_code(2, 1, 1, -2),
    3: make_code(3, 0, 2, -5),
    4: make_code(4, 3, 1, -5),
    5: make_code(5, 2, 2, -30),
    6: make_code(6, 4, 1, 4),
    7: make_code(7, 6, 2, -90),
    8: make_code(8, 0, 0, 77),
}
# a class over the direct interval, two that overlap, one that wraps around, and one that is not
# used
OVERLAPPING = make_code(4, 2, 2, -6, bins=(-6, 4, 7, 9, 126, -20))
# only code 100 is direct, and it does not occur: all weights are open, and most go through all
# planes
ALL_OPEN = make_code(1, 0, 2, 100)


@dataclass(frozen=True)
class Vector:
    """One vector. `codes` names a distribution of make_codes; `code` is for the reference encoder,
    None for the codec."""

    name: str
    kind: EntropyType
    shape: tuple[int, ...]
    codes: str = "bell"
    scale: str = "one"  # one, row
    offset: str = "none"  # none, one, row
    tile_cols: int | None = None
    code: Code | None = None


def all_vectors() -> list[Vector]:
    """Both types; each mode of scale and offset; rows 1, 15, 16, 17, 33; slabs; codes of every
    kind."""
    vectors = []
    for kind in (EQ8, EQ4):
        stem = kind.name.lower()
        vectors += [
            Vector(f"{stem}-1x32", kind, (1, 32)),
            Vector(f"{stem}-15x64-offset-one", kind, (15, 64), offset="one"),
            Vector(f"{stem}-16x32-rows", kind, (16, 32), scale="row"),
            Vector(f"{stem}-17x96-rows-offset-rows", kind, (17, 96), scale="row", offset="row"),
            Vector(f"{stem}-17x32-offset-rows", kind, (17, 32), offset="row"),
            Vector(f"{stem}-33x32-rows-offset-one", kind, (33, 32), scale="row", offset="one"),
            Vector(f"{stem}-33x160-short-slice", kind, (33, 160), tile_cols=64),
            Vector(f"{stem}-3x2x64-slabs", kind, (3, 2, 64), scale="row", offset="row"),
            Vector(f"{stem}-2x17x32-slabs-of-other-codes", kind, (2, 17, 32), codes="slabs"),
            Vector(f"{stem}-one-symbol", kind, (33, 32), codes="one symbol"),
            Vector(f"{stem}-zero-scale", kind, (2, 32), codes="zero scale", scale="row"),
            Vector(f"{stem}-far", kind, (33, 128), codes="far"),
            Vector(f"{stem}-uniform", kind, (8, 256), codes="uniform"),
            Vector(f"{stem}-ragged", kind, (40, 128), codes="ragged", scale="row"),
            # more than 256 columns: kernels decode so many at a time
            Vector(f"{stem}-2x544", kind, (2, 544)),
            Vector(f"{stem}-overlapping-classes", kind, (3, 64), codes="narrow", code=OVERLAPPING, tile_cols=64),
            Vector(f"{stem}-all-open", kind, (16, 64), codes="open", code=ALL_OPEN, tile_cols=32),
        ]
        vectors += [
            Vector(f"{stem}-raw-bits-{raw_bits}", kind, (17, 64), codes="uniform", code=code, tile_cols=32)
            for raw_bits, code in CODES_BY_RAW_BITS.items()
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
        q = np.clip(noise[0] % 18 - 8, low, high)
    elif vector.codes == "open":  # at the classes of ALL_OPEN and beside them, as far as the type goes
        q = np.clip(noise[0] % 16 + 92, low, high)
        q[q == 100] = low
    elif vector.codes == "far":  # a narrow core, single codes anywhere
        q = np.where(noise[4] < 8, noise[0] * (high - low + 1) // 256 + low, bell // max(1, (high + 1) // 8))
    elif vector.codes == "ragged":  # rows of zeros between others
        rows = np.arange(n) // vector.shape[-1]
        q = np.where(rows % 3 == 0, bell, 0)
    elif vector.codes == "slabs":  # a wide one and a narrow one
        q = np.where(np.arange(n) < n // 2, noise[0] * (high - low + 1) // 256 + low, bell // 8)
    elif vector.codes == "one far row":
        q = np.where(np.arange(n) // vector.shape[-1] == 1, noise[0] + low, 0)
        q[: vector.shape[-1]] = bell[: vector.shape[-1]] // 32
    assert q.min() >= low and q.max() <= high
    return q.astype(np.int8).reshape(vector.shape)


def make_grid(vector: Vector) -> tuple[np.ndarray, np.ndarray | None]:
    """Scales f16 and offsets f32, both (n_slabs, 1 or n_rows). Offsets are multiples of a scale by
    8, so that EQ4's minimum is an f16."""
    n_slabs, n_rows = (1, *vector.shape)[-3:-1]
    noise = random_bytes(vector.name + "/grid", 2 * n_slabs * n_rows).reshape(2, n_slabs, n_rows)
    scales = ((noise[0] + 1) / 4096).astype(np.float16)[:, : n_rows if vector.scale == "row" else 1]
    if vector.codes == "zero scale":
        scales = np.zeros_like(scales)
    if vector.offset == "none":
        return scales, None
    n_offsets = n_rows if vector.offset == "row" else 1
    factors = (noise[1] % 3 - 1).astype(np.float32)[:, :n_offsets]
    return scales, 8 * scales[:, :n_offsets].astype(np.float32) * factors


def make_payload(vector: Vector, codes: np.ndarray, scales: np.ndarray, offsets: np.ndarray | None) -> bytes:
    """The tensor as it stands in a GGUF."""
    if vector.code is None:
        return codec.encode(vector.kind, codes, scales, offsets, name=vector.name, tile_cols=vector.tile_cols).payload.tobytes()
    assert vector.tile_cols is not None and codes.ndim == 2
    kind = 1 if vector.kind is EQ8 else 2
    offsets = None if offsets is None else offsets[None]
    return encode_tensor(codes[None], kind, scales, offsets, name=vector.name, code=vector.code, tile_cols=vector.tile_cols)


def parameters(slab: bytes) -> dict:
    """Of the code of a slab, for the index."""
    code = parse_code(slab[96:112])
    return {"raw_bits": code.raw_bits, "bin_bits": code.bin_bits, "tail": code.tail, "base": code.base, "class_base": list(code.class_base)}


def write(folder: Path) -> None:
    """All vectors and their index."""
    index = []
    for vector in all_vectors():
        codes, (scales, offsets) = make_codes(vector), make_grid(vector)
        payload = make_payload(vector, codes, scales, offsets)
        slab_size = struct.unpack_from("<Q", payload, 16)[0]
        slabs = [payload[at : at + slab_size] for at in range(0, len(payload), slab_size)]
        device = codec.Payload(vector.kind, np.frombuffer(payload, np.uint8), vector.shape, vector.name).to_lanes()
        index.append(
            {
                "name": vector.name,
                "type": vector.kind.name,
                "shape": list(vector.shape),
                "scales": scales.astype("<f2").tobytes().hex(),
                "offsets": None if offsets is None else offsets.astype("<f4").tobytes().hex(),
                "tile_cols": vector.tile_cols,
                "encoder": "codec" if vector.code is None else "reference",
                "sha256": hashlib.sha256(payload).hexdigest(),
                "xxh64": [slab[8:16][::-1].hex() for slab in slabs],
                "codes": [parameters(slab) for slab in slabs],
                "lanes_sha256": hashlib.sha256(device.tobytes()).hexdigest(),
            }
        )
        (folder / f"{vector.name}.payload").write_bytes(payload)
        (folder / f"{vector.name}.codes").write_bytes(codes.tobytes())
    (folder / "index.json").write_text(json.dumps(index, indent=1) + "\n")


#: name -> shape: rows that fill a group and do not, slabs, and more than 256 columns
EBF16_VECTORS = {
    "ebf16-1x32": (1, 32),
    "ebf16-33x160": (33, 160),
    "ebf16-2x544": (2, 544),
    "ebf16-2x17x32-slabs": (2, 17, 32),
    "ebf16-any-bits": (16, 64),
}


def make_bf16(name: str) -> np.ndarray:
    """Weights as the 16 bits of a bf16 each: exponents of a bell around 2^-6 with single ones
    anywhere, or any bits."""
    shape = EBF16_VECTORS[name]
    n = int(np.prod(shape))
    noise = random_bytes(name, 7 * n).reshape(7, n)
    if name == "ebf16-any-bits":
        return (noise[0] << 8 | noise[1]).astype(np.uint16).reshape(shape)
    exponents = np.where(noise[4] < 4, noise[5], 121 + (noise[:4].sum(axis=0) - 510) // 128)
    return (exponents << 7 | (noise[6] & 128) << 8 | noise[6] & 127).astype(np.uint16).reshape(shape)


def write_ebf16(folder: Path) -> None:
    """Vectors of EBF16 and their index, `ebf16.json`: `NAME.bf16` are the weights, u16 each."""
    index = []
    for name, shape in EBF16_VECTORS.items():
        bits = make_bf16(name)
        codes, rests = split_bf16(bits)
        payload = codec.encode(EntropyType.EBF16, codes, np.zeros(1, np.float16), rests=rests, name=name).payload.tobytes()
        index.append({"name": name, "shape": list(shape), "sha256": hashlib.sha256(payload).hexdigest()})
        (folder / f"{name}.payload").write_bytes(payload)
        (folder / f"{name}.bf16").write_bytes(bits.astype("<u2").tobytes())
    (folder / "ebf16.json").write_text(json.dumps(index, indent=1) + "\n")


def split_bf16(bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes int8 and rests uint8 of 5.8."""
    codes = ((bits >> 7 & 255).astype(int) - 128).astype(np.int8)
    return codes, (bits >> 8 & 128 | bits & 127).astype(np.uint8)


if __name__ == "__main__":
    for old in [*FOLDER.glob("*.payload"), *FOLDER.glob("*.codes"), *FOLDER.glob("*.bf16")]:
        old.unlink()
    write_ebf16(FOLDER)
    write(FOLDER)
