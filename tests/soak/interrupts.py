# SPDX-License-Identifier: MIT
"""Conversions over a good output, ended by a signal at a random moment: the old file stays, or the
new one is whole. `make test-soak`; SOAK_INTERRUPTS runs (40)."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from entrollm_gguf.convert.pipeline import convert_model
from entrollm_gguf.inspect.verify import verify_file

RUNS = int(os.environ.get("SOAK_INTERRUPTS", "40"))
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)


@pytest.mark.parametrize("seed", [int(time.time())])
def test_outputs_survive(tiny_model, tmp_path, seed):
    model, out = tiny_model("mistral").folder, tmp_path / "model.gguf"
    random.seed(seed)
    convert_model(model, out, recipe="EQ8-rows")
    good = out.read_bytes()
    command = [sys.executable, "-m", "entrollm_gguf.cli", "convert", str(model), str(out), "--recipe", "EQ4-rows", "--force"]
    started = time.monotonic()
    assert subprocess.run(command, capture_output=True).returncode == 0
    whole, new = time.monotonic() - started, out.read_bytes()
    assert new != good
    ends: Counter[str] = Counter()
    for i in range(RUNS):
        out.write_bytes(good)
        number = SIGNALS[i % len(SIGNALS)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=_heed_interrupts)
        time.sleep(random.uniform(0, 1.1 * whole))
        process.send_signal(number)
        _, said = process.communicate(timeout=120)
        left = sorted(path.name for path in tmp_path.iterdir())
        assert out.read_bytes() in (good, new), (seed, i, number, said)
        abandoned = [".model.gguf.part"] if number is signal.SIGKILL else []
        assert set(left) - {"model.gguf"} <= set(abandoned), (seed, i, number, left, said)
        finished = process.returncode == 0
        assert finished or "Traceback" not in said or _before_the_command(said), (seed, i, number, said)
        ends[f"{signal.Signals(number).name} {'too late' if finished else 'in time'}"] += 1
    assert {f"{signal.Signals(number).name} in time" for number in SIGNALS} <= ends.keys()
    # what the last SIGKILL left behind is no obstacle, and is removed
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert verify_file(out).problems == () and [path.name for path in tmp_path.iterdir()] == [out.name]
    print(f"seed {seed}, a conversion takes {whole:.1f} s: {dict(ends)}")


def _heed_interrupts() -> None:
    """A shell's background jobs ignore SIGINT, and so do their children, this test's among them."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _before_the_command(said: str) -> bool:
    """Whether Python itself answered a signal that came while it was still importing."""
    frames = [line for line in said.splitlines() if line.lstrip().startswith("File ")]
    return not any(Path("convert/pipeline.py").as_posix() in line for line in frames)
