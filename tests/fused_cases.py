# SPDX-License-Identifier: MIT
"""Ops with entropy-coded weights for `test-entropy-ops`, and their right results by numpy.

Activations are chosen so that quantizing them to Q8_0 loses nothing (integers up to 127, each block
of 32 with its 127, times a power of two): then the results depend on the weights alone, which come
from the reference decoder.

`python fused_cases.py FILE` writes the cases without computing results, and once more with random
bodies, for the sanitizers.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np

from entrollm_gguf import codec
from entrollm_gguf.codec import EntropyType

LOW, HIGH = -128, 127


@dataclass(frozen=True)
class Case:
    """One op. `columns` None: GET_ROWS of `rows_wanted`; n_used: MUL_MAT_ID."""

    kind: EntropyType
    n_rows: int
    n_cols: int
    n_columns: int | None  # of src1; None: GET_ROWS
    n_slabs: int = 1
    n_used: int = 0  # experts per token; 0: no MUL_MAT_ID
    planes: int = 1  # ne2 of src1 per slab (broadcast)
    codes: str = "normal"
    offset: str = "none"  # none, one, row
    scale: str = "row"  # one, row
    tile_cols: int | None = None

    def __str__(self) -> str:
        op = "get_rows" if self.n_columns is None else "mul_mat_id" if self.n_used else "mul_mat"
        return f"{op}-{self.kind.name}-{self.n_rows}x{self.n_cols}x{self.n_slabs}-{self.n_columns}-{self.codes}-{self.scale}-{self.offset}"


def all_cases() -> list[Case]:
    """Every shape class, kind of table, mode and op."""
    cases = []
    for kind in filter(lambda kind: kind.is_quantized, EntropyType):
        for n_rows in (1, 15, 16, 17, 31, 32, 33):  # groups of 16 rows in files, of 32 on devices
            for n_cols in (32, 64, 576):
                cases += [Case(kind, n_rows, n_cols, n, offset=o) for n, o in ((1, "none"), (3, "row"), (40, "one"))]
        cases += [Case(kind, 65, 4096, n, offset=o, tile_cols=t) for n, o, t in ((1, "none", 512), (5, "row", None), (17, "none", 1024))]
        # columns are multiplied by fours, and up to 512 in a round
        cases += [Case(kind, 33, 96, n, offset=o) for n in (2, 3, 4, 5, 6, 7) for o in ("none", "row")]
        cases += [Case(kind, 17, 32, n, offset=o) for n, o in ((512, "none"), (513, "row"), (1030, "none"), (1030, "row"))]
        for codes in ("one symbol", "escapes", "uniform", "two symbols", "zero scale", "ragged"):
            for n_columns, offset in ((1, "none"), (9, "row")):
                cases.append(
                    Case(kind, 70, 576, n_columns, codes=codes, offset=offset, scale="one" if n_columns == 1 else "row", tile_cols=512)
                )
        # raw bits of every width: a normal distribution of codes that doubles in width with every
        # row more
        cases += [Case(kind, n_rows, 320, n, codes="bits of all kinds", offset="none") for n_rows in range(35, 42) for n in (1, 5)]
        # planes of src1 that share a slab, and stacks of matrices
        cases += [Case(kind, 40, 96, 3, planes=4), Case(kind, 40, 96, 3, n_slabs=3, planes=2, offset="row")]
        # experts: none of some, all of one, many tokens
        for n_experts, n_used, n_tokens in ((4, 2, 1), (5, 2, 7), (3, 1, 33), (8, 8, 2), (2, 1, 140)):
            cases.append(Case(kind, 33, 64, n_tokens, n_slabs=n_experts, n_used=n_used, offset="row" if n_used == 2 else "none"))
        for n_rows, n_cols, n_slabs in ((1, 32, 1), (33, 576, 1), (100, 2048, 1), (40, 64, 3)):
            cases += [Case(kind, n_rows, n_cols, None, n_slabs=n_slabs, offset=offset) for offset in ("none", "row")]
    # lanes of 255 words, the most there can be in the device layout
    cases.append(Case(EntropyType.EQ8, 32, 1024, 2, codes="longest lanes", tile_cols=1024))
    return cases


def make_codes(case: Case, rng: np.random.Generator) -> np.ndarray:
    """Codes int8 (n_slabs, n_rows, n_cols)."""
    low, high = case.kind.code_range
    shape = (case.n_slabs, case.n_rows, case.n_cols)
    if case.codes == "one symbol":
        return np.full(shape, 3, np.int8)
    if case.codes == "uniform":
        return rng.integers(low, high + 1, shape).astype(np.int8)
    if case.codes == "longest lanes":  # 242 symbols: all but 14 take 8 bits
        return rng.integers(low, low + 242, shape).astype(np.int8)
    if case.codes == "two symbols":
        return rng.choice(np.array([low, high], np.int8), shape)
    width = (high - low) / 16
    codes = np.clip(np.rint(rng.normal(0, width, shape)), low, high)
    if case.codes == "escapes":  # a narrow core and single codes far out
        codes = np.clip(np.rint(rng.normal(0, 1, shape)), low, high)
        far = rng.random(shape) < 0.004
        codes[far] = rng.integers(low, high + 1, int(far.sum()))
    if case.codes == "bits of all kinds":  # every width of raw bits in turn, by the slab's number of rows: see all_cases
        codes = np.clip(np.rint(rng.normal(0, width / 8 * 2.0 ** (case.n_rows % 7), shape)), low, high)
    if case.codes == "ragged":  # lanes of very different lengths
        codes *= (np.arange(case.n_rows) % 3 == 0)[None, :, None]
    return codes.astype(np.int8)


def make_columns(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Activations that are their own Q8_0, f32; the last dimension a multiple of 32."""
    blocks = rng.integers(-127, 128, (*shape[:-1], shape[-1] // 32, 32)).astype(np.float32)
    blocks[..., 0] = 127 * rng.choice((-1, 1), blocks.shape[:-1])
    scale = np.exp2(rng.integers(-9, -5, (*blocks.shape[:-1], 1))).astype(np.float32)
    return np.ascontiguousarray((blocks * scale).reshape(shape))


@dataclass
class Made:
    """A case with its data."""

    case: Case
    payload: np.ndarray
    codes: np.ndarray  # int8 (n_slabs, n_rows, n_cols)
    scales: np.ndarray  # f16 (n_slabs, 1 or n_rows)
    offsets: np.ndarray | None
    columns: np.ndarray | None  # f32 (planes, n_columns, n_cols)
    ids: np.ndarray | None  # i32

    @property
    def n_results(self) -> int:
        """Floats that the op gives."""
        if self.columns is None:
            return self.ids.size * self.case.n_cols
        n_columns = self.ids.size if self.ids is not None else self.columns.shape[0] * self.columns.shape[1]
        return n_columns * self.case.n_rows

    def largest(self) -> float:
        """The most that the absolute products of one of the columns with any weights of these
        scales and offsets can sum to."""
        weight = 128 * np.abs(self.scales.astype(np.float64)).max() + (0 if self.offsets is None else np.abs(self.offsets).max())
        return float(weight * np.abs(self.columns.astype(np.float64)).sum(axis=-1).max())

    def expected(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Result in f64 from weights (n_slabs, n_rows, n_cols), and per element the sum of absolute
        products, to which errors are relative."""
        if self.columns is None:
            rows = np.stack([weights[i][self.ids[i]] for i in range(self.case.n_slabs)])
            return rows, np.abs(rows)
        x = self.columns.astype(np.float64)
        if self.ids is None:
            slab = np.arange(x.shape[0]) // self.case.planes
            return np.einsum("prk,pck->pcr", weights[slab], x), np.einsum("prk,pck->pcr", np.abs(weights[slab]), np.abs(x))
        chosen = weights[self.ids]  # (token, slot, row, col)
        slots = x if x.shape[1] == self.case.n_used else np.repeat(x, self.case.n_used, axis=1)
        return np.einsum("tsrk,tsk->tsr", chosen, slots), np.einsum("tsrk,tsk->tsr", np.abs(chosen), np.abs(slots))


def make(case: Case, rng: np.random.Generator) -> Made:
    """Random data for a case."""
    codes = make_codes(case, rng)
    n_scales = case.n_rows if case.scale == "row" else 1
    scales = rng.uniform(0.001, 0.02, (case.n_slabs, n_scales)).astype(np.float16)
    if case.codes == "zero scale":
        scales[:, ::2] = 0
    offsets = None
    if case.offset != "none":
        # EQ4: offset - 8 * scale must be an f16; multiples of 8 times the scale make it one
        n_offsets = case.n_rows if case.offset == "row" else 1
        if case.offset == "one":
            scales = scales[:, :1]
        offsets = (8 * scales[:, :n_offsets].astype(np.float32)) * rng.integers(-1, 2, (case.n_slabs, n_offsets)).astype(np.float32)
    encoded = codec.encode(case.kind, codes, scales, offsets, tile_cols=case.tile_cols)

    columns = ids = None
    if case.n_columns is None:
        ids = rng.integers(0, case.n_rows, (case.n_slabs, 5)).astype(np.int32)
    elif case.n_used:
        ids = np.stack([rng.permutation(case.n_slabs)[: case.n_used] for _ in range(case.n_columns)]).astype(np.int32)
        n_slots = 1 if case.n_columns % 2 else case.n_used  # one column for all experts of a token, or one each
        columns = make_columns((case.n_columns, n_slots, case.n_cols), rng)
    else:
        columns = make_columns((case.n_slabs * case.planes, case.n_columns, case.n_cols), rng)
    return Made(case, encoded.payload, codes, scales, offsets, columns, ids)


def scrambled(made: list[Made], rng: np.random.Generator) -> list[Made]:
    """The cases with bodies of random bytes: in every other one mostly ones, so that tails are long
    and run into what follows them."""
    cases = []
    for i, one in enumerate(made):
        payload = one.payload.copy().reshape(one.case.n_slabs, -1)
        for slab in payload:
            begin, n_bytes = slab[80:96].view(np.uint64)  # format.md 5.1
            body = slab[int(begin) : int(begin) + int(n_bytes)]
            body[:] = rng.integers(250 * (i % 2), 256, len(body))
        cases.append(replace(one, payload=payload.reshape(one.payload.shape)))
    return cases


def write(path: Path, made: list[Made]) -> None:
    """The GGUF that test-entropy-ops reads."""
    writer = gguf.GGUFWriter(path, "test")
    for i, one in enumerate(made):
        shape = one.codes.shape if one.case.n_slabs > 1 else one.codes.shape[1:]
        writer.add_tensor(f"{i}.w", one.payload, raw_shape=shape, raw_dtype=gguf.GGMLQuantizationType[one.case.kind.name])
        if one.columns is not None:
            writer.add_tensor(f"{i}.x", one.columns)
        if one.ids is not None:
            writer.add_tensor(f"{i}.ids", one.ids)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    generator = np.random.default_rng(1)
    cases = [make(case, generator) for case in all_cases()]
    write(Path(sys.argv[1]), cases + scrambled(cases, generator))
