# SPDX-License-Identifier: MIT
"""`entrollm runtime build | wheel | info | check | tree | export`."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path

import click

from entrollm_gguf import runtime as api
from entrollm_gguf.errors import BuildError
from entrollm_gguf.runtime.builder import BuildOptions, require_tools, runtime_hash
from entrollm_gguf.runtime.paths import patches_folder
from entrollm_gguf.runtime.pin import read_pin


@click.group()
def runtime() -> None:
    """Build the patched llama.cpp, and show what is installed."""


@runtime.command(
    short_help="Build the patched llama.cpp and install it.",
    epilog="\b\nExamples:\n  entrollm runtime build\n  entrollm runtime build --cuda --cuda-arch 89\n",
)
@click.option("--cuda", is_flag=True, help="With the CUDA backend; needs the CUDA toolkit.")
@click.option("--cuda-arch", default="native", show_default=True, help="CUDA architectures, as CMAKE_CUDA_ARCHITECTURES takes them.")
@click.option("--jobs", type=click.IntRange(min=1), default=lambda: os.cpu_count(), help="Parallel compilations; all cores by default.")
@click.option("--force", is_flag=True, help="Build again even if the cache has it.")
@click.option(
    "--sanitize",
    type=click.Choice(["address", "thread"]),
    help="For developers: with AddressSanitizer and UBSan, or with ThreadSanitizer; its folder is printed, nothing is installed.",
)
@click.option("--tests", is_flag=True, help="For developers: with upstream's test programs and our own.")
def build(cuda: bool, cuda_arch: str, jobs: int, force: bool, sanitize: str | None, tests: bool) -> None:
    """Build the patched llama.cpp and install it into this environment.

    Takes the pinned source of llama-cpp-python (downloaded once), adds the entropy-coded types,
    builds once, and installs the packages llama_cpp and gguf and llama.cpp's tools. The result is
    cached: a second call, or another clone of the same state, takes seconds.
    """
    options = BuildOptions(cuda=cuda, cuda_arch=cuda_arch, sanitize=sanitize or "", tests=tests)
    result = api.build(options, jobs=jobs, force=force, say=lambda line: click.echo(line, err=True))
    if isinstance(result, Path):
        click.echo(result)
    else:
        click.echo(
            f"runtime {result.hash[:12]}: llama-cpp-python {result.version}, {len(result.programs)} programs in {result.folder / 'bin'}"
        )


@runtime.command(
    short_help="Make wheels for other machines.",
    epilog="\b\nExamples:\n  entrollm runtime wheel\n  entrollm runtime wheel --cuda 90 --out build/wheels-cuda\n",
)
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default=Path("build/wheels"), show_default=True, help="Folder of the index."
)
@click.option("--cuda", metavar="ARCHITECTURES", help="With CUDA for these, as 90 or 75;89. Needs nvcc, cublas and the driver's library.")
@click.option("--jobs", type=click.IntRange(min=1), default=lambda: os.cpu_count(), help="Parallel compilations; all cores by default.")
@click.option("--force", is_flag=True, help="Build again even if the cache has it.")
@click.option("--cmake", multiple=True, metavar="NAME=VALUE", help="One more variable for cmake, as GGML_CUDA_FA=OFF; repeatable.")
def wheel(out: Path, cuda: str | None, jobs: int, force: bool, cmake: tuple[str, ...]) -> None:
    """Make wheels of llama_cpp, gguf and this package that run on other machines, and a package
    index of them.

    ggml's CPU code is built for every kind of x86-64 processor that it knows, and the best is
    chosen at run time. What the machines need, how to install, and what the platform tag means:
    docs/wheels.md. The build took 45 minutes of one core's time on a Zen 3; it is cached.
    """
    from entrollm_gguf.runtime.portable import make_wheels

    definitions = []
    for one in cmake:
        name, equals, value = one.partition("=")
        if not (name and equals):
            raise click.BadParameter(f"{one!r} is not NAME=VALUE", param_hint="--cmake")
        definitions.append((name, value))
    if cuda is not None and not re.fullmatch(r"\d+[af]?(-real|-virtual)?(;\d+[af]?(-real|-virtual)?)*", cuda):
        raise click.BadParameter(f"{cuda!r} is no list of architectures, as 90 or 75;89", param_hint="--cuda")
    options = BuildOptions(cuda=cuda is not None, cuda_arch=cuda or "native", portable=True, cmake=tuple(definitions))
    for made in make_wheels(out, options, jobs=jobs, force=force, say=lambda line: click.echo(line, err=True)):
        click.echo(f"{made} ({made.stat().st_size / 1e6:.1f} MB)")
    click.echo(f"index: {out / 'index.html'}; versions: {out / 'requirements.txt'}")


@runtime.command(short_help="Tell what is installed.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(as_json: bool) -> None:
    """Tell what is installed, and whether it matches the patches of this checkout."""
    installed = api.info()
    options = BuildOptions(
        cuda=installed.cuda,
        **({"cuda_arch": installed.cuda_arch} if installed.cuda else {}),
        portable=installed.portable,
        tests=any(name.startswith("test-") for name in installed.programs),
    )
    try:
        matches = runtime_hash(read_pin(), patches_folder(), options, require_tools(options)) == installed.hash
    except BuildError:
        matches = None  # the hash covers the compiler, and a machine that only runs models needs none
    if installed.portable and not matches:
        matches = None  # another compiler made it, most likely
    if as_json:
        data = {**dataclasses.asdict(installed), "folder": str(installed.folder), "matches_checkout": matches}
        click.echo(json.dumps(data, indent=2))
        return
    unknown = "built elsewhere" if installed.portable else "without a compiler here"
    relation = {True: "matches", False: "differs from", None: f"{unknown}, cannot be compared with"}[matches]
    click.echo(f"llama-cpp-python {installed.version}, llama.cpp {installed.llama_cpp_commit}")
    click.echo(f"hash      {installed.hash[:12]} ({relation} this checkout)")
    click.echo(f"CUDA      {f'yes, for {installed.cuda_arch}' if installed.cuda else 'no'}")
    variants = sorted(path.name for path in (installed.folder / "lib").glob("libggml-cpu-*"))
    click.echo(f"CPU       {f'any, {len(variants)} variants' if variants else 'this one'}")
    click.echo(f"HTTPS     {'yes' if installed.https else 'no: downloads, as by -hf, do not work'}")
    click.echo(f"compiler  {installed.compiler}; built in {installed.build_seconds:.0f} s")
    click.echo(f"package   {installed.folder}")
    click.echo(f"programs  {', '.join(installed.programs)}")


@runtime.command(short_help="For developers: try the patches on another version of llama-cpp-python.")
@click.option(
    "--source", "sdist", type=click.Path(path_type=Path), required=True, help="A source distribution, llama_cpp_python-VERSION.tar.gz."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def check(sdist: Path, as_json: bool) -> None:
    """For developers: try the overlay and every patch on another version of llama-cpp-python, and
    say which fails where.

    The exit code is 1 if anything does not fit. docs/upgrading.md tells how to go on.
    """
    from entrollm_gguf.runtime.check import check_source

    found = check_source(sdist)
    if as_json:
        click.echo(json.dumps({**dataclasses.asdict(found), "fits": found.fits}, indent=2))
    else:
        for one in found.patches:
            said = (
                f"fails at {', '.join(one.failures)}"
                if one.failures
                else "applies" + (f", moved by up to {one.offset} lines" if one.offset else "")
            )
            click.echo(f"{one.name}: {said}")
        for name in found.overwritten:
            click.echo(f"overlay: {name} is upstream's, too")
    if not found.fits:
        raise click.exceptions.Exit(1)


@runtime.command(short_help="For developers: write the patched tree as a git repository.")
@click.argument("folder", type=click.Path(path_type=Path))
def tree(folder: Path) -> None:
    """For developers: write the llama.cpp tree with all patches as a git repository.

    One commit for the pinned source, one for the overlay, one per patch. Edit, commit or rebase,
    then `entrollm runtime export FOLDER`.
    """
    from entrollm_gguf.runtime.develop import make_tree

    make_tree(folder)
    click.echo(f"{folder}: edit and commit, then `entrollm runtime export {folder}`")


@runtime.command(short_help="For developers: write such a tree back as patches.")
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
def export(folder: Path) -> None:
    """For developers: write the commits of a tree back as patches, and its overlay files back to
    the overlay."""
    from entrollm_gguf.runtime.develop import export_tree

    names = export_tree(folder)
    if not names:
        raise BuildError(f"{folder}: has no commits on top of the overlay")
    click.echo("\n".join(names))
