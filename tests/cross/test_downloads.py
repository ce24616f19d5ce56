# SPDX-License-Identifier: MIT
"""`-hf OWNER/MODEL:TAG`: a coded file that llama.cpp fetches itself, from a server that answers as
the Hub does, over HTTP and, if the runtime was built with OpenSSL, over HTTPS."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import os
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from entrollm_gguf import runtime

REPO, COMMIT = "somebody/tiny", "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def hub(files: dict[str, Path], certificate: Path | None = None) -> Iterator[str]:
    """Serves the three requests that llama.cpp makes of the Hub: branches, files, one file."""
    listing = [
        {"type": "file", "path": name, "size": path.stat().st_size, "lfs": {"oid": hashlib.sha256(path.read_bytes()).hexdigest()}}
        for name, path in files.items()
    ]
    answers = {
        f"/api/models/{REPO}/refs": json.dumps({"branches": [{"name": "main", "targetCommit": COMMIT}]}).encode(),
        f"/api/models/{REPO}/tree/{COMMIT}": json.dumps(listing).encode(),
        **{f"/{REPO}/resolve/{COMMIT}/{name}": path.read_bytes() for name, path in files.items()},
    }

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = answers.get(self.path.split("?")[0])
            self.send_response(404 if body is None else 200)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body or b"")

        do_HEAD = do_GET

        def log_message(self, *_) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("localhost", 0), Handler)
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"{'https' if certificate else 'http'}://localhost:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def run(address: str, tag: str, cache: Path, **environment: str) -> subprocess.CompletedProcess:
    command = [runtime.tool("llama-completion"), "-hf", f"{REPO}:{tag}", "-p", "The", "-n", "2", "-no-cnv", "-lv", "3"]
    more = {"HF_ENDPOINT": address, "HF_HOME": str(cache), "LLAMA_CACHE": str(cache), "GGML_ENTROPY_MODE": "fused", **environment}
    options = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "errors": "replace", "timeout": 120}
    return subprocess.run(command, env={**os.environ, **more}, **options)


@pytest.fixture
def files(converted):
    return {f"tiny-{recipe}.gguf": converted("llama", recipe) for recipe in ("EQ8-rows", "EQ4-rows")}


def test_over_http(files, tmp_path):
    """The tag is a part of the file's name, as for stock types."""
    with hub(files) as address:
        ran = run(address, "EQ4-rows", tmp_path)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "entropy-coded tensors" in ran.stderr and "stay as they are" in ran.stderr
    (blob,) = (path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size > 10_000 and not path.is_symlink())
    assert blob.read_bytes() == files["tiny-EQ4-rows.gguf"].read_bytes()


@pytest.mark.skipif(not runtime.info().https, reason="built without OpenSSL's headers")
@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_over_https(files, tmp_path):
    """Certificates are checked: one that nobody vouches for is refused."""
    certificate = tmp_path / "localhost.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", certificate, "-out", tmp_path / "c.pem"]
    subprocess.run(command, check=True, capture_output=True)
    certificate.write_bytes(certificate.read_bytes() + (tmp_path / "c.pem").read_bytes())
    with hub(files, certificate) as address:
        refused = run(address, "EQ8-rows", tmp_path / "refused")
        assert refused.returncode != 0 and "HTTPS is not supported" not in refused.stderr
        ran = run(address, "EQ8-rows", tmp_path / "trusted", SSL_CERT_FILE=str(tmp_path / "c.pem"))
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "stay as they are" in ran.stderr
