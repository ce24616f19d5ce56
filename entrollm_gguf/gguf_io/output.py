# SPDX-License-Identifier: MIT
"""Output files that appear under their name only when they are complete."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from entrollm_gguf.errors import ConversionError, OutputExistsError


def check_output(path: Path, force: bool) -> None:
    """Refuse early what would fail late.

    Raises:
        OutputExistsError: the file exists and `force` is not given.
        ConversionError: the folder is missing, or the name is a folder.
    """
    if path.is_dir():
        raise ConversionError(f"{path}: is a folder; name an output file")
    if not path.parent.is_dir():
        raise ConversionError(f"{path.parent}: no such folder; create it first")
    if path.exists() and not force:
        raise OutputExistsError(f"{path}: already exists; use --force to replace it")


@contextlib.contextmanager
def atomic_output(path: Path, force: bool) -> Iterator[Path]:
    """A temporary path beside `path`; renamed over it when the block ends well, removed when it does not (an interrupt included).

    Yields:
        the temporary path, an empty file that the block fills and closes.
    Raises:
        OutputExistsError, ConversionError: see check_output; a full disk.
    """
    check_output(path, force)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    except OSError as error:
        raise ConversionError(f"{path.parent}: cannot write here ({error.strerror})") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes private files
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ConversionError(f"{path}: no space left on the device; free some or choose another folder") from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class SpillFile:
    """Anonymous temporary file beside the output that holds payloads until the GGUF's header is known.

    GGUF stores all tensor infos, offsets included, before the data, and a coded size is known only after coding.
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
        write(self._file)
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
    """What gguf's writer asks of a tensor (shape, dtype, nbytes, tofile), with the bytes produced at the moment of writing.

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
