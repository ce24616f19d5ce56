# SPDX-License-Identifier: MIT
"""The system is asked for coded tensors before the vocabulary is loaded, where they will be used."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest

from entrollm_gguf.gguf_io.reader import open_model

# tells of every call that asks for pages, and of the mapping that follows
_SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/mman.h>

int posix_fadvise64(int fd, off64_t offset, off64_t length, int advice) {
    if (advice == POSIX_FADV_WILLNEED) {
        fprintf(stderr, "asked %lld %lld\\n", (long long) offset, (long long) length);
    }
    return ((int (*)(int, off64_t, off64_t, int)) dlsym(RTLD_NEXT, "posix_fadvise64"))(fd, offset, length, advice);
}

int posix_fadvise(int fd, off_t offset, off_t length, int advice) {
    return posix_fadvise64(fd, offset, length, advice);
}

int posix_madvise(void * at, size_t length, int advice) {
    if (advice == POSIX_MADV_WILLNEED) {
        fprintf(stderr, "mapped\\n");
    }
    return ((int (*)(void *, size_t, int)) dlsym(RTLD_NEXT, "posix_madvise"))(at, length, advice);
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


def told(shim, path, how: str) -> list[str]:
    environment = {**os.environ, "LD_PRELOAD": str(shim), "GGML_ENTROPY_MODE": "fused"}
    result = subprocess.run([sys.executable, "-c", _LOAD, path, how], capture_output=True, text=True, check=True, env=environment)
    return [line for line in result.stderr.splitlines() if line.startswith(("asked", "mapped"))]


def test_coded_tensors_are_asked_for_before_the_file_is_mapped(shim, converted):
    path = converted("llama", "EQ8-rows")
    said = told(shim, path, "map")
    assert said[-1] == "mapped" and said.count("mapped") == 1
    with open(path, "rb") as file:
        model = open_model(path)
        asked = {tuple(map(int, re.findall(r"\d+", line))) for line in said[:-1]}
        magics = set()
        for offset, _ in asked:
            file.seek(offset)
            magics.add(file.read(4))
    assert magics == {b"EQTP"}
    assert sorted(size for _, size in asked) == sorted(tensor.n_bytes for tensor in model.tensors() if tensor.kind)


@pytest.mark.parametrize("how", ["vocabulary", "read"])
def test_nothing_is_asked_for_that_is_not_mapped(shim, converted, how):
    assert not [line for line in told(shim, converted("llama", "EQ8-rows"), how) if line.startswith("asked")]
