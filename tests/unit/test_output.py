# SPDX-License-Identifier: MIT
"""Outputs appear whole or not at all, with one writer at a time; links are followed, and only
regular files are replaced."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from entrollm_gguf.errors import ConversionError, OutputExistsError
from entrollm_gguf.gguf_io.output import SpillFile, atomic_output


def write(path: Path, text: str = "new", force: bool = False) -> None:
    with atomic_output(path, force) as temporary:
        temporary.write_text(text)


def test_a_link_is_followed(tmp_path):
    (tmp_path / "far").mkdir()
    target, link = tmp_path / "far" / "model.gguf", tmp_path / "link.gguf"
    target.write_text("old")
    link.symlink_to(target)
    with pytest.raises(OutputExistsError, match=r"link\.gguf.*--force"):
        write(link)
    write(link, force=True)
    assert link.is_symlink() and target.read_text() == "new"
    target.unlink()
    write(link)  # there is nothing to lose where it leads
    assert link.is_symlink() and target.read_text() == "new"
    assert os.listdir(target.parent) == ["model.gguf"] and os.listdir(tmp_path) in (["far", "link.gguf"], ["link.gguf", "far"])


def test_links_that_lead_nowhere(tmp_path):
    link = tmp_path / "link.gguf"
    link.symlink_to(tmp_path / "none" / "model.gguf")
    with pytest.raises(ConversionError, match="none: no such folder"):
        write(link)
    link.unlink()
    link.symlink_to(link)
    with pytest.raises(ConversionError, match="circle"):
        write(link, force=True)
    assert link.is_symlink()


@pytest.mark.parametrize("force", [False, True])
def test_pipes_and_devices_are_no_outputs(tmp_path, force):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    devices = [pipe]
    with contextlib.suppress(PermissionError):
        os.mknod(tmp_path / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        devices.append(tmp_path / "null")
    link = tmp_path / "link"
    link.symlink_to(pipe)

    def identity(path):
        """All that tells another file from this one; reading a link moves its access time."""
        found = path.lstat()
        return found.st_mode, found.st_rdev, found.st_dev, found.st_ino, found.st_mtime_ns

    for path in (*devices, link):
        before = identity(path)
        with pytest.raises(ConversionError, match=f"{path.name}: is no regular file"):
            write(path, force=force)
        assert identity(path) == before


def test_permissions_are_those_of_a_new_file(tmp_path):
    write(tmp_path / "a")
    (tmp_path / "b").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_failures_leave_nothing(tmp_path, error):
    (tmp_path / "a").write_text("old")
    with pytest.raises(error), atomic_output(tmp_path / "a", force=True) as temporary:
        temporary.write_text("half")
        raise error
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"


def test_what_a_killed_process_left_is_written_over(tmp_path):
    code = (
        "import os, sys, pathlib\n"
        "from entrollm_gguf.gguf_io.output import atomic_output\n"
        "with atomic_output(pathlib.Path(sys.argv[1]), False) as temporary:\n"
        "    temporary.write_bytes(bytes(100000))\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    out = tmp_path / "model.gguf"
    assert subprocess.run([sys.executable, "-c", code, out]).returncode == -9
    assert [name.endswith(".part") for name in os.listdir(tmp_path)] == [True]
    write(out)
    assert os.listdir(tmp_path) == ["model.gguf"] and out.read_text() == "new"


def test_one_writer_at_a_time(tmp_path):
    out, link = tmp_path / "a", tmp_path / "link"
    link.symlink_to(out)
    with atomic_output(out, False) as temporary:
        temporary.write_text("first")
        for path in (out, link):
            with pytest.raises(ConversionError, match=f"{path.name}: is being written by another process"):
                write(path, force=True)
        write(tmp_path / "b")
    assert out.read_text() == "first"


def test_the_second_of_two_finds_the_output(tmp_path, monkeypatch):
    """It looked before the first one was done, and got the lock afterwards."""
    import entrollm_gguf.gguf_io.output as output

    out = tmp_path / "a"
    create = output._create_locked

    def first_ends(path: Path, temporary: Path) -> int:
        monkeypatch.setattr(output, "_create_locked", create)
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT)  # the same file, about to be renamed
        write(out, "first")
        os.close(handle)
        return create(path, temporary)

    monkeypatch.setattr(output, "_create_locked", first_ends)
    with pytest.raises(OutputExistsError):
        write(out, "second")
    assert out.read_text() == "first" and os.listdir(tmp_path) == ["a"]


def test_numpy_does_not_say_that_a_disk_is_full(tmp_path):
    def fail(file) -> None:
        raise OSError("100 requested and 0 written")  # as numpy's tofile has it

    spill = SpillFile(tmp_path)
    with contextlib.closing(spill), pytest.raises(OSError) as caught:
        spill.append_from(fail, 100)
    assert caught.value.errno == errno.ENOSPC
