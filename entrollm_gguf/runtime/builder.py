# SPDX-License-Identifier: MIT
"""The build: assemble the tree, run cmake once, pack wheels, keep them in the cache under the hash
of everything that went in.

Cache layout: `sources/` (downloads), `work/<options and toolchain>/` (tree and objects of the last
such build, for incremental rebuilds), and `runtime/<hash>/` (finished wheels, moved into place as a
whole).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from filelock import FileLock

from entrollm_gguf.errors import BuildError
from entrollm_gguf.progress import Say
from entrollm_gguf.runtime import install as installer
from entrollm_gguf.runtime import tree, wheels
from entrollm_gguf.runtime.fetch import fetch_sdist
from entrollm_gguf.runtime.locate import RuntimeInfo, info
from entrollm_gguf.runtime.paths import cache_folder, patches_folder
from entrollm_gguf.runtime.pin import Pin, read_pin

_CMAKE_OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "ON",
    # a wheel holds no links, so libraries have one name each, and find each other beside the
    # programs
    "CMAKE_PLATFORM_NO_VERSIONED_SONAME": "ON",
    "CMAKE_BUILD_WITH_INSTALL_RPATH": "ON",
    "CMAKE_INSTALL_RPATH": "$ORIGIN;$ORIGIN/../lib",
    "GGML_RPC": "ON",
    "LLAMA_BUILD_COMMON": "ON",
    "LLAMA_BUILD_TOOLS": "ON",
    "LLAMA_BUILD_SERVER": "ON",
    "LLAMA_BUILD_TESTS": "ON",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    # nothing is downloaded while building
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
    "LLAMA_OPENSSL": "OFF",  # but see BuildOptions.https
    "LLAMA_CURL": "OFF",
}
_UNITY = Path("cmake", "entropy-unity.cmake")  # in the tree; from the overlay
_PORTABLE = {
    "GGML_NATIVE": "OFF",
    "GGML_BACKEND_DL": "ON",  # every backend is a library of its own, loaded where it can run
    "GGML_CPU_ALL_VARIANTS": "ON",  # one CPU library for each kind of processor that upstream knows; the best is chosen at run time
    # OpenMP's library is not among those that manylinux allows, and PyTorch brings one of its own
    "GGML_OPENMP": "OFF",
}
# where CUDA's libraries lie if pip installed them, seen from llama_cpp/lib: CUDA 13's packages,
# CUDA 12's
_CUDA_FOLDERS = ("nvidia/cu13/lib", "nvidia/cublas/lib", "nvidia/cuda_runtime/lib")


@dataclass(frozen=True)
class BuildOptions:
    """Options of a build."""

    cuda: bool = False
    cuda_arch: str = "native"  # as CMAKE_CUDA_ARCHITECTURES takes it, e.g. "90" or "75;89"
    sanitize: str = ""  # "address" (AddressSanitizer and UBSan) or "thread" (ThreadSanitizer); never installed
    portable: bool = False  # for other machines of this kind, whatever their processor; packed, not installed
    tests: bool = False  # with upstream's test programs and the overlay's; portable builds always have them
    cmake: tuple[tuple[str, str], ...] = ()  # more cache variables, and others in place of ours

    def cmake_options(self) -> dict[str, str]:
        """Cache variables for cmake."""
        options = dict(_CMAKE_OPTIONS)
        if self.https:
            options["LLAMA_OPENSSL"] = "ON"
        if self.cuda:
            options |= {"GGML_CUDA": "ON", "GGML_CUDA_NCCL": "OFF", "CMAKE_CUDA_ARCHITECTURES": self.cuda_arch}
        if self.portable:
            options |= _PORTABLE
            if self.cuda:
                options["CMAKE_INSTALL_RPATH"] += "".join(f";$ORIGIN/../../{folder}" for folder in _CUDA_FOLDERS)
        if self.sanitize:
            options |= {
                "CMAKE_BUILD_TYPE": "RelWithDebInfo",
                # upstream's hundred model files take half an hour with instrumentation and -O2; its
                # assertions stay out, as in a release: they stop at a sum that is not a number,
                # which a damaged weight may give
                "CMAKE_C_FLAGS_RELWITHDEBINFO": "-O1 -g1 -DNDEBUG",
                "CMAKE_CXX_FLAGS_RELWITHDEBINFO": "-O1 -g1 -DNDEBUG",
                "GGML_OPENMP": "OFF",  # its runtime is not instrumented
                "LLAMA_BUILD_SERVER": "OFF",
                "GGML_RPC": "OFF",
            }
            checks = {"address": ("ADDRESS", "UNDEFINED"), "thread": ("THREAD",)}[self.sanitize]
            # each half of the tree has options of its own
            options |= {f"{half}_SANITIZE_{check}": "ON" for check in checks for half in ("GGML", "LLAMA")}
        return options | dict(self.cmake)

    @property
    def https(self) -> bool:
        """Whether llama.cpp's tools download over HTTPS (`-hf`). They do where OpenSSL can be
        linked, but not in wheels: one would hold a copy of it that no system updates."""
        return not self.portable and not self.sanitize and _has_openssl()

    @property
    def has_tests(self) -> bool:
        """Whether upstream's test programs and the overlay's are built."""
        return self.tests or self.portable or bool(self.sanitize)

    def targets(self) -> list[str]:
        """cmake targets, without the tests of the overlay."""
        if self.sanitize:
            return ["llama"] if self.sanitize == "address" else ["ggml"]
        return ["llama", "mtmd", *self.programs()]

    def programs(self) -> list[str]:
        """Tools, and upstream's tests if they are wanted, that go into the wheel."""
        programs = [*wheels.TOOLS.values(), *(wheels.TESTS if self.has_tests else ())]
        return [name for name in programs if not (self.portable and name in wheels.LINKED_TO_CPU)]


