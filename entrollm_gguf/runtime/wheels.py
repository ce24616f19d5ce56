# SPDX-License-Identifier: MIT
"""Packing the built runtime as ordinary wheels, so that pip installs, replaces and removes it like
any other package.

llama_cpp_python carries the Python binding, the shared libraries, the tools and llama.cpp's
converter; gguf is the tree's own, patched. The tools lie in `llama_cpp/bin`; console scripts of the
same names start them.
"""

from __future__ import annotations

import json
import re
import shutil
import sysconfig
import tomllib
from pathlib import Path

from wheel.wheelfile import WheelFile

from entrollm_gguf.runtime.pin import Pin
from entrollm_gguf.runtime.tree import LLAMA_CPP

#: command -> program in llama_cpp/bin
TOOLS = {
    "llama-completion": "llama-completion",
    "llama-cli": "llama-cli",
    "llama-server": "llama-server",
    "llama-bench": "llama-bench",
    "llama-perplexity": "llama-perplexity",
    "llama-quantize": "llama-quantize",
    "llama-imatrix": "llama-imatrix",
    "llama-gguf-split": "llama-gguf-split",
    "llama-export-lora": "llama-export-lora",
    "llama-tokenize": "llama-tokenize",
    "rpc-server": "ggml-rpc-server",
}
TESTS = ("test-backend-ops", "test-gguf", "test-quantize-fns")
# These call functions of the CPU's library directly, so upstream builds them only where there is
# one such library.
LINKED_TO_CPU = ("llama-export-lora", "test-quantize-fns")

MANIFEST = "entrollm_runtime.json"

_LAUNCHER = '''# SPDX-License-Identifier: MIT
"""Console scripts of llama.cpp's tools: each replaces itself by the program of its name in `bin/`."""

import os
import sys
from pathlib import Path

PROGRAMS = {programs}


def run() -> None:
    name = Path(sys.argv[0]).name.removesuffix(".exe")
    program = Path(__file__).resolve().parent / "bin" / PROGRAMS[name]
    os.execv(program, [name, *sys.argv[1:]])
'''


def cuda_requirements(nvcc: str) -> tuple[str, ...]:
    """Packages with CUDA's libraries, for a wheel that goes to other machines.

    Args:
        nvcc: the line of `nvcc --version` with its release; libraries of the same major version
            fit.
    """
    found = re.search(r"release (\d+)\.", nvcc)
    major = int(found[1]) if found else 0
    if major < 12:
        return ()  # no packages that we know of
    suffix = "-cu12" if major == 12 else ""
    return tuple(f"{name}{suffix}>={major},<{major + 1}" for name in ("nvidia-cublas", "nvidia-cuda-runtime"))


def pack_llama_cpp(
    tree: Path, build_bin: Path, pin: Pin, manifest: dict, more_requirements: tuple[str, ...], scratch: Path, out: Path
) -> Path:
    """The llama_cpp_python wheel.

    Args:
        build_bin: cmake's output folder with programs and libraries side by side.
        manifest: written into the package, for `entrollm runtime info`.
        more_requirements: packages that pip has to install besides.
    """
    root = scratch / "llama_cpp_python"
    package = root / "llama_cpp"
    shutil.copytree(tree / "llama_cpp", package, ignore=shutil.ignore_patterns("lib", "__pycache__"))
    for kind, names in (("lib", _libraries(build_bin)), ("bin", manifest["programs"])):
        (package / kind).mkdir()
        for name in names:
            shutil.copy2(build_bin / name, package / kind / name)
    converter = package / "convert"
    converter.mkdir()
    shutil.copytree(tree / LLAMA_CPP / "conversion", converter / "conversion", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy2(tree / LLAMA_CPP / "convert_hf_to_gguf.py", converter)
    _add_licenses(tree, package / "licenses")
    commands = {name: program for name, program in TOOLS.items() if program in manifest["programs"]}
    (package / "entrollm_tools.py").write_text(_LAUNCHER.format(programs=json.dumps(commands)))
    (package / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")

    version = f"{pin.version}+entrollm.{manifest['hash'][:12]}"
    requires = ("typing-extensions>=4.5.0", "numpy>=1.20.0", "diskcache>=5.6.1", "jinja2>=2.11.3", *more_requirements)
    scripts = {name: "llama_cpp.entrollm_tools:run" for name in commands}
    tag = "py3-none-" + re.sub(r"[-.]", "_", sysconfig.get_platform())
    return _pack(root, "llama_cpp_python", version, tag, requires, scripts, out)


def pack_gguf(tree: Path, short_hash: str, scratch: Path, out: Path) -> Path:
    """The gguf wheel, from the tree's patched gguf-py."""
    source = tree / LLAMA_CPP / "gguf-py"
    root = scratch / "gguf"
    shutil.copytree(source / "gguf", root / "gguf", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy2(source / "LICENSE", root / "gguf" / "LICENSE")
    project = tomllib.loads((source / "pyproject.toml").read_text())["project"]
    # the editor needs Qt, which nothing else here needs
    scripts = {name: target for name, target in project["scripts"].items() if "gui" not in name}
    requires = tuple(re.sub(r"\s*\(([^)]*)\)", r"\1", line) for line in project["dependencies"])
    return _pack(root, "gguf", f"{project['version']}+entrollm.{short_hash}", "py3-none-any", requires, scripts, out)


def _add_licenses(tree: Path, folder: Path) -> None:
    """Licences of all that the libraries are made of, under the paths of the sources."""
    llama_cpp = tree / LLAMA_CPP
    for path in (tree / "LICENSE.md", llama_cpp / "LICENSE", *llama_cpp.glob("licenses/*"), *llama_cpp.glob("vendor/**/LICENSE*")):
        target = folder / path.relative_to(tree)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
    ours = Path(__file__).resolve().parents[2] / "LICENSE"
    if ours.is_file():  # in a checkout; an installed package has it beside its metadata
        (folder / "entrollm-gguf").mkdir()
        shutil.copy2(ours, folder / "entrollm-gguf" / "LICENSE")


def _libraries(build_bin: Path) -> list[str]:
    """Shared libraries; the build has no versioned names and so no links among them."""
    return sorted(p.name for p in build_bin.iterdir() if p.is_file() and re.search(r"\.(so|dylib|dll)$", p.name))


def _pack(root: Path, name: str, version: str, tag: str, requires: tuple[str, ...], scripts: dict[str, str], out: Path) -> Path:
    info = root / f"{name}-{version}.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", "License: MIT"]
    (info / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {r}" for r in requires)]) + "\n")
    pure = "true" if tag.endswith("-any") else "false"
    (info / "WHEEL").write_text(f"Wheel-Version: 1.0\nGenerator: entrollm-gguf\nRoot-Is-Purelib: {pure}\nTag: {tag}\n")
    entries = "\n".join(f"{command} = {target}" for command, target in sorted(scripts.items()))
    (info / "entry_points.txt").write_text(f"[console_scripts]\n{entries}\n")
    path = out / f"{name}-{version}-{tag}.whl"
    with WheelFile(path, "w") as wheel:
        wheel.write_files(str(root))
    return path
