# SPDX-License-Identifier: MIT
"""Servers of the runtime as background processes."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from entrollm_gguf import runtime


def free_port() -> int:
    """A TCP port that nobody listens on right now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def _process(command: list, log: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen]:
    with open(log, "wb") as out:
        process = subprocess.Popen(
            [str(part) for part in command],
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **environment},
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(process: subprocess.Popen, log: Path, is_up, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not is_up():
        assert process.poll() is None and time.monotonic() < end, log.read_text(errors="replace")[-2000:]
        time.sleep(0.1)


@contextlib.contextmanager
def llama_server(model: Path, folder: Path, *arguments: str, mode: str = "fused") -> Iterator[tuple[str, Path]]:
    """llama-server on a model; yields its address and its log."""
    port, log = free_port(), folder / "server.log"
    command = [runtime.tool("llama-server"), "-m", model, "--host", "127.0.0.1", "--port", port, "-t", "2", "-c", "512", "-v", *arguments]

    def healthy() -> bool:
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
        return False

    with _process(command, log, {"GGML_ENTROPY_MODE": mode}) as process:
        _wait(process, log, healthy)
        yield f"http://127.0.0.1:{port}", log


@contextlib.contextmanager
def rpc_server(folder: Path) -> Iterator[str]:
    """rpc-server with the CPU; yields host:port."""
    port = free_port()
    log = folder / f"rpc-{port}.log"

    def listening() -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
            return True
        return False

    with _process([runtime.tool("rpc-server"), "-H", "127.0.0.1", "-p", port, "-t", "2"], log, {}) as process:
        _wait(process, log, listening)
        yield f"127.0.0.1:{port}"