def build(
    options: BuildOptions | None = None, *, jobs: int | None = None, force: bool = False, say: Say = lambda line: None
) -> RuntimeInfo | Path:
    """Build the patched llama.cpp, unless the cache has it, and install it into this environment.
    One with test programs serves those who ask for none.

    Args:
        jobs: parallel compilations; None for all cores.
        force: build even if the cache has it.
        say: told what is going on, a line at a time.
    Returns:
        what is installed now; for builds that are not installed, a folder: of a sanitizer's
            programs and libraries, or of portable wheels.
    Raises:
        BuildError: a missing tool, a patch that does not apply, a compiler error.
        FetchError: the source cannot be downloaded.
    """
    options = options or BuildOptions()
    pin, patches = read_pin(), patches_folder()
    toolchain = require_tools(options)

    def entry(options: BuildOptions) -> tuple[str, Path]:
        digest = runtime_hash(pin, patches, options, toolchain)
        return digest, cache_folder() / "runtime" / digest

    digest, finished = entry(options)
    finished.parent.mkdir(parents=True, exist_ok=True)
    key = _work_key(options, toolchain)
    with _lock(key, say):
        with_tests = entry(replace(options, tests=True))
        if force:  # what a later call would prefer to this build is to go as well
            shutil.rmtree(with_tests[1], ignore_errors=True)
        elif _is_finished(with_tests[1], options):
            digest, finished = with_tests
        if force or not _is_finished(finished, options):
            shutil.rmtree(finished, ignore_errors=True)
            _build_into(finished, digest, pin, patches, options, toolchain, cache_folder() / "work" / key, jobs, say)
    if options.sanitize:
        return finished / "bin"
    if options.portable:
        return finished
    if not installer.is_installed(digest[:12]) or force:
        say("installing llama-cpp-python and gguf")
        installer.install(sorted(finished.glob("*.whl")))
    return info()


def _is_finished(folder: Path, options: BuildOptions) -> bool:
    """Whether a cache entry is whole: someone may have cleaned the cache by hand."""
    if not (folder / "complete").is_file():
        return False
    return (folder / "bin").is_dir() if options.sanitize else len(list(folder.glob("*.whl"))) == 2


@contextlib.contextmanager
def _lock(key: str, say: Say) -> Iterator[None]:
    """One build per kind of options at a time: they share a work folder."""
    lock = FileLock(cache_folder() / f"build-{key}.lock")
    if not _try(lock):
        say("waiting for another build on this machine")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _try(lock: FileLock) -> bool:
    from filelock import Timeout

    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    return True


