# SPDX-License-Identifier: MIT
"""Fuzzing with fresh seeds: `python tests/fuzz/run.py MINUTES [SEED]` (`make fuzz`), on the
AddressSanitizer and UBSan build.

Rounds until the time is up, each with a seed of its own: the codec's property tests with other
examples (hypothesis), in an instrumented library, and damaged model files through the loader in
load and fused mode. A failure prints its seed and the command that repeats the round.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
WORK = TESTS.parent / "build" / "fuzz"
ASAN = "halt_on_error=1"

# damaged files of a round, per model and mode
POSITIONS = 400
TRUNCATIONS = 200
CODEC_TESTS = (
    "tests/unit/test_codec.py::test_round_trip",
    "tests/unit/test_codec.py::test_any_bits_decode_as_the_reference_says",
    "tests/unit/test_code_plan.py",
    "tests/unit/test_damaged.py",
)


def gcc_library(name: str) -> str:
    """Path of a library that belongs to gcc."""
    return subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()


def codec_round(built: Path, seed: int) -> bool:
    """Hypothesis with this seed; whether all went well."""
    environment = {
        **os.environ,
        # the interpreter is not instrumented, so the sanitizer's runtime is preloaded, and Python's
        # own allocations look like leaks
        "ASAN_OPTIONS": f"detect_leaks=0 {ASAN}",
        "UBSAN_OPTIONS": "halt_on_error=1 print_stacktrace=1",
        "LD_PRELOAD": f"{gcc_library('libasan.so')} {gcc_library('libubsan.so')}",
        "ENTROLLM_CODEC_LIBRARY": str(built / "libggml-base.so"),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--hypothesis-seed={seed}", *CODEC_TESTS]
    result = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, errors="replace")
    return told(result, f"codec: {result.stdout.rstrip().splitlines()[-1] if result.stdout.strip() else 'no output'}")


def loader_round(built: Path, model: Path, mode: str, seed: int) -> bool:
    """Damaged copies of a model through the loader; whether all went well."""
    # every byte gets its turn: the seed chooses one of as many parts as a round can manage
    parts = max(1, 2 * model.stat().st_size // POSITIONS)
    arguments = ["--stride", "1", "--truncations", str(TRUNCATIONS * parts), "--jobs", f"{parts}/{seed % parts + 1}"]
    command = [built / "test-entropy-load", model, "--seed", str(seed), *arguments]
    environment = {**os.environ, "GGML_ENTROPY_MODE": mode, "ASAN_OPTIONS": ASAN}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")
    last = result.stdout.rstrip().splitlines()[-1] if result.stdout.strip() else "no output"
    ours = "runtime error" in result.stderr and "entropy" in result.stderr
    result.returncode = result.returncode or int(ours)  # UBSan reports and goes on; findings in upstream's own code are no failure of ours
    return told(result, f"loader, {model.stem}, {mode}: {last}")


def told(result: subprocess.CompletedProcess[str], line: str) -> bool:
    """Print a line, and on a failure the end of what was said."""
    print(f"  {line}", flush=True)
    if result.returncode:
        print("\n".join((result.stdout + result.stderr).splitlines()[-60:]))
    return result.returncode == 0


def main(minutes: float, first_seed: int | None) -> int:
    """Rounds until the time is up; with a seed, that one round."""
    WORK.mkdir(parents=True, exist_ok=True)
    command = [Path(sys.executable).parent / "entrollm", "runtime", "build", "--sanitize", "address"]
    built = Path(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip())
    make = [sys.executable, TESTS / "sanitizers" / "make_models.py", WORK]
    models = [Path(line) for line in subprocess.run(make, stdout=subprocess.PIPE, text=True, check=True).stdout.split()]
    end, rounds = time.monotonic() + 60 * minutes, 0
    while rounds == 0 or (first_seed is None and time.monotonic() < end):
        seed = random.SystemRandom().randrange(2**31) if first_seed is None else first_seed
        rounds += 1
        print(f"round {rounds}, seed {seed}", flush=True)
        good = codec_round(built, seed)
        for model in models:
            for mode in ("load", "fused"):
                good = loader_round(built, model, mode, seed) and good
        if not good:
            print(f"fuzz: failed with seed {seed}; again: {sys.executable} tests/fuzz/run.py 0 {seed}")
            return 1
    print(f"fuzz: {rounds} rounds, nothing found")
    return 0


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    sys.exit(main(float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) == 3 else None))
