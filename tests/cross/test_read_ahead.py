# SPDX-License-Identifier: MIT
"""Coded tensors are read while the vocabulary is built, where they will be mapped and stay."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest

from entrollm_gguf.gguf_io.reader import open_model

# tells of every piece that is read at a place of its own
_SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <unistd.h>

ssize_t pread64(int fd, void * to, size_t size, off64_t offset) {
    fprintf(stderr, "asked %lld %zu;\\n", (long long) offset, size);
    return ((ssize_t (*)(int, void *, size_t, off64_t)) dlsym(RTLD_NEXT, "pread64"))(fd, to, size, offset);
}

ssize_t pread(int fd, void * to, size_t size, off_t offset) {
    return pread64(fd, to, size, offset);
}
"""

_LOAD = """
import sys
from llama_cpp import Llama
how = {"vocab_only": sys.argv[2] == "vocabulary", "use_mmap": sys.argv[2] != "read"}
Llama(sys.argv[1], n_ctx=64, verbose=True, **how).close()
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs a compiler, and Linux")
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(_SHIM)
    subprocess.run([compiler, "-shared", "-fPIC", folder / "shim.c", "-o", folder / "shim.so"], check=True)
    return folder / "shim.so"


def asked(shim, path, how: str, **variables: str) -> list[tuple[int, int]]:
    """Offset and size of each piece."""
    environment = {**os.environ, "LD_PRELOAD": str(shim), "GGML_ENTROPY_MODE": "fused", **variables}
    result = subprocess.run([sys.executable, "-c", _LOAD, path, how], capture_output=True, text=True, check=True, env=environment)
    return [(int(offset), int(size)) for offset, size in re.findall(r"asked (\d+) (\d+);", result.stderr)]


# so small a model may be loaded before its reader has come to an end, or has begun
TRIES = 10
PIECE = 1 << 16


def test_coded_tensors_are_read_ahead(shim, converted):
    """In pieces, in the order of the file."""
    path = converted("llama", "EQ8-rows")
    expected, whole = [], path.read_bytes()
    for tensor in open_model(path).tensors():
        if tensor.kind:
            begin = whole.index(tensor.data[:256].tobytes())
            expected += [(at, min(PIECE, begin + tensor.n_bytes - at)) for at in range(begin, begin + tensor.n_bytes, PIECE)]
    found = next(filter(None, (asked(shim, path, "map") for _ in range(TRIES))), [])
    assert found and found == sorted(expected)[: len(found)]


@pytest.mark.parametrize("how", ["vocabulary", "read"])
def test_nothing_is_read_that_is_not_mapped(shim, converted, how):
    for _ in range(3):
        assert asked(shim, converted("llama", "EQ8-rows"), how) == []


def test_nothing_is_read_that_memory_would_not_keep(shim, converted):
    for _ in range(3):
        assert asked(shim, converted("llama", "EQ8-rows"), "map", GGML_ENTROPY_MEMORY_MIB="0.01") == []