# what cmake and the compilers take from the environment
_ENVIRONMENT = ("CC", "CXX", "CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS", "CUDACXX", "CUDAHOSTCXX", "CUDAFLAGS", "NVCC_PREPEND_FLAGS")


@dataclass(frozen=True)
class Toolchain:
    """What compiles, and for which processor: objects of another toolchain are of no use."""

    compiler: str  # version line of the C++ compiler
    others: tuple[str, ...] = ()  # version lines of the C compiler and, for CUDA, nvcc
    environment: tuple[tuple[str, str], ...] = ()  # variables that cmake reads
    processor: str = ""  # system, machine and, unless the build is portable, instruction sets

    def text(self) -> str:
        """All of it, for hashing."""
        return json.dumps(asdict(self), sort_keys=True)


def require_tools(options: BuildOptions) -> Toolchain:
    """Check that everything a build needs is there.

    Raises:
        BuildError: naming what is missing and how to get it.
    """
    found = {"CXX": os.environ.get("CXX") or _first("c++", "g++", "clang++"), "CC": _c_compiler()}
    for language, command in (("C++", found["CXX"]), ("C", found["CC"])):
        if not command or shutil.which(command.split()[0]) is None:
            raise BuildError(f"no {language} compiler; install one (apt-get install build-essential)")
    for name, remedy in (("cmake", "pip install cmake"), ("ninja", "pip install ninja"), ("git", "apt-get install git")):
        if find_program(name) is None:
            raise BuildError(f"{name} is missing; {remedy}")
    others = [_version(found["CC"])]
    if options.cuda:
        nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
        if nvcc is None:
            raise BuildError("nvcc is missing; install the CUDA toolkit and put its bin folder on PATH, or build without --cuda")
        others.append(_version(nvcc))
    environment = tuple((name, os.environ[name]) for name in _ENVIRONMENT if os.environ.get(name))
    processor = f"{platform.system()} {platform.machine()}" + ("" if options.portable else f" {_cpu_flags()}")
    return Toolchain(_version(found["CXX"]), tuple(others), environment, processor)


def _c_compiler() -> str | None:
    return os.environ.get("CC") or _first("cc", "gcc", "clang")


@functools.cache
def _has_openssl() -> bool:
    """Whether the C compiler finds OpenSSL's headers, of version 3 or newer as upstream wants."""
    compiler = _c_compiler()
    if compiler is None:
        return False
    program = "#include <openssl/ssl.h>\n#if OPENSSL_VERSION_NUMBER < 0x30000000L\n#error\n#endif\n"
    command = [*compiler.split(), "-fsyntax-only", "-x", "c", "-"]
    try:
        return subprocess.run(command, input=program, capture_output=True, text=True).returncode == 0
    except OSError:
        return False


def _first(*names: str) -> str | None:
    return next((name for name in names if shutil.which(name)), None)


def _version(command: str) -> str:
    result = subprocess.run([*command.split(), "--version"], capture_output=True, text=True)
    lines = [line for line in result.stdout.splitlines() if line.strip()] or [command]
    # nvcc begins with its name and a copyright; its release stands further down
    return next((line for line in lines if "release" in line), lines[0])


def find_program(name: str) -> str | None:
    """A program beside this Python (pip installed it) or on PATH."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.is_file() else shutil.which(name)


def runtime_hash(pin: Pin, patches: Path, options: BuildOptions, toolchain: Toolchain) -> str:
    """Hash of everything that goes into a build: pin, overlay, series, options, toolchain, and this
    code."""
    digest = hashlib.sha256()

    def add(label: str, data: bytes) -> None:
        digest.update(f"{label}\0{len(data)}\0".encode())
        digest.update(data)

    add("pin", json.dumps(asdict(pin), sort_keys=True).encode())
    for path in tree.overlay_files(patches):
        add(f"overlay/{path.as_posix()}", (patches / "overlay" / path).read_bytes())
    for path in tree.series(patches):
        add(f"series/{path.name}", path.read_bytes())
    add("options", json.dumps([options.cmake_options(), options.targets()], sort_keys=True).encode())
    add("toolchain", toolchain.text().encode())
    for module in ("builder.py", "tree.py", "wheels.py"):
        add(module, (Path(__file__).parent / module).read_bytes())
    return digest.hexdigest()


def _cpu_flags() -> str:
    """Instruction sets of the processor, where the system tells: a native build does not run on a
    lesser one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(("flags", "Features"))), "")


