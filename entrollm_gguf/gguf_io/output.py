# SPDX-License-Identifier: MIT
"""Output files that appear under their name only when they are complete."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from entrollm_gguf.errors import ConversionError, OutputExistsError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # file systems that cannot lock


def check_output(path: Path, force: bool) -> None:
    """Refuse early what would fail late.

    Raises:
        OutputExistsError: the file exists and `force` is not given.
        ConversionError: the folder is missing, or the name is a folder, a pipe, a device or a link
            that leads nowhere.
    """
    if path.is_dir():
        raise ConversionError(f"{path}: is a folder; name an output file")
    if path.exists() and not path.is_file():
        raise ConversionError(f"{path}: is no regular file; name an output file")
    target = _target(path)
    if target.is_symlink():
        raise ConversionError(f"{path}: is a link that leads in a circle; name an output file")
    if not target.parent.is_dir():
        raise ConversionError(f"{target.parent}: no such folder; create it first")
    if target.exists() and not force:
        raise OutputExistsError(f"{path}: already exists; use --force to replace it")


@contextlib.contextmanager
def atomic_output(path: Path, force: bool) -> Iterator[Path]:
    """A temporary path beside `path`; renamed over it when the block ends well, removed when it
    does not (an interrupt included). A symbolic link is followed.

    Its name depends only on that of the output, and it is locked while it is written: a second
    process that wants the same output is refused, and what a killed process left behind is
    overwritten.

    Yields:
        the temporary path, an empty file that the block fills and closes.
    Raises:
        OutputExistsError, ConversionError: see check_output; another process writes the same
            output; a full disk.
    """
    check_output(path, force)
    target = _target(path)
    temporary = target.with_name(f".{target.name}.part")
    lock = _create_locked(path, temporary)
    try:
        check_output(path, force)  # the process that held the lock may just have ended
        yield temporary
        os.fsync(lock)
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in _NO_SPACE:
            raise ConversionError(f"{path}: no space left on the device; free some or choose another folder") from error
        raise
    finally:
        os.close(lock)


def _target(path: Path) -> Path:
    """Where a chain of symbolic links leads, whether there is something or not."""
    return Path(os.path.realpath(path))


def _create_locked(path: Path, temporary: Path) -> int:
    """Create the file, or take over an abandoned one; returns a descriptor that holds its lock.

    Raises:
        ConversionError: the folder cannot be written, or another process holds the lock.
    """
    while True:
        try:
            handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise ConversionError(f"{temporary.parent}: cannot write here ({error.strerror})") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            raise ConversionError(f"{path}: is being written by another process; wait for it, or choose another name") from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(handle)
                raise
        # between opening and locking, the owner may have renamed or removed the file
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.lstat(temporary)):
                os.truncate(handle, 0)
                return handle
        os.close(handle)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class SpillFile:
    """Anonymous temporary file beside the output that holds payloads until the GGUF's header is
    known.

    GGUF stores all tensor infos, offsets included, before the data, and a coded size is known only
    after coding.
    """

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by close()
        self._size = 0

    def append(self, data: memoryview) -> tuple[int, int]:
        """Write bytes at the end; returns (offset, size)."""
        at = self._size
        self._file.seek(at)
        self._file.write(data)
        self._size += data.nbytes
        return at, data.nbytes

    def append_from(self, write, size: int) -> tuple[int, int]:
        """Let `write(file)` put `size` bytes at the end; returns (offset, size)."""
        at = self._size
        self._file.seek(at)
        try:
            write(self._file)
        except OSError as error:
            if error.errno is None:  # numpy's tofile says that it could not write everything, but not why
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
            raise
        self._size += size
        return at, size

    def copy_to(self, target, at: int, size: int) -> None:
        """Copy a range to an open binary file."""
        self._file.seek(at)
        while size > 0:
            block = self._file.read(min(size, 1 << 22))
            if not block:
                raise OSError(errno.EIO, "the temporary file ended early")
            target.write(block)
            size -= len(block)

    def close(self) -> None:
        self._file.close()


class StreamedTensor:
    """What gguf's writer asks of a tensor (shape, dtype, nbytes, tofile), with the bytes produced
    at the moment of writing.

    Args:
        shape: numpy shape of `dtype` elements that the writer sees.
        nbytes: bytes that `write(file)` will write.
    """

    def __init__(self, shape: tuple[int, ...], dtype, nbytes: int, write) -> None:
        self.shape = shape
        self.dtype = dtype
        self.nbytes = nbytes
        self._write = write

    def tofile(self, file) -> None:
        self._write(file)
