# SPDX-License-Identifier: MIT
"""Instructions per weight of the compiled mat-vec kernels, from the disassembly of an object file.

The hot path of a kernel is the loop over units (32 columns). It is found as the shortest backward
branch around the products of one unit (8 for one column) that also fills the ring: the other loops
around products read words from global memory. It has two parts. Up to the last wait for copies it
keeps the ring filled, once for 32 symbols: that is every unit of EQ8 and every other unit of EQ4.
There, two small loops copy words; they count as often as a unit runs them, which follows from the
bits per weight: one round of the first for four full word rows, one of the second for a ragged word
row, taken as a tenth of all (lanes of 85 words that differ by some 5 %). The code before, between
and behind them counts as the shortest way from one to the next: into the first and past the second,
and for a tenth of the units into the second. In the units between (EQ4) the shortest way past all
of it counts. The rest decodes and multiplies.

    python bench/gpu/instructions.py OBJECT [--json]

Needs cuobjdump (CUDA toolkit, or PyPI's nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

COLUMNS = 32  # of a unit
BITS = {"EQ8": 5.3, "EQ4": 3.0}  # per weight
RAGGED = 0.1  # of the word rows
SYMBOLS_PER_FILL = 32


@dataclass(frozen=True)
class Loop:
    """The unit loop of one kernel instance."""

    kernel: str  # e.g. EQ8 x 1
    n_decode: int  # instructions that decode and multiply one unit
    n_fill: float  # and that keep the ring filled for it
    by_name: dict[str, int]  # each instruction of the loop once

    @property
    def decode_per_weight(self) -> float:
        """Instructions of a lane per weight, without those that fill the ring."""
        return self.n_decode / COLUMNS

    @property
    def per_weight(self) -> float:
        """All instructions of a lane per weight."""
        return (self.n_decode + self.n_fill) / COLUMNS


def disassemble(path: Path, cuobjdump: str = "cuobjdump") -> dict[str, list[tuple[int, str]]]:
    """Function name -> (address, instruction) in order."""
    text = subprocess.run([cuobjdump, "-sass", str(path)], check=True, capture_output=True, text=True).stdout
    functions: dict[str, list[tuple[int, str]]] = {}
    current: list[tuple[int, str]] = []
    for line in text.splitlines():
        if match := re.search(r"Function : (\S+)", line):
            current = functions.setdefault(match[1], [])
        elif match := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.+?);", line):
            current.append((int(match[1], 16), match[2].strip()))
    return functions


def loops(code: list[tuple[int, str]]) -> list[list[tuple[int, str]]]:
    """Bodies of all backward branches."""
    at = {address: i for i, (address, _) in enumerate(code)}
    found = []
    for i, (address, text) in enumerate(code):
        match = re.search(r"\bBRA(?:\.\S+)?\s+.*?(0x[0-9a-f]+)", text)
        if match and (target := int(match[1], 16)) <= address and target in at:
            found.append(code[at[target] : i + 1])
    return found


def name_of(instruction: str) -> str:
    """Opcode without predicate and modifiers."""
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0].split(".")[0]


def unit_loop(code: list[tuple[int, str]], n_products: int) -> list[tuple[int, str]]:
    """The loop over units, or an empty list."""
    fitting = []
    for body in loops(code):
        names = Counter(name_of(instruction) for _, instruction in body)
        products = sum("IDP.4A.U8.S8" in instruction for _, instruction in body)  # look-ups multiply unsigned bytes only
        # only the fast loop has the asynchronous copies of the ring
        if products == n_products and names["LDGSTS"] > 0:
            fitting.append(body)
    return min(fitting, key=len, default=[])


def shortest(code: list[tuple[int, str]], begin: int, end: int) -> int:
    """Instructions on the shortest way from number `begin` to number `end`, without the latter.
    Branches behind `end` lead to it."""
    at = {address: i for i, (address, _) in enumerate(code)}
    best = {begin: 0}
    for i in range(begin, end):  # branches backwards do not shorten anything
        if i not in best:
            continue
        text = code[i][1]
        match = re.search(r"\bBRA(?:\.\S+)?\s+.*?(0x[0-9a-f]+)", text)
        following = [] if match and not text.startswith("@") else [i + 1]
        if match and at.get(int(match[1], 16), -1) > i:
            following.append(min(at[int(match[1], 16)], end))
        for j in following:
            best[j] = min(best.get(j, best[i] + 1), best[i] + 1)
    return best[end]


def split(body: list[tuple[int, str]], kind: str) -> tuple[int, float]:
    """Instructions that a unit runs to decode and multiply, and to fill the ring."""
    at = {address: i for i, (address, _) in enumerate(body)}
    names = [name_of(instruction) for _, instruction in body]
    commit = names.index("LDGDEPBAR")
    end = max(i for i, name in enumerate(names) if name == "DEPBAR") + 1
    # each copying loop: its first instruction, and the one behind it
    inner = [(at[one[0][0]], at[one[-1][0]] + 1) for one in loops(body[:commit])]
    copying = sorted((begin, behind) for begin, behind in inner if "LDGSTS" in names[begin:behind])
    if len(copying) != 2 or "POPC" not in names[slice(*copying[1])] or shortest(body, *copying[0]) < copying[0][1] - copying[0][0]:
        raise SystemExit(
            f"{kind}: not a loop for full word rows and one for ragged ones before the copies are committed; the kernel has changed"
        )
    full, ragged = copying
    without = shortest(body, full[1], commit)
    around = shortest(body, 0, full[0]) + without + shortest(body, commit, end)
    around += RAGGED * (shortest(body, full[1], ragged[0]) + shortest(body, ragged[1], commit) - without)
    n_rows = BITS[kind] * COLUMNS / 32
    rounds = (full[1] - full[0]) * n_rows * (1 - RAGGED) / 4 + (ragged[1] - ragged[0]) * n_rows * RAGGED
    units = SYMBOLS_PER_FILL * {"EQ8": 1, "EQ4": 2}[kind] // COLUMNS
    skipped = shortest(body, 0, end) if units > 1 else 0  # spread over the units between
    return len(body) - end, (around + (units - 1) * skipped) / units + rounds


def count(path: Path, cuobjdump: str = "cuobjdump") -> list[Loop]:
    """All mat-vec kernels of an object file."""
    found = []
    for function, code in disassemble(path, cuobjdump).items():
        match = re.search(r"entropy_mat_vecIL9ggml_type(\d+)ELi(\d)E", function)
        if match is None:
            continue
        columns = int(match[2])
        body = unit_loop(code, 8 * columns)
        if not body:
            raise SystemExit(f"{path}: {function}: no loop over units; the kernel or the compiler has changed")
        names = Counter(name_of(instruction) for _, instruction in body)
        kind = {"500": "EQ8", "501": "EQ4"}[match[1]]
        found.append(Loop(f"{kind} x {columns}", *split(body, kind), dict(names.most_common())))
    return sorted(found, key=lambda loop: loop.kernel)


def main() -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("object", type=Path, help="compiled entropy.cu, for sm_80 or newer")
    parser.add_argument("--cuobjdump", default="cuobjdump")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = count(arguments.object, arguments.cuobjdump)
    if arguments.json:
        print(json.dumps([row(one) for one in found], indent=1))
        return
    for one in found:
        top = ", ".join(f"{name} {n}" for name, n in list(one.by_name.items())[:8])
        print(f"{one.kernel}: {one.per_weight:5.2f} instructions per weight, {one.decode_per_weight:.2f} without filling the ring ({top})")


def row(one: Loop) -> dict:
    """For JSON."""
    return {
        "kernel": one.kernel,
        "per_weight": round(one.per_weight, 2),
        "decode_per_weight": round(one.decode_per_weight, 2),
        "instructions": one.by_name,
    }


if __name__ == "__main__":
    main()
