# SPDX-License-Identifier: MIT
"""ggml-virtgpu's host side, which makes tensors of what a guest sends: built from the patched tree
and called as a virtual machine calls it.

The CPU computes; the messages are a guest's bytes. Whatever type a guest names, the host answers.
"""

from __future__ import annotations

import ctypes
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cuda"))

from host import patched_tree
from running import in_a_process

from entrollm_gguf import runtime
from entrollm_gguf.codec import c as codec_c

# of ApirBackendCommandType in the tree's apir_backend.gen.h
SUPPORTS_OP, BUFFER_TYPE, ALLOCATE, ALLOC_SIZE, SET_TENSOR, GET_TENSOR, COPY_TENSOR, COMPUTE = 6, 7, 14, 15, 17, 18, 19, 22
F32, Q8_0, EQ8, EQ4, EBF16 = (gguf.GGMLQuantizationType[name].value for name in ("F32", "Q8_0", "EQ8", "EQ4", "EBF16"))
COMPUTED = 16  # GGML_TENSOR_FLAG_COMPUTE
NO_TYPES = (-1, 43, 503)  # beyond the range, in the gap below our ids, the count
N_COLS, N_ROWS, SLOT = 32, 3, 4096  # of the weights; bytes of the buffer that each tensor may use


class RpcTensor(ctypes.Structure):
    """struct apir_rpc_tensor."""

    _fields_ = (
        ("id", ctypes.c_uint64),
        ("type", ctypes.c_uint32),
        ("buffer", ctypes.c_uint64),
        ("ne", ctypes.c_uint32 * 4),
        ("nb", ctypes.c_uint32 * 4),
        ("op", ctypes.c_uint32),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_uint64 * 10),
        ("view_src", ctypes.c_uint64),
        ("view_offs", ctypes.c_uint64),
        ("data", ctypes.c_uint64),
        ("name", ctypes.c_char * 64),
        ("padding", ctypes.c_char * 4),
    )


class Guest:
    """Sends messages to the host side; runs in a process that may crash."""

    def __init__(self, library: str, cpu: str) -> None:
        class Callbacks(ctypes.Structure):
            config = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32, ctypes.c_char_p)
            memory = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint32)
            _fields_ = (("get_config", config), ("get_shmem_ptr", memory))

        self.shared = ctypes.create_string_buffer(1 << 16)  # memory of guest and host
        said = {b"ggml.library.path": cpu.encode(), b"ggml.library.reg": b"ggml_backend_cpu_reg"}
        self.said = {key: ctypes.create_string_buffer(value) for key, value in said.items()}
        self.callbacks = Callbacks(
            Callbacks.config(lambda _, key: ctypes.addressof(self.said[key])), Callbacks.memory(lambda *_: ctypes.addressof(self.shared))
        )
        self.host = ctypes.CDLL(library)
        assert self.host.apir_backend_initialize(1, ctypes.byref(self.callbacks)) == 6  # APIR_LOAD_LIBRARY_INIT_BASE_INDEX: success
        self.buffer_type = self.send(BUFFER_TYPE)[1][:8]
        code, answer = self.send(ALLOCATE, self.buffer_type + struct.pack("<Q", 8 * SLOT))
        assert code == 0
        self.buffer = answer[:8]

    def send(self, command: int, message: bytes = b"") -> tuple[int, bytes]:
        """The host's code (0 is success) and what it wrote."""
        sent, answer, end = ctypes.create_string_buffer(message, len(message)), ctypes.create_string_buffer(256), ctypes.c_void_p()
        first, out = ctypes.addressof(sent), ctypes.addressof(answer)
        arguments = (ctypes.c_void_p(address) for address in (first, first + len(message), out, out + 256))
        code = self.host.apir_backend_dispatcher(1, ctypes.byref(self.callbacks), command, *arguments, ctypes.byref(end))
        return code, answer.raw[: end.value - out]

    def tensor(self, number: int, type_id: int, n_cols: int, n_rows: int, slot: int, **more) -> RpcTensor:
        """What a guest says of a tensor in the buffer."""
        row = N_COLS // 32 * 34 if type_id == Q8_0 else 4 * n_cols
        size = 34 if type_id == Q8_0 else 4
        (handle,) = struct.unpack("<Q", self.buffer)
        sizes = (size, row, row * n_rows, row * n_rows)
        return RpcTensor(
            id=number, type=type_id % (1 << 32), buffer=handle, ne=(n_cols, n_rows, 1, 1), nb=sizes, data=slot * SLOT, name=b"x", **more
        )

    def transfer(self, command: int, type_id: int, n_rows: int = N_ROWS, slot: int = 0, n_cols: int = N_COLS) -> int:
        """Bytes of a tensor to the host or from it, through the shared memory."""
        one = self.tensor(1, type_id, n_cols, n_rows, slot)
        return self.send(
            command, self.buffer + bytes(one) + struct.pack("<IQQ", 0, 0, 34 * n_rows if type_id == Q8_0 else 4 * n_cols * n_rows)
        )[0]

    def copy(self, source: int, target: int) -> int:
        return self.send(
            COPY_TENSOR, self.buffer + b"".join(bytes(self.tensor(1, t, N_COLS, N_ROWS, i)) for i, t in enumerate((source, target)))
        )[0]

    def compute(self, type_id: int, other: int = F32) -> int:
        """A graph of one matrix product: weights of a type times a column."""
        lib = codec_c.library()
        lib.ggml_op_name.restype = ctypes.c_char_p
        product = next(i for i in range(99) if lib.ggml_op_name(i) == b"MUL_MAT")
        out = self.tensor(3, F32, N_ROWS, 1, 2, op=product, src=(1, 2), flags=COMPUTED)
        tensors = (self.tensor(1, type_id, N_COLS, N_ROWS, 0), self.tensor(2, other, N_COLS, 1, 1), out)
        graph = struct.pack("<IQI", 1, 3, len(tensors)) + b"".join(map(bytes, tensors))
        ctypes.memmove(self.shared, graph, len(graph))
        code, answer = self.send(COMPUTE, struct.pack("<IQ", 0, len(graph)))
        assert code or answer[:4] == bytes(4)  # GGML_STATUS_SUCCESS
        return code

    def ask(self, command: int, *types: int, view: bool = False) -> int:
        """Tensors as they stand in the guest's memory: one alone, a product and its two sources, or
        a view, what it views and its source."""
        lib = codec_c.library()
        for name in ("ggml_init", "ggml_new_tensor_2d", "ggml_mul_mat", "ggml_view_1d"):
            getattr(lib, name).restype = ctypes.c_void_p
        lib.ggml_tensor_overhead.restype = ctypes.c_size_t

        class Params(ctypes.Structure):
            _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))

        lib.ggml_init.argtypes = (Params,)
        context = ctypes.c_void_p(lib.ggml_init(Params(1 << 16, None, True)))
        new = [ctypes.c_void_p(lib.ggml_new_tensor_2d(context, F32, ctypes.c_int64(N_COLS), ctypes.c_int64(N_ROWS))) for _ in range(2)]
        if view:
            new = [ctypes.c_void_p(lib.ggml_view_1d(context, new[0], ctypes.c_int64(N_COLS), ctypes.c_size_t(0))), new[0], new[0]]
        elif len(types) == 3:
            new.insert(0, ctypes.c_void_p(lib.ggml_mul_mat(context, *new)))
        size = lib.ggml_tensor_overhead() - 32  # of struct ggml_object
        message = b"" if command == SUPPORTS_OP else self.buffer_type
        for one, type_id in zip(new[: len(types)], types, strict=True):
            message += struct.pack("<i", type_id) + ctypes.string_at(one, size)[4:]
        return self.send(command, message)[0]


