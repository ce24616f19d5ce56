# SPDX-License-Identifier: MIT
"""Generation where memory is short: `python bench/starved.py FOLDER OUT.json LIMIT_MIB` as root on
Linux, on the files of bench/scale.py.

Each file runs in a memory cgroup of its own (version 1 or 2) with that limit, which counts the
pages of a mapped file as well, with the page cache dropped before. A model that does not fit is
read from storage again for every token. The speed of the storage, a plain read of a file that is
not cached, is measured in the same run. The results say which files are larger than the limit; they
are run in the same way.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from provenance import provenance

from entrollm_gguf import runtime

_RUNS = (("Q8_0", "auto"), ("Q6_K", "auto"), ("Q4_K_M", "auto"), ("EQ8", "fused"), ("EQ8-4.5", "fused"))
_TOKENS = 16
_TIMEOUT = 900


@contextlib.contextmanager
def limited(n_bytes: int) -> Iterator[Path]:
    """A memory cgroup with that limit; yields the file that takes the numbers of its processes."""
    first = Path("/sys/fs/cgroup/memory")
    root = first if first.is_dir() else Path("/sys/fs/cgroup")
    group = root / f"entrollm-{os.getpid()}"
    group.mkdir()
    try:
        (group / ("memory.limit_in_bytes" if root == first else "memory.max")).write_text(str(n_bytes))
        with contextlib.suppress(OSError):  # no swap, where the kernel counts it
            (group / ("memory.swappiness" if root == first else "memory.swap.max")).write_text("0")
        yield group / "cgroup.procs"
    finally:
        for _ in range(50):
            try:
                group.rmdir()  # not before the kernel has let go of the process
                break
            except OSError:
                time.sleep(0.1)


def drop_caches() -> None:
    """Forget all of the page cache that is not dirty."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("1")


def read_speed(path: Path) -> float:
    """GB/s of reading a file from storage."""
    drop_caches()
    started, n_bytes = time.perf_counter(), 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(1 << 22):
            n_bytes += len(block)
    return n_bytes / (time.perf_counter() - started) / 1e9


def generation(path: Path, mode: str, limit: int) -> dict:
    """Tokens per second under the limit, or why there are none."""
    drop_caches()
    command = [runtime.tool("llama-bench"), "-m", path, "-p", "0", "-n", str(_TOKENS), "-r", "1", "-o", "json", "-t", str(os.cpu_count())]
    with limited(limit) as processes:

        def enter() -> None:
            processes.write_text(str(os.getpid()))

        started = time.perf_counter()
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_TIMEOUT, preexec_fn=enter, env={**os.environ, "GGML_ENTROPY_MODE": mode}
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after {_TIMEOUT} s, {_TOKENS} tokens"}
        seconds = time.perf_counter() - started
    if done.returncode != 0:
        return {"failed": f"exit code {done.returncode}", "seconds": seconds}
    return {"tokens_per_second": json.loads(done.stdout)[0]["avg_ts"], "seconds": seconds}


def main(folder: Path, out: Path, limit: int) -> None:
    """All files, one after the other."""
    begun = provenance(f"python bench/starved.py FOLDER OUT.json {limit >> 20}")
    speed = read_speed(folder / "Q8_0.gguf")
    print(f"storage: {speed:.2f} GB/s")
    rows = []
    for name, mode in _RUNS:
        path = folder / f"{name}.gguf"
        row = {
            "name": name,
            "mode": mode,
            "bytes": path.stat().st_size,
            "fits": path.stat().st_size < limit,
            **generation(path, mode, limit),
        }
        rows.append(row)
        told = f"{row['tokens_per_second']:.2f} tokens/s" if "tokens_per_second" in row else row["failed"]
        print(f"{name:10} {row['bytes'] / 2**20:6.0f} MiB of {limit >> 20} MiB: {told}")
    report = {
        **begun,
        "storage_gb_per_second": speed,
        "limit_bytes": limit,
        "rows": rows,
    }
    out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    if os.geteuid() != 0:
        sys.exit("bench/starved.py: needs root, for the memory limit and to drop the page cache")
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) << 20)
