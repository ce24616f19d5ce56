# SPDX-License-Identifier: MIT
"""Wheels for other machines, without building any: their index, names and requirements, and what
the command line refuses."""

from __future__ import annotations

import hashlib
import html
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from entrollm_gguf.cli import main
from entrollm_gguf.errors import BuildError
from entrollm_gguf.runtime import builder, index, locate, portable, tree, wheels
from entrollm_gguf.runtime.builder import BuildOptions, Toolchain
from entrollm_gguf.runtime.pin import Pin

PIN = Pin("llama-cpp-python", "0.9.1", "0" * 64, "abc")


def a_wheel(folder: Path, name: str, version: str, tag: str = "py3-none-any", metadata: str = "") -> Path:
    """A wheel that pip installs: one module."""
    path = folder / f"{name}-{version}-{tag}.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.py", f"version = {version!r}\n")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{metadata}")
        archive.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


class Links(HTMLParser):
    """Anchors of a page, as pip reads them."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.found: list[dict[str, str]] = []
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attributes: list) -> None:
        if tag == "a":
            self.found.append(dict(attributes))


@pytest.mark.parametrize("name", ["llama_cpp_python", "Llama.cpp-Python", "llama--cpp__python"])
def test_normalized_names(name):
    assert index.normalized(name) == "llama-cpp-python"


def test_pages(tmp_path):
    coded = a_wheel(tmp_path, "some_Runtime", "1.2+entrollm.abc", "py3-none-manylinux_2_35_x86_64")
    other = a_wheel(tmp_path, "other", "3", metadata="Requires-Python: >=3.11,<4\n")
    made = index.add_wheels(tmp_path / "index", [coded, other])
    assert made == [tmp_path / "index" / "some-runtime" / coded.name, tmp_path / "index" / "other" / other.name]
    assert [link["href"] for link in Links(tmp_path / "index" / "index.html").found] == ["other/", "some-runtime/"]
    (link,) = Links(tmp_path / "index" / "some-runtime" / "index.html").found
    address, fragment = link["href"].split("#")
    assert "+" not in address and unquote(address) == coded.name  # beside the page, so that it works under every address
    assert fragment == f"sha256={hashlib.sha256(coded.read_bytes()).hexdigest()}"
    assert "data-requires-python" not in link
    (link,) = Links(tmp_path / "index" / "other" / "index.html").found
    assert html.unescape(link["data-requires-python"]) == ">=3.11,<4"
    assert (tmp_path / "index" / "requirements.txt").read_text() == "other==3\nsome-runtime==1.2+entrollm.abc\n"


def test_new_wheels_take_the_place_of_old_ones(tmp_path):
    """Which of two hashes is newer, no version tells."""
    folder = tmp_path / "index"
    index.add_wheels(folder, [a_wheel(tmp_path, "runtime", "1+entrollm.fff"), a_wheel(tmp_path, "kept", "1")])
    index.add_wheels(folder, [a_wheel(tmp_path, "runtime", "1+entrollm.aaa")])
    assert [path.name for path in sorted(folder.glob("*/*.whl"))] == ["kept-1-py3-none-any.whl", "runtime-1+entrollm.aaa-py3-none-any.whl"]
    assert (folder / "requirements.txt").read_text() == "kept==1\nruntime==1+entrollm.aaa\n"


@pytest.mark.parametrize("content", [b"", b"no archive", None])
def test_a_file_that_is_no_wheel_is_named(tmp_path, content):
    path = tmp_path / "a-1-py3-none-any.whl"
    if content is None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.py", "")
    else:
        path.write_bytes(content)
    with pytest.raises(BuildError, match=r"a-1-py3-none-any\.whl: is no wheel"):
        index.add_wheels(tmp_path / "index", [path])


@pytest.mark.parametrize("damaged", [False, True])
def test_pip_installs_from_the_index(tmp_path, monkeypatch, damaged):
    """The dependency too, from the pages alone; a wheel of another hash is refused."""
    coded = a_wheel(tmp_path, "entrollm_test_runtime", "1.2+entrollm.abc", metadata="Requires-Dist: entrollm-test-other>=2\n")
    made = index.add_wheels(tmp_path / "index", [coded, a_wheel(tmp_path, "entrollm_test_other", "3")])
    if damaged:
        made[0].write_bytes(coded.read_bytes() + b"x")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    target = tmp_path / "installed"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-cache-dir", "--target", str(target)]
    command += ["--index-url", f"{(tmp_path / 'index').as_uri()}/", "-r", str(tmp_path / "index" / "requirements.txt")]
    result = subprocess.run(command, capture_output=True, text=True)
    if damaged:
        assert result.returncode != 0 and "HASH" in result.stderr.upper()
    else:
        assert result.returncode == 0, result.stderr
        assert {path.name for path in target.glob("*.py")} == {"entrollm_test_runtime.py", "entrollm_test_other.py"}


# ---- what a portable build is --------------------------------------------------------------------


def test_nothing_of_this_processor_goes_into_a_portable_build(monkeypatch):
    options = BuildOptions(portable=True)
    assert options.cmake_options()["GGML_NATIVE"] == "OFF" and options.cmake_options()["GGML_CPU_ALL_VARIANTS"] == "ON"
    monkeypatch.setattr(builder, "_cpu_flags", lambda: "avx999")
    assert "avx999" not in builder.require_tools(options).processor
    assert "avx999" in builder.require_tools(BuildOptions()).processor


def test_programs_of_a_portable_build():
    plain, portable_ = BuildOptions(tests=True), BuildOptions(portable=True)
    assert set(plain.programs()) - set(portable_.programs()) == set(wheels.LINKED_TO_CPU)
    assert set(portable_.programs()) < set(portable_.targets())


def test_cuda_finds_its_libraries_beside_the_package():
    options = BuildOptions(portable=True, cuda=True, cuda_arch="90").cmake_options()
    assert options["CMAKE_INSTALL_RPATH"].startswith("$ORIGIN;$ORIGIN/../lib;$ORIGIN/../../nvidia/cu13/lib")
    assert "nvidia" not in BuildOptions(cuda=True).cmake_options()["CMAKE_INSTALL_RPATH"]


@pytest.mark.parametrize(
    ("nvcc", "expected"),
    [
        ("Cuda compilation tools, release 13.0, V13.0.88", ("nvidia-cublas>=13,<14", "nvidia-cuda-runtime>=13,<14")),
        ("Cuda compilation tools, release 12.8, V12.8.61", ("nvidia-cublas-cu12>=12,<13", "nvidia-cuda-runtime-cu12>=12,<13")),
        ("Cuda compilation tools, release 11.8, V11.8.89", ()),
        ("nvcc", ()),
    ],
)
def test_cuda_requirements(nvcc, expected):
    assert wheels.cuda_requirements(nvcc) == expected


def test_variables_for_cmake_come_last():
    options = BuildOptions(portable=True, cmake=(("GGML_OPENMP", "ON"), ("NEW", "1")))
    assert options.cmake_options()["GGML_OPENMP"] == "ON" and options.cmake_options()["NEW"] == "1"


def test_the_packed_wheel(tmp_path):
    """Tag, version, requirements, console scripts of the programs that there are, and licences."""
    source, output, out = tmp_path / "tree", tmp_path / "bin", tmp_path / "out"
    llama_cpp = source / tree.LLAMA_CPP
    for folder in (source / "llama_cpp", llama_cpp / "conversion", llama_cpp / "licenses", llama_cpp / "vendor" / "x", output, out):
        folder.mkdir(parents=True)
    for path in (
        source / "LICENSE.md",
        llama_cpp / "LICENSE",
        llama_cpp / "licenses" / "LICENSE-y",
        llama_cpp / "vendor" / "x" / "LICENSE",
        llama_cpp / "convert_hf_to_gguf.py",
        source / "llama_cpp" / "__init__.py",
        output / "libggml-cpu-haswell.so",
        output / "llama-cli",
    ):
        path.write_text("x")
    manifest = {"hash": "0123456789abcdef", "programs": ["llama-cli"]}
    made = wheels.pack_llama_cpp(source, output, PIN, manifest, ("nvidia-cublas>=13,<14",), tmp_path, out)
    assert re.fullmatch(r"llama_cpp_python-0\.9\.1\+entrollm\.0123456789ab-py3-none-\w+\.whl", made.name)
    with zipfile.ZipFile(made) as archive:
        names = archive.namelist()
        info = next(name.split("/")[0] for name in names if ".dist-info/" in name)
        assert "Requires-Dist: nvidia-cublas>=13,<14" in archive.read(f"{info}/METADATA").decode().splitlines()
        assert archive.read(f"{info}/entry_points.txt").decode() == "[console_scripts]\nllama-cli = llama_cpp.entrollm_tools:run\n"
        assert json.loads(re.search(r"PROGRAMS = (.*)", archive.read("llama_cpp/entrollm_tools.py").decode())[1]) == {
            "llama-cli": "llama-cli"
        }
    assert {"llama_cpp/lib/libggml-cpu-haswell.so", "llama_cpp/bin/llama-cli"} <= set(names)
    licences = {name.removeprefix("llama_cpp/licenses/") for name in names if name.startswith("llama_cpp/licenses/")}
    assert {
        "LICENSE.md",
        "vendor/llama.cpp/LICENSE",
        "vendor/llama.cpp/licenses/LICENSE-y",
        "vendor/llama.cpp/vendor/x/LICENSE",
    } <= licences


def test_the_manifest_tells_that_it_is_portable(tmp_path):
    data = {"hash": "h", "version": "1", "llama_cpp_commit": "c", "cuda": False, "cuda_arch": "", "compiler": "g++", "build_seconds": 1}
    for more, expected in (({}, False), ({"portable": True}, True)):
        (tmp_path / wheels.MANIFEST).write_text(json.dumps({**data, "programs": [], **more}))
        assert locate.read_manifest(tmp_path).portable is expected


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture
def prepared(tmp_path, monkeypatch) -> Path:
    """make_wheels without building, auditing and packing; returns the folder of the index."""
    built = tmp_path / "built"
    built.mkdir()
    a_wheel(built, "llama_cpp_python", "1+entrollm.abc", "py3-none-linux_x86_64")
    a_wheel(built, "gguf", "1+entrollm.abc")

    def rename(wheel: Path, folder: Path, *, cuda: bool) -> Path:
        folder.mkdir()
        return Path(shutil.copy(wheel, folder / wheel.name.replace("linux", "manylinux_2_35")))

    monkeypatch.setattr(portable, "_require_tools", lambda from_checkout: None)
    monkeypatch.setattr(portable.builder, "build", lambda *arguments, **keywords: built)
    monkeypatch.setattr(portable, "audited", rename)
    monkeypatch.setattr(portable, "_own_wheel", lambda checkout, folder: a_wheel(tmp_path, "entrollm_gguf", "0.1"))
    return tmp_path / "index"


def test_wheels_and_index(prepared, capsys):
    assert main(["runtime", "wheel", "--out", str(prepared)]) == 0
    said = capsys.readouterr().out
    names = {path.name for path in prepared.glob("*/*.whl")}
    assert names == {
        "llama_cpp_python-1+entrollm.abc-py3-none-manylinux_2_35_x86_64.whl",
        "gguf-1+entrollm.abc-py3-none-any.whl",
        "entrollm_gguf-0.1-py3-none-any.whl",
    }
    assert all(name in said for name in names) and "requirements.txt" in said
    assert (prepared / "requirements.txt").read_text() == "entrollm-gguf==0.1\ngguf==1+entrollm.abc\nllama-cpp-python==1+entrollm.abc\n"


def test_without_a_checkout_the_package_is_left_out(prepared, monkeypatch, capsys):
    monkeypatch.setattr(portable, "_checkout", lambda: None)
    assert main(["runtime", "wheel", "--out", str(prepared)]) == 0
    assert "left out" in capsys.readouterr().err and not (prepared / "entrollm-gguf").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--cmake", "GGML_CUDA_FA"], "not NAME=VALUE"),
        (["--cmake", "=OFF"], "not NAME=VALUE"),
        (["--cuda", "native"], "no list of architectures"),
        (["--cuda", "sm_90"], "no list of architectures"),
        (["--jobs", "0"], "jobs"),
    ],
)
def test_wrong_usage(prepared, capsys, arguments, says):
    assert main(["runtime", "wheel", "--out", str(prepared), *arguments]) == 2
    assert says in capsys.readouterr().err and not prepared.exists()


def test_cuda_architectures_reach_the_build(prepared, monkeypatch):
    seen = []
    build = portable.builder.build
    monkeypatch.setattr(portable.builder, "build", lambda options, **keywords: seen.append(options) or build(options))
    assert main(["runtime", "wheel", "--out", str(prepared), "--cuda", "75;90a-real", "--cmake", "GGML_CUDA_FA=OFF"]) == 0
    assert seen == [BuildOptions(cuda=True, cuda_arch="75;90a-real", portable=True, cmake=(("GGML_CUDA_FA", "OFF"),))]


def test_missing_tools_are_named_before_anything_is_built(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(portable.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(portable.builder, "build", lambda *arguments, **keywords: pytest.fail("built"))
    assert main(["runtime", "wheel", "--out", str(tmp_path / "index")]) == 1
    said = capsys.readouterr().err
    assert "auditwheel" in said and "pip install" in said and said.count("\n") == 1


def test_other_systems_are_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(portable.sys, "platform", "darwin")
    assert main(["runtime", "wheel", "--out", str(tmp_path / "index")]) == 1
    assert "Linux only" in capsys.readouterr().err


def test_a_wheel_that_auditwheel_refuses(tmp_path, monkeypatch):
    said = "INFO:auditwheel: reading\nauditwheel: error: cannot repair: libodd.so.1 is not there\n"
    monkeypatch.setattr(portable.subprocess, "run", lambda command, **keywords: subprocess.CompletedProcess(command, 1, "", said))
    with pytest.raises(BuildError, match=r"a\.whl: would not run on other machines: .*libodd"):
        portable.audited(tmp_path / "a.whl", tmp_path / "audited", cuda=False)


def test_a_portable_build_is_not_installed(tmp_path, monkeypatch):
    def build_into(finished, *arguments):
        finished.mkdir()
        for name in ("a.whl", "b.whl", "complete"):
            (finished / name).touch()

    monkeypatch.setenv("ENTROLLM_CACHE", str(tmp_path))
    monkeypatch.setattr(builder, "require_tools", lambda options: Toolchain("g++ 12"))
    monkeypatch.setattr(builder, "_build_into", build_into)
    monkeypatch.setattr(builder.installer, "install", lambda wheels: pytest.fail("installed"))
    folder = builder.build(BuildOptions(portable=True))
    assert isinstance(folder, Path) and len(list(folder.glob("*.whl"))) == 2