def _good(library: str, cpu: str) -> dict[str, object]:
    """What a guest may do."""
    guest = Guest(library, cpu)
    weights, column = np.arange(N_COLS * N_ROWS, dtype=np.float32).reshape(N_ROWS, N_COLS), np.linspace(-1, 1, N_COLS, dtype=np.float32)
    codes = []
    for slot, data in enumerate((weights, column)):
        ctypes.memmove(guest.shared, data.ctypes.data, data.nbytes)
        codes.append(guest.transfer(SET_TENSOR, F32, len(np.atleast_2d(data)), slot))
    codes += [guest.compute(F32), guest.transfer(GET_TENSOR, F32, 1, 2, N_ROWS)]
    product = np.frombuffer(guest.shared.raw, np.float32, N_ROWS)
    codes += [guest.transfer(SET_TENSOR, Q8_0), guest.transfer(GET_TENSOR, Q8_0), guest.copy(F32, F32), guest.compute(Q8_0)]
    codes += [guest.ask(SUPPORTS_OP, F32, Q8_0, F32), guest.ask(ALLOC_SIZE, Q8_0), guest.ask(ALLOC_SIZE, F32, F32, F32, view=True)]
    return {"codes": codes, "error": float(np.abs(product - weights @ column).max())}


def _hostile(library: str, cpu: str, type_id: int) -> list[int]:
    """A type at each place where a guest can name one."""
    guest = Guest(library, cpu)
    return [
        guest.transfer(SET_TENSOR, type_id),
        guest.transfer(GET_TENSOR, type_id),
        guest.copy(type_id, F32),
        guest.copy(F32, type_id),
        guest.compute(type_id),
        guest.compute(F32, type_id),
        guest.ask(SUPPORTS_OP, type_id, F32, F32),
        guest.ask(SUPPORTS_OP, F32, type_id, F32),
        guest.ask(SUPPORTS_OP, F32, F32, type_id),
        guest.ask(ALLOC_SIZE, type_id),
        guest.ask(ALLOC_SIZE, F32, F32, type_id),
        guest.ask(ALLOC_SIZE, F32, type_id, F32, view=True),
        0 if guest.compute(F32) else 1,  # the host goes on
    ]


@pytest.fixture(scope="module")
def host(tmp_path_factory) -> tuple[str, str]:
    """The libraries of the host side and of the CPU."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    folder = tmp_path_factory.mktemp("virtgpu")
    ggml = patched_tree(folder) / "ggml"
    sources, base = ggml / "src" / "ggml-virtgpu" / "backend", runtime.library("ggml-base")
    everything = folder / "host.cpp"
    everything.write_text("".join(f'#include "{path}"\n' for path in sorted(sources.glob("*.cpp"))))
    command = [compiler, "-std=c++20", "-w", "-shared", "-fPIC", str(everything), "-o", str(folder / "libhost.so"), f"-I{sources}"]
    command += [f"-I{ggml / 'include'}", f"-I{ggml / 'src'}", str(base), f"-Wl,-rpath,{base.parent}", "-ldl"]
    subprocess.run(command, check=True)
    return str(folder / "libhost.so"), str(runtime.library("ggml-cpu"))


def test_stock_types_are_computed(host):
    (answer,) = in_a_process(_good, [host])
    assert answer["codes"] == [0] * len(answer["codes"]) and answer["error"] < 1e-3


@pytest.mark.parametrize("type_id", [EQ8, EQ4, EBF16, *NO_TYPES])
def test_our_types_and_numbers_that_are_none_are_refused(host, type_id):
    (codes,) = in_a_process(_hostile, [(*host, type_id)])
    assert all(codes), codes
