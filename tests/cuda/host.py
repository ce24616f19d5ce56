# SPDX-License-Identifier: MIT
"""The CUDA kernels on the CPU: compiles host_kernels.cpp against the patched tree and calls it."""

from __future__ import annotations

import ctypes
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

from entrollm_gguf import codec, runtime
from entrollm_gguf.codec import EntropyType
from entrollm_gguf.runtime import tree
from entrollm_gguf.runtime.fetch import fetch_sdist
from entrollm_gguf.runtime.paths import patches_folder
from entrollm_gguf.runtime.pin import read_pin

SMALLEST_SHARED = 48 * 1024  # what every device gives
LARGEST_SHARED = 227 * 1024  # sm_90


class _Shape(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int32),
        ("plain", ctypes.c_int32),
        ("n_cols", ctypes.c_int64),
        ("n_rows", ctypes.c_int64),
        ("n_slabs", ctypes.c_int64),
        ("slab_stride", ctypes.c_int64),
    )


class _Options(ctypes.Structure):
    _fields_ = (
        ("n_warps", ctypes.c_int32),
        ("backwards", ctypes.c_int32),
        ("early", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("shared_size", ctypes.c_int64),
    )


@dataclass(frozen=True)
class Weights:
    """A tensor in the device layout, and its shape."""

    kind: EntropyType
    payload: np.ndarray  # uint8
    n_rows: int
    n_cols: int
    n_slabs: int = 1


class KernelError(Exception):
    """A kernel did something that a GPU would not tolerate."""


def codec_library() -> Path:
    """The library that the programs of this folder link: ggml-base of the runtime, or the one that
    tests of the codec use."""
    named = os.environ.get("ENTROLLM_CODEC_LIBRARY")
    return Path(named) if named else runtime.library("ggml-base")


def patched_tree(folder: Path) -> Path:
    """The patched llama.cpp, for its headers."""
    pin = read_pin()
    tree.assemble(tree.unpacked_source(fetch_sdist(pin), pin), patches_folder(), folder / "tree")
    return folder / "tree" / tree.LLAMA_CPP


class HostKernels:
    """Functions as in host_kernels.cpp. All take numpy arrays and return new ones; KernelError
    tells what went wrong."""

    def __init__(self, llama_cpp: Path, folder: Path, *flags: str) -> None:
        library = folder / "libhostkernels.so"
        includes = [
            Path(__file__).parent,
            llama_cpp / "ggml" / "include",
            llama_cpp / "ggml" / "src",
            llama_cpp / "ggml" / "src" / "ggml-cuda",
            llama_cpp / "src",
        ]
        base = codec_library()
        command = [
            "g++",
            "-std=c++17",
            "-O2",
            "-ffp-contract=off",
            "-Wall",
            "-Wextra",
            "-Wno-unused-function",
            "-Werror",
            "-shared",
            "-fPIC",
        ]
        sources = (Path(__file__).parent / "host_kernels.cpp", llama_cpp / "src" / "llama-entropy-codec.cpp")
        command += [*flags, *(f"-I{path}" for path in includes), *map(str, sources), "-o", str(library)]
        subprocess.run([*command, str(base), f"-Wl,-rpath,{base.parent}", "-lpthread"], check=True)
        self._library = ctypes.CDLL(str(library))
        for name in ("host_decode", "host_get_rows", "host_mat_vec", "host_add_offsets", "host_count_routes", "host_make_lanes"):
            getattr(self._library, name).restype = ctypes.c_char_p

    def _call(self, name: str, weights: Weights, plain: int, options: dict, *arguments) -> None:
        shape = _Shape(
            int(gguf.GGMLQuantizationType[weights.kind.name]),
            plain,
            weights.n_cols,
            weights.n_rows,
            weights.n_slabs,
            weights.payload.size // weights.n_slabs,
        )
        chosen = _Options(
            options.get("n_warps", 16),
            options.get("backwards", False),
            options.get("early", False),
            0,
            options.get("shared_size", LARGEST_SHARED),
        )
        passed = [
            a.ctypes.data_as(ctypes.c_void_p) if isinstance(a, np.ndarray) else None if a is None else ctypes.c_int64(a) for a in arguments
        ]
        error = getattr(self._library, name)(
            ctypes.byref(shape), ctypes.byref(chosen), weights.payload.ctypes.data_as(ctypes.c_void_p), *passed
        )
        if error:
            raise KernelError(error.decode())

    def make_lanes(self, kind: EntropyType, payload: np.ndarray, shape: tuple[int, int, int], device_size: int | None = None) -> np.ndarray:
        """A payload of a file in the device layout, as the model loader makes it: uint8 (n_slabs *
        device_size,).

        Args:
            payload: uint8, all slabs.
            shape: (n_slabs, n_rows, n_cols).
            device_size: instead of the header's.
        """
        n_slabs, n_rows, n_cols = shape
        size = device_size or codec.read_header(kind, payload, shape).device_size
        out = np.full(n_slabs * size, 0xCD, np.uint8)
        self._call("host_make_lanes", Weights(kind, payload, n_rows, n_cols, n_slabs), 0, {}, size, out)
        return out

    def decode(self, weights: Weights, plain: str, group0: int = 0, n_groups: int | None = None, **options) -> np.ndarray:
        """Row groups as bytes of a stock type, uint8 (n_slabs, rows, bytes of a row)."""
        kind = gguf.GGMLQuantizationType[plain]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        n_groups = (weights.n_rows + 31) // 32 - group0 if n_groups is None else n_groups
        n_rows = min(32 * n_groups, weights.n_rows - 32 * group0)
        out = np.full((weights.n_slabs, n_rows, weights.n_cols // block * size), 0xCD, np.uint8)
        self._call("host_decode", weights, int(kind), options, group0, n_groups, out)
        return out

    def get_rows(self, weights: Weights, ids: np.ndarray, **options) -> np.ndarray:
        """Rows ids i32 (n_slabs, n) as f32 (n_slabs, n, n_cols)."""
        out = np.full((*ids.shape, weights.n_cols), np.nan, np.float32)
        self._call("host_get_rows", weights, 0, options, ids, ids.shape[1], out)
        return out

    def mat_vec(self, weights: Weights, x: np.ndarray, ids: np.ndarray | None = None, **options) -> np.ndarray:
        """x f32 (planes, columns, n_cols) -> (planes, columns, n_rows); with ids i32 (tokens,
        slots): (tokens, slots, n_rows)."""
        return self.mat_vec_pair(weights, None, x, ids, **options)[0]

    def mat_vec_pair(
        self, weights: Weights, second: Weights | None, x: np.ndarray, ids: np.ndarray | None = None, **options
    ) -> tuple[np.ndarray, np.ndarray]:
        """The products of two matrices in one launch."""
        n_slots = 0 if ids is None else ids.shape[1]
        other = second or weights
        out, out2 = (np.full((x.shape[0], n_slots or x.shape[1], one.n_rows), np.nan, np.float32) for one in (weights, other))
        stride = other.payload.size // other.n_slabs
        arguments = (x, x.shape[1], x.shape[0], ids, n_slots, out, None if second is None else second.payload, other.n_rows, stride, out2)
        self._call("host_mat_vec", weights, 0, options, *arguments)
        return out, out2

    def add_offsets(self, weights: Weights, x: np.ndarray, y: np.ndarray, ids: np.ndarray | None = None, **options) -> None:
        """Shapes as for mat_vec; y is changed."""
        self._call("host_add_offsets", weights, 0, options, x, x.shape[1], x.shape[0], ids, 0 if ids is None else ids.shape[1], y)

    def count_routes(self, n_experts: int, ids: np.ndarray, **options) -> np.ndarray:
        """i32 (n_experts,), not zero where ids (tokens, slots) name the expert."""
        out = np.full(n_experts, -1, np.int32)
        weights = Weights(EntropyType.EQ8, np.zeros(n_experts, np.uint8), 0, 0, n_experts)
        self._call("host_count_routes", weights, 0, options, ids, ids.shape[1], ids.shape[0], out)
        return out