def _build_into(
    finished: Path,
    digest: str,
    pin: Pin,
    patches: Path,
    options: BuildOptions,
    toolchain: Toolchain,
    work: Path,
    jobs: int | None,
    say: Say,
) -> None:
    started = time.monotonic()
    say(f"source: {pin.package} {pin.version}")
    source = tree.unpacked_source(fetch_sdist(pin), pin)
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        staged = Path(scratch) / "tree"
        tree.assemble(source, patches, staged)
        say(f"tree: {len(tree.overlay_files(patches))} overlay files, {len(tree.series(patches))} patches")
        tree.sync(staged, work / "tree")
    output = _compile(work, options, jobs or os.cpu_count() or 1, say)
    say("packing")
    with tempfile.TemporaryDirectory(dir=finished.parent) as scratch:
        packed = Path(scratch) / "packed"
        packed.mkdir()
        if options.sanitize:
            shutil.copytree(output, packed / "bin", dirs_exist_ok=True)
        else:
            overlay_tests = (path.name for path in _overlay_tests(output)) if options.has_tests else ()
            programs = sorted({*options.programs(), *overlay_tests})
            manifest = {
                "hash": digest,
                "version": pin.version,
                "llama_cpp_commit": pin.llama_cpp_commit,
                "cuda": options.cuda,
                "cuda_arch": options.cuda_arch if options.cuda else "",
                "portable": options.portable,
                "https": options.https,
                "compiler": toolchain.compiler,
                "build_seconds": round(time.monotonic() - started, 1),
                "programs": programs,
            }
            cuda = wheels.cuda_requirements(toolchain.others[-1]) if options.portable and options.cuda else ()
            wheels.pack_llama_cpp(work / "tree", output, pin, manifest, cuda, Path(scratch), packed)
            wheels.pack_gguf(work / "tree", digest[:12], Path(scratch), packed)
        (packed / "complete").touch()
        packed.replace(finished)
    say(f"built in {time.monotonic() - started:.0f} s")


def _work_key(options: BuildOptions, toolchain: Toolchain) -> str:
    text = json.dumps(options.cmake_options(), sort_keys=True) + toolchain.text()
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _overlay_tests(output: Path) -> list[Path]:
    return sorted(path for path in output.glob("test-entropy-*") if path.is_file())


def _compile(work: Path, options: BuildOptions, jobs: int, say: Say) -> Path:
    """Configure and compile; returns the folder with programs and libraries."""
    build_folder, log = work / "build", work / "build.log"
    cmake = find_program("cmake")
    assert cmake is not None  # require_tools
    ninja = find_program("ninja")
    definitions = [f"-D{key}={value}" for key, value in options.cmake_options().items()]
    definitions.append(f"-DCMAKE_PROJECT_llama.cpp_INCLUDE={work / 'tree' / tree.LLAMA_CPP / _UNITY}")
    configure = [cmake, "-S", str(work / "tree" / tree.LLAMA_CPP), "-B", str(build_folder), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    log.unlink(missing_ok=True)
    say("configuring")
    _run([*configure, *definitions], log)
    available = subprocess.run([cmake, "--build", str(build_folder), "--target", "help"], capture_output=True, text=True).stdout
    # threads share work in ggml's ops; the other tests need all of llama.cpp
    wanted = r"test-entropy-ops" if options.sanitize == "thread" else r"test-entropy-[\w-]+"
    overlay_tests = sorted(set(re.findall(rf"^({wanted}):", available, re.MULTILINE))) if options.has_tests else []
    say(f"compiling with {jobs} jobs (log: {log})")
    _run([cmake, "--build", str(build_folder), "-j", str(jobs), "--target", *options.targets(), *overlay_tests], log)
    return build_folder / "bin"


def _run(command: list[str], log: Path) -> None:
    with open(log, "ab") as file:
        result = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    if result.returncode != 0:
        lines = log.read_text(errors="replace").splitlines()
        reason = next((line for line in lines if re.search(r"\berror\b|Error at", line)), lines[-1] if lines else "no output")
        raise BuildError(f"{log}: the build failed: {reason.strip()}")
