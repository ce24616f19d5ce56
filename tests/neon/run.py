# SPDX-License-Identifier: MIT
"""Codec and CPU ops for aarch64, cross-compiled and run under qemu-user: `python tests/neon/run.py`
(`make test-neon`).

The golden vectors go through the portable C decoder and through that of every kernel level, neon
first; MUL_MAT, MUL_MAT_ID and GET_ROWS run at every level against numpy. The tests are those of
x86: test_fused_ops.py takes the program that ENTROLLM_OPS_COMMAND names.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from entrollm_gguf.runtime import tree
from entrollm_gguf.runtime.builder import find_program
from entrollm_gguf.runtime.fetch import fetch_sdist
from entrollm_gguf.runtime.paths import patches_folder
from entrollm_gguf.runtime.pin import read_pin

TESTS = Path(__file__).resolve().parents[1]
WORK = TESTS.parent / "build" / "neon"
TRIPLE = "aarch64-linux-gnu"
PACKAGES = {
    f"{TRIPLE}-gcc": "gcc-aarch64-linux-gnu",
    f"{TRIPLE}-g++": "g++-aarch64-linux-gnu",
    "qemu-aarch64": "qemu-user",
}
LEVELS = ["neon", "generic", "ref"]
OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "CMAKE_SYSTEM_NAME": "Linux",
    "CMAKE_SYSTEM_PROCESSOR": "aarch64",
    "CMAKE_C_COMPILER": f"{TRIPLE}-gcc",
    "CMAKE_CXX_COMPILER": f"{TRIPLE}-g++",
    "BUILD_SHARED_LIBS": "OFF",
    "CMAKE_EXE_LINKER_FLAGS": "-static",  # one file needs no libraries of the target
    "GGML_NATIVE": "OFF",
    "GGML_OPENMP": "OFF",
    "LLAMA_BUILD_TESTS": "ON",
    "LLAMA_BUILD_TOOLS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_SERVER": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_CURL": "OFF",
    "GGML_CPU_ARM_ARCH": "armv8.2-a+dotprod",  # what every Arm server and phone of the last years has
}


def run(*command: str | Path, **keywords) -> None:
    """Run a command; a failure ends the program with its exit code."""
    code = subprocess.run([str(part) for part in command], **keywords).returncode
    if code:
        sys.exit(code if code > 0 else 1)


def build() -> Path:
    """Both test programs; returns their folder."""
    pin = read_pin()
    with tempfile.TemporaryDirectory(dir=WORK) as scratch:
        staged = Path(scratch) / "tree"
        tree.assemble(tree.unpacked_source(fetch_sdist(pin), pin), patches_folder(), staged)
        tree.sync(staged / tree.LLAMA_CPP, WORK / "tree")
    folder = WORK / "build"
    cmake, definitions = find_program("cmake"), [f"-D{key}={value}" for key, value in OPTIONS.items()]
    assert cmake, "comes with the Python environment"
    run(cmake, "-S", WORK / "tree", "-B", folder, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={find_program('ninja')}", *definitions)
    run(cmake, "--build", folder, "--target", "test-entropy-ops")
    libraries = [next(folder.rglob(f"libggml-{part}.a")) for part in ("cpu", "base")]
    headers = [f"-I{WORK / 'tree' / 'ggml' / part}" for part in ("include", "src")]
    source, out = TESTS / "neon" / "decode-vector.cpp", folder / "bin" / "decode-vector"
    run(f"{TRIPLE}-g++", "-std=c++17", "-O2", "-Wall", "-static", *headers, source, *libraries, "-lm", "-o", out)
    return folder / "bin"


def main() -> None:
    """Build, decode the vectors, run the tests of the ops."""
    missing = [package for program, package in PACKAGES.items() if shutil.which(program) is None]
    if missing:
        sys.exit(f"test-neon: apt-get install {' '.join(missing)}")
    WORK.mkdir(parents=True, exist_ok=True)
    programs = build()
    ops = ["qemu-aarch64", str(programs / "test-entropy-ops")]
    levels = subprocess.run([*ops, "--levels"], capture_output=True, text=True, check=True).stdout.split()
    if levels != LEVELS:
        sys.exit(f"test-neon: the build has the kernel levels {' '.join(levels)}, not {' '.join(LEVELS)}")
    vectors = json.loads((TESTS / "vectors" / "index.json").read_text())
    for vector in vectors:
        n_slabs, n_rows, n_cols = (1, *vector["shape"])[-3:]
        files = [TESTS / "vectors" / f"{vector['name']}.{ending}" for ending in ("payload", "codes")]
        arguments = [vector["type"], str(n_cols), str(n_rows), str(n_slabs), vector["name"], *files]
        run("qemu-aarch64", programs / "decode-vector", *arguments)
    print(f"test-neon: {len(vectors)} golden vectors decoded bit-exactly at {len(levels)} levels")
    test = TESTS / "cross" / "test_fused_ops.py"
    run(sys.executable, "-m", "pytest", "-q", test, cwd=TESTS.parent, env={**os.environ, "ENTROLLM_OPS_COMMAND": shlex.join(ops)})
    print("test-neon: passed")


if __name__ == "__main__":
    main()
