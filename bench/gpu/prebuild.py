# SPDX-License-Identifier: MIT
"""Builds, without a GPU, what run.py would otherwise build on the machine that has one, where time
is expensive.

The programs need that machine's driver, cublas and cudart, and its C library must not be older than
the one here. The CPU part is for x86-64 with AVX2. The build folder stays in the user's cache, so
that a small change compiles little.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import objects
from run import AVX512, COMMON, PROGRAMS, generator

from entrollm_gguf.runtime import tree
from entrollm_gguf.runtime.fetch import fetch_from_wheel, fetch_sdist
from entrollm_gguf.runtime.paths import cache_folder, patches_folder
from entrollm_gguf.runtime.pin import read_pin

_HERE = Path(__file__).resolve().parent
# The driver's library comes with a driver. These are the functions that ggml calls, for the linker
# only.
_DRIVER = [
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuGetErrorString",
    "cuMemAddressFree",
    "cuMemAddressReserve",
    "cuMemCreate",
    "cuMemGetAllocationGranularity",
    "cuMemMap",
    "cuMemRelease",
    "cuMemSetAccess",
    "cuMemUnmap",
]
_CPU = tuple(f"-DGGML_{name}=ON" for name in ("SSE42", "AVX", "AVX2", "BMI2", "FMA", "F16C"))
# the instruction sets of stock types' kernels on the CPU of that machine, if it has them
_CPU_AVX512 = (*_CPU, *(f"-DGGML_{name}=ON" for name in ("AVX512", "AVX512_VBMI", "AVX512_VNNI")))


class PrebuildError(Exception):
    """A compiler or linker failed; the message is what it said."""


def prebuild(architecture: str, cmake: list[str]) -> list[Path]:
    """Programs and libraries for GPUs of one architecture (90 for sm_90), all in one folder and
    finding each other there. More arguments may go to cmake: -DGGML_CUDA_FA=OFF leaves out flash
    attention, which takes half of the time.

    Raises:
        PrebuildError: a program cannot be built.
        FetchError: sources or libraries cannot be downloaded.
    """
    pin = read_pin()
    work = cache_folder() / "work" / f"gpu-sm_{architecture}"
    source = work / "tree"
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        tree.assemble(tree.unpacked_source(fetch_sdist(pin), pin), patches_folder(), Path(scratch) / "tree")
        tree.sync(Path(scratch) / "tree", source)
    llama_cpp, build, binaries = source / tree.LLAMA_CPP, work / "build", work / "build" / "bin"
    requirement, sha256, _ = objects.WHEELS["cublas"]  # here the libraries, too
    folder = cache_folder() / "sources" / (requirement.replace("==", "-") + "-all")
    cublas = fetch_from_wheel(requirement, sha256, "nvidia/cu13/", folder) / "nvidia/cu13"
    driver = work / "libcuda.so"
    (work / "driver.c").write_text("".join(f"int {name}(void) {{ return 999; }}\n" for name in _DRIVER))
    _run("gcc", "-shared", "-Wl,-soname,libcuda.so.1", work / "driver.c", "-o", driver)
    libraries = {name: cublas / "lib" / f"lib{name}.so.13" for name in ("cublas", "cublasLt")}
    _run(
        "cmake", "-S", llama_cpp, "-B", build, *generator(), *COMMON, *_CPU, "-DGGML_NATIVE=OFF", "-DGGML_CUDA=ON", "-DGGML_CUDA_NCCL=OFF",
        f"-DCMAKE_CUDA_ARCHITECTURES={architecture}-real", f"-DCMAKE_CUDA_COMPILER={objects.nvcc()}", f"-DCMAKE_CUDA_FLAGS=-I{cublas / 'include'}",
        f"-DCUDA_cuda_driver_LIBRARY={driver}", *(f"-DCUDA_{name}_LIBRARY={path}" for name, path in libraries.items()),
        "-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON", "-DCMAKE_INSTALL_RPATH=$ORIGIN", "-DCMAKE_EXE_LINKER_FLAGS=-Wl,--allow-shlib-undefined",
        *cmake,
    )  # fmt: skip
    _run("cmake", "--build", build, "-j", str(os.cpu_count()), "--target", *PROGRAMS)
    other = work / "build-avx512"
    _run(
        "cmake",
        "-S",
        llama_cpp,
        "-B",
        other,
        *generator(),
        *COMMON,
        *_CPU_AVX512,
        "-DGGML_NATIVE=OFF",
        "-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON",
    )
    _run("cmake", "--build", other, "-j", str(os.cpu_count()), "--target", "ggml-cpu")
    (binaries / AVX512).mkdir(exist_ok=True)
    shutil.copy(other / "bin" / "libggml-cpu.so.0", binaries / AVX512)
    includes = [f"-I{llama_cpp / 'ggml' / part}" for part in ("include", "src", "src/ggml-cuda")]
    link = [f"-L{binaries}", "-lggml-base", "-lpthread"]
    _run(
        objects.nvcc(), "-std=c++17", "-O3", "-use_fast_math", f"-arch=sm_{architecture}", "-lineinfo", *includes, _HERE / "harness.cu", "-o", binaries / "harness",
        *link, "-Xlinker", "-rpath=$ORIGIN",
    )  # fmt: skip
    for name in ("kernel-table", "synth-model"):
        _run("g++", "-std=c++17", "-O2", *includes, _HERE / f"{name}.cpp", "-o", binaries / name, "-lggml", *link, "-lggml", "-lggml-base", "-Wl,-rpath,$ORIGIN", "-Wl,--allow-shlib-undefined")  # fmt: skip
    return sorted(path for path in binaries.rglob("*") if path.is_file())


def _run(*words: str | Path) -> None:
    command = [str(word) for word in words]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode != 0:
        lines = [line for line in result.stdout.splitlines() if "rror" in line] or result.stdout.splitlines() or ["no output"]
        raise PrebuildError(f"{Path(command[0]).name}: {lines[0]}")


if __name__ == "__main__":
    for path in prebuild(sys.argv[1], sys.argv[2:]):
        print(f"{path}: {path.stat().st_size >> 10} KB")
