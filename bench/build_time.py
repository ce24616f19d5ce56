# SPDX-License-Identifier: MIT
"""Time to build the runtime beside a stock llama-cpp-python of the same source. `python
bench/build_time.py OUT.json [JOBS]`, half an hour on two cores.

Both start from nothing: the archive at hand, an empty cache, Ninja, the same number of jobs. What
pip would download first (scikit-build-core) is installed before the clock starts. Processor time is
that of all child processes and does not depend on what else runs on the machine; wall time does.
The limit is twice the stock build (README).
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from provenance import provenance

from entrollm_gguf import runtime
from entrollm_gguf.runtime.fetch import fetch_sdist
from entrollm_gguf.runtime.pin import read_pin

# builds and packs; what is installed in this environment stays as it is
_OURS = """
import sys
from entrollm_gguf.runtime import builder
builder.installer.is_installed = lambda digest: True
builder.build(jobs=int(sys.argv[1]), say=lambda line: print(line, file=sys.stderr))
"""


def timed(command: list[str | Path], **variables: str) -> dict[str, float]:
    """Run a command with further environment variables; seconds of wall and processor time."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(list(map(str, command)), check=True, env={**os.environ, **variables})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "wall_seconds": round(time.monotonic() - started, 1),
        "processor_seconds": round(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, 1),
    }


def main(out: Path, jobs: int) -> None:
    """Build stock, then ours."""
    begun = provenance(f"python bench/build_time.py OUT.json {jobs}")
    sdist = fetch_sdist(read_pin())
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        venv = Path(scratch) / "venv"
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        subprocess.run([venv / "bin" / "pip", "install", "-q", "scikit-build-core[pyproject]>=0.9.2", "cmake", "ninja"], check=True)
        path = f"{venv / 'bin'}{os.pathsep}{os.environ['PATH']}"
        stock_command = [venv / "bin" / "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-cache-dir", "-w", scratch, sdist]
        stock = timed(stock_command, CMAKE_GENERATOR="Ninja", CMAKE_BUILD_PARALLEL_LEVEL=str(jobs), PATH=path)
        ours_command = [sys.executable, "-c", _OURS, str(jobs)]
        ours = timed(ours_command, ENTROLLM_CACHE=str(Path(scratch) / "cache"), ENTROLLM_SDIST=str(sdist))
    ratios = {key: round(ours[key] / stock[key], 2) for key in stock}
    report = {
        **begun,
        "compiler": runtime.info().compiler,
        "jobs": jobs,
        "load_average_before": load,
        "stock": stock,
        "ours": ours,
        "ours_over_stock": ratios,
    }
    out.write_text(json.dumps(report, indent=2) + "\n")
    for key, ratio in ratios.items():
        print(f"{key:18} stock {stock[key]:7.1f}  ours {ours[key]:7.1f}  ratio {ratio:.2f}")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) == 3 else os.cpu_count() or 1)
