# SPDX-License-Identifier: MIT
"""Packs what has to travel to a machine with a GPU: run.py, the patched sources as far as they are
built there, programs, tiny models, a text.

    python bench/gpu/pack.py build/gpu/entrollm-gpu.tar.xz [--arch 90]

Builds of this machine are not included, unless --arch names a GPU (90 for sm_90): then the programs
are (prebuild.py), and nothing is compiled there. The pack stays under 64 MiB (it has 23, 16 of them
tiny models; with programs 36), and is the same for the same sources. A name without .xz gives a
plain tar, for tests.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "bench" / "gpu")]

import objects  # noqa: E402
from models import build_tiny_model  # noqa: E402
from prebuild import PrebuildError, prebuild  # noqa: E402
from run import AVX512  # noqa: E402

from entrollm_gguf.convert.pipeline import convert_model  # noqa: E402
from entrollm_gguf.eval.demo_model import build_tokenizer, english_text, fetch_gguf  # noqa: E402
from entrollm_gguf.runtime import tree  # noqa: E402
from entrollm_gguf.runtime.fetch import fetch_sdist  # noqa: E402
from entrollm_gguf.runtime.paths import cache_folder, patches_folder  # noqa: E402
from entrollm_gguf.runtime.pin import read_pin  # noqa: E402

LIMIT = 64 << 20  # bytes
_PROGRAMS = ("harness.cu", "payload.h", "kernel-table.cpp", "synth-model.cpp", "peers.py")
# backends and tools that a CUDA build of a few programs does not need
_LEFT_OUT = tuple(
    f"ggml/src/ggml-{name}/"
    for name in (
        "vulkan",
        "metal",
        "sycl",
        "opencl",
        "cann",
        "webgpu",
        "hexagon",
        "openvino",
        "virtgpu",
        "zdnn",
        "zendnn",
        "et",
        "kleidiai",
    )
) + ("gguf-py/", "conversion/", "requirements/", "grammars/", "tools/ui/", ".github/")
# models for each kind of op: plain, without offsets, experts, tied embeddings
MODELS = (
    ("llama", "EQ8-rows"),
    ("llama", "EQ8-paper"),
    ("llama", "EQ4-rows"),
    ("llama", "EQ4-mixed"),
    ("qwen2_moe", "EQ8-rows"),
    ("qwen2_moe", "EQ4-mixed"),
)


def build(target: Path, tiny: tuple[tuple[str, str], ...] = MODELS, programs: list[Path] | None = None) -> int:
    """Write the pack with these tiny models and, if there are any, programs in place of their
    sources; returns its size in bytes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        scratch = Path(folder)
        pin = read_pin()
        tree.assemble(tree.unpacked_source(fetch_sdist(pin), pin), patches_folder(), scratch / "tree")
        models = scratch / "models"
        models.mkdir()
        _make_models(tiny, models, scratch)
        (scratch / "text.txt").write_text(english_text()[:40_000], encoding="utf-8")
        commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        (scratch / "pack.json").write_text(json.dumps({"commit": commit, "llama_cpp": pin.llama_cpp_commit}))

        part = target.with_name(target.name + ".part")
        with tarfile.open(part, "w:xz" if target.suffix == ".xz" else "w") as archive:
            _add(archive, ROOT / "bench" / "gpu" / "run.py", "run.py")  # the program that runs the rest
            llama_cpp = scratch / "tree" / tree.LLAMA_CPP
            for path in sorted(llama_cpp.rglob("*")) if programs is None else []:
                name = path.relative_to(llama_cpp).as_posix()
                if path.is_file() and not name.startswith(_LEFT_OUT):
                    _add(archive, path, f"llama.cpp/{name}")
            for path in programs or []:
                _add(archive, path, f"bin/{AVX512}/{path.name}" if path.parent.name == AVX512 else f"bin/{path.name}")
            for name in _PROGRAMS:
                _add(archive, ROOT / "bench" / "gpu" / name, f"gpu/{name}")
            for path in sorted(models.glob("*.gguf")):
                _add(archive, path, f"models/{path.name}")
            _add(archive, scratch / "text.txt", "text.txt")
            _add(archive, scratch / "pack.json", "pack.json")
        size = part.stat().st_size
        if size >= LIMIT:
            part.unlink()
            raise SystemExit(f"{target}: would have {size >> 20} MiB, more than {LIMIT >> 20}; leave out more of the tree")
        part.replace(target)
    return size


def _make_models(tiny: tuple[tuple[str, str], ...], folder: Path, scratch: Path) -> None:
    tokenizer = scratch / "tokenizer"
    build_tokenizer(fetch_gguf(cache_folder() / "models")).save_pretrained(tokenizer)
    made = {}
    for name, recipe in tiny:
        if name not in made:
            (scratch / name).mkdir()
            made[name] = build_tiny_model(name, scratch / name, tokenizer).folder
        convert_model(made[name], folder / f"{name}-{recipe}.gguf", recipe=recipe)


def _add(archive: tarfile.TarFile, path: Path, name: str) -> None:
    info = archive.gettarinfo(path, name)
    info.uid = info.gid = info.mtime = 0
    info.uname = info.gname = ""
    with open(path, "rb") as file:
        archive.addfile(info, file)


def main() -> None:
    """Pack, and say how large it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack", type=Path, metavar="FILE.tar.xz")
    parser.add_argument("--arch", help="build the programs here, for this architecture; takes an hour of two cores the first time")
    parser.add_argument("--cmake", nargs="*", default=[], metavar="-DNAME=VALUE", help="with --arch: more arguments of cmake")
    arguments = parser.parse_args()
    try:
        programs = prebuild(arguments.arch, arguments.cmake) if arguments.arch else None
    except (PrebuildError, objects.CompileError) as error:
        raise SystemExit(f"pack.py: {error}") from None
    print(f"{arguments.pack}: {build(arguments.pack, programs=programs) / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
