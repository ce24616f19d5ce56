# SPDX-License-Identifier: MIT
"""Compiles the CUDA sources of this project without a GPU and counts the instructions of the
mat-vec kernels.

    python bench/gpu/objects.py [OUT.json]

Objects only, for each architecture of ARCHITECTURES: entropy.cu, the patched ggml-cuda.cu, and
harness.cu; the other files are upstream's, unchanged. They are kept in the user's cache under the
hash of all that goes into them; without the cache they take 165 s of processor time, 63 of them for
harness.cu. Needs nvcc; cublas headers and a disassembler come from PyPI where the toolkit has none
(x86-64 Linux).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import instructions
from provenance import provenance

from entrollm_gguf.runtime import tree
from entrollm_gguf.runtime.fetch import fetch_from_wheel, fetch_sdist
from entrollm_gguf.runtime.paths import cache_folder, patches_folder
from entrollm_gguf.runtime.pin import read_pin

# Turing, the oldest that CUDA 13 knows; Orin; Hopper; Blackwell
ARCHITECTURES = ("75", "87", "90", "120")
SOURCES = ("entropy.cu", "ggml-cuda.cu", "harness.cu")
_HERE = Path(__file__).resolve().parent
_OURS = ("harness.cu", "payload.h")  # in this folder, not in the tree
# as ggml's CMake passes them
FLAGS = ("-std=c++17", "-O3", "-use_fast_math", "-extended-lambda", "-DGGML_CUDA_USE_GRAPHS", "-DNDEBUG", "-Werror=all-warnings")

# Instructions per weight on sm_90, in all and without filling the ring: what the compiler of CUDA
# 13.0 gives, plus a little. The goals are 11 and 6.5, filling the ring included.
BUDGET = {"EQ8 x 1": (10.4, 8.9), "EQ4 x 1": (6.2, 5.4)}

WHEELS = {
    "cublas": ("nvidia-cublas==13.0.2.14", "0cf238ffdbe46c00cb9aa98e7bca745c223a5ca5a53e686ac8b3e5a08fe80d6c", "nvidia/cu13/include/"),
    "cuobjdump": ("nvidia-cuda-cuobjdump==13.5.37", "38780fee50863252a0b8926357faa91615ca1c8346490563f33a06100cd73f58", "nvidia/cu13/bin/"),
    "nvdisasm": ("nvidia-cuda-nvdisasm==13.5.37", "d3fdbdd49fa53e2e4aacd3db8259d052bd2b049ececdcb69e92e083c6728e7ca", "nvidia/cu13/bin/"),
}


@dataclass(frozen=True)
class Object:
    """A compiled file."""

    source: str
    architecture: str
    path: Path


class CompileError(Exception):
    """nvcc is missing or refuses a source."""


def nvcc() -> str:
    """The compiler.

    Raises:
        CompileError: there is none.
    """
    wanted = os.environ.get("CUDACXX") or "nvcc"
    found = shutil.which(wanted)
    if found is None:
        raise CompileError(f"{wanted} is missing; install the CUDA toolkit and put its bin folder on PATH, or name the compiler in CUDACXX")
    return found


def _from_wheel(name: str) -> Path:
    requirement, sha256, prefix = WHEELS[name]
    return fetch_from_wheel(requirement, sha256, prefix, cache_folder() / "sources" / requirement.replace("==", "-")) / prefix


def _cublas_include() -> list[str]:
    toolkit = Path(nvcc()).resolve().parents[1]
    if any((folder / "cublas_v2.h").is_file() for folder in (toolkit / "include", toolkit / "targets" / "x86_64-linux" / "include")):
        return []
    return [f"-I{_from_wheel('cublas')}"]


def compile_objects(programs_for: tuple[str, ...] = ARCHITECTURES) -> list[Object]:
    """All sources for all architectures, taken from the cache where it has them; programs of this
    folder for fewer, if need be.

    Raises:
        CompileError: no nvcc, or an error or a warning in a source.
        FetchError: headers cannot be downloaded.
    """
    pin, patches = read_pin(), patches_folder()
    digest = hashlib.sha256(json.dumps([pin.sha256, FLAGS]).encode())
    digest.update(subprocess.run([nvcc(), "--version"], capture_output=True, check=True).stdout)
    for path in (*(patches / "overlay" / name for name in tree.overlay_files(patches)), *tree.series(patches)):
        digest.update(path.name.encode() + path.read_bytes())
    folder = cache_folder() / "cuda-objects" / digest.hexdigest()[:16]
    # a change of harness.cu leaves the other objects alone
    ours = hashlib.sha256(b"".join((_HERE / name).read_bytes() for name in _OURS)).hexdigest()[:16]
    folders = {source: folder / ours if source in _OURS else folder for source in SOURCES}
    wanted = [
        Object(source, one, folders[source] / f"sm_{one}-{source}.o")
        for source in SOURCES
        for one in (programs_for if source in _OURS else ARCHITECTURES)
    ]
    missing = [one for one in wanted if not one.path.is_file()]
    if missing:
        for path in folders.values():
            path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            source_tree = Path(scratch) / "tree"
            tree.assemble(tree.unpacked_source(fetch_sdist(pin), pin), patches, source_tree)
            ggml = source_tree / tree.LLAMA_CPP / "ggml"
            includes = [*(f"-I{ggml / part}" for part in ("src/ggml-cuda", "include", "src")), *_cublas_include()]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(lambda one: _compile(one, ggml / "src" / "ggml-cuda", includes, Path(scratch)), missing))
    return wanted


def _compile(one: Object, sources: Path, includes: list[str], scratch: Path) -> None:
    part = scratch / one.path.name
    source = (_HERE if one.source in _OURS else sources) / one.source
    command = [nvcc(), *FLAGS, f"-arch=sm_{one.architecture}", *includes, "-c", str(source), "-o", str(part)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        lines = (
            [line for line in result.stderr.splitlines() if "error" in line or "warning" in line]
            or result.stderr.splitlines()
            or ["no output"]
        )
        raise CompileError(f"{one.source} for sm_{one.architecture}: {lines[0]}")
    part.replace(one.path)


def count(objects: list[Object]) -> list[instructions.Loop]:
    """Instructions of the mat-vec kernels in the sm_90 object."""
    path = next(one.path for one in objects if one.source == "entropy.cu" and one.architecture == "90")
    cuobjdump = shutil.which("cuobjdump")
    if cuobjdump is None or shutil.which("nvdisasm") is None:
        cuobjdump = str(_from_wheel("cuobjdump") / "cuobjdump")
        disassembler = _from_wheel("nvdisasm") / "nvdisasm"
        for program in (Path(cuobjdump), disassembler):
            program.chmod(0o755)
        os.environ["PATH"] += os.pathsep + str(disassembler.parent)
    return instructions.count(path, cuobjdump)


def over_budget(loops: list[instructions.Loop]) -> list[str]:
    """Kernels that need more than they may, one line each."""
    found = []
    for loop in loops:
        most, most_decode = BUDGET.get(loop.kernel, (float("inf"), float("inf")))
        if loop.per_weight > most or loop.decode_per_weight > most_decode:
            found.append(
                f"{loop.kernel}: {loop.per_weight:.2f} instructions a weight ({loop.decode_per_weight:.2f} to decode), {most} ({most_decode}) allowed"
            )
    return found


def main() -> None:
    """Compile, count, compare."""
    try:
        objects = compile_objects()
    except CompileError as error:
        raise SystemExit(f"objects.py: {error}") from None
    for one in objects:
        print(f"{one.source} for sm_{one.architecture}: {one.path.stat().st_size >> 10} KB")
    loops = count(objects)
    for loop in loops:
        print(
            f"{loop.kernel}: {loop.per_weight:5.2f} instructions a weight on sm_90, {loop.decode_per_weight:5.2f} without filling the ring"
        )
    if len(sys.argv) > 1:
        path = Path(sys.argv[1])
        path.parent.mkdir(parents=True, exist_ok=True)
        version = subprocess.run([nvcc(), "--version"], capture_output=True, text=True).stdout.strip().splitlines()[-1]
        begun = provenance("python bench/gpu/objects.py OUT.json")
        report = {**begun, "nvcc": version, "architecture": "sm_90", "kernels": [instructions.row(one) for one in loops]}
        path.write_text(json.dumps(report, indent=1) + "\n")
    bad = over_budget(loops)
    if bad:
        raise SystemExit("\n".join(bad))


if __name__ == "__main__":
    main()
