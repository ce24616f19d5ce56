#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Builds, checks and measures the CUDA path on a machine with a GPU. Runs there, on Python alone: no packages, no network.

    python3 bench/gpu/run.py PACK --out FOLDER [--work FOLDER] [--budget SECONDS] [--stage N]

PACK is what bench/gpu/pack.py made. Needed on PATH: nvcc, cmake, ninja (or make), a C++ compiler. Steps that are done are not repeated: after a call was cut
off, or its budget ran out, the next goes on there. Results are in FOLDER/gpu-results.json after every step, all output in FOLDER/gpu-log.txt.

Stage 1 needs the kernels and the codec only: bit-exactness, compute-sanitizer, table of kernel speeds. Stage 2 builds llama.cpp for this GPU: products beside
stock types, test-backend-ops, perplexity CPU = CUDA, llama-bench on models of 1B and 8B random weights. Stage 3 runs the peers, where their packages are.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

CPUS = os.cpu_count() or 1
TYPES = ("Q8_0", "EQ8", "Q4_0", "Q4_K_M", "EQ4")


class Failure(Exception):
    """A step went wrong; the message is kept in the results and the other steps go on."""


class OutOfTime(Exception):
    """The budget of this call is spent."""


class Run:
    """Folders, the clock, and what is known so far."""

    def __init__(self, pack: Path, out: Path, work: Path, budget: float) -> None:
        self.pack, self.out, self.work = pack, out, work
        self.deadline = time.monotonic() + budget
        self.tree = work / "pack" / "llama.cpp"
        self.gpu = work / "pack" / "gpu"
        out.mkdir(parents=True, exist_ok=True)
        work.mkdir(parents=True, exist_ok=True)
        self.state_file = work / "state.json"
        self.state = json.loads(self.state_file.read_text()) if self.state_file.is_file() else {"steps": {}}

    def left(self) -> float:
        """Seconds that this call may still take."""
        return self.deadline - time.monotonic()

    def save(self) -> None:
        """State for the next call, and the same as results."""
        text = json.dumps(self.state, indent=1)
        self.state_file.write_text(text)
        (self.out / "gpu-results.json").write_text(text)

    def log(self, text: str) -> None:
        """Everything that programs said."""
        with open(self.work / "gpu-log.txt", "a", errors="replace") as file:
            file.write(text if text.endswith("\n") else text + "\n")
        shutil.copyfile(self.work / "gpu-log.txt", self.out / "gpu-log.txt")

    def command(self, *words: str | Path, timeout: float = 600, env: dict[str, str] | None = None, check: bool = True) -> str:
        """Run a program; its output.

        Raises:
            Failure: it failed, or took longer than it may.
            OutOfTime: the call's budget ended first.
        """
        command = [str(word) for word in words]
        limit = min(timeout, self.left())
        if limit < 2:
            raise OutOfTime
        started = time.monotonic()
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env={**os.environ, **(env or {})}
        )
        try:
            said, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            process.kill()
            said, _ = process.communicate()
            self.log(f"$ {' '.join(command)}\n{said}\n[stopped after {time.monotonic() - started:.0f} s]")
            if limit < timeout:
                raise OutOfTime from None
            raise Failure(f"{Path(command[0]).name}: took longer than {timeout:.0f} s") from None
        self.log(f"$ {' '.join(command)}\n{said}\n[{process.returncode}, {time.monotonic() - started:.1f} s]")
        if check and process.returncode != 0:
            lines = [line for line in said.splitlines() if line.strip()]
            reason = next((line for line in lines if re.search(r"\berror\b|Error|WRONG|FAIL", line)), lines[-1] if lines else "no output")
            raise Failure(f"{Path(command[0]).name}: exit code {process.returncode}: {reason.strip()[:300]}")
        return said


# ---- stage 1: the kernels by themselves -------------------------------------------------------------------------------------------------


def machine(run: Run) -> dict:
    """What all figures belong to."""
    query = "name,driver_version,compute_cap,memory.total,clocks.max.sm,clocks.max.mem"
    gpu = run.command("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", timeout=60, check=False).strip()
    nvcc = run.command("nvcc", "--version", timeout=60).strip().splitlines()
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")  # noqa: UP017, Python there may be older
    return {"gpu": gpu, "nvcc": nvcc[-2:], "cpus": CPUS, "system": platform.platform(), "date": date}


def base(run: Run) -> dict:
    """The codec, as ggml-base."""
    build = run.work / "build-base"
    run.command("cmake", "-S", run.tree, "-B", build, *generator(), *COMMON, "-DGGML_NATIVE=OFF", "-DGGML_CUDA=OFF", timeout=200)
    run.command("cmake", "--build", build, "-j", CPUS, "--target", "ggml-base", timeout=300)
    return {}


def harness(run: Run) -> dict:
    """nvcc on one file."""
    includes = [f"-I{run.tree / 'ggml' / part}" for part in ("include", "src", "src/ggml-cuda")]
    libraries = run.work / "build-base" / "bin"
    run.command(
        "nvcc", "-std=c++17", "-O3", "-use_fast_math", "-arch=native", "-lineinfo", *includes, f"-I{run.gpu}", run.gpu / "harness.cu",
        "-o", run.work / "harness", f"-L{libraries}", "-lggml-base", "-Xlinker", f"-rpath={libraries}", timeout=300,
    )  # fmt: skip
    return {}


def check(run: Run) -> dict:
    """Bit-exact rows, products within the bound."""
    said = run.command(run.work / "harness", "check", timeout=200, check=False)
    match = re.search(r"(\d+) checks, (\d+) wrong", said)
    if match is None:
        raise Failure((said.strip().splitlines() or ["no output"])[-1])
    return {"checks": int(match[1]), "wrong": int(match[2]), "first": [line for line in said.splitlines() if "WRONG" in line][:20]}


def sanitizer(tool: str) -> Callable[[Run], dict]:
    """compute-sanitizer over the small cases."""

    def step(run: Run) -> dict:
        program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        if not Path(program).is_file():
            return {"skipped": "no compute-sanitizer on this machine"}
        said = run.command(program, "--tool", tool, run.work / "harness", "small", timeout=240, check=False)
        summary = [line.strip("= ") for line in said.splitlines() if "SUMMARY" in line]
        return {"summary": summary, "clean": any("0 errors" in line or "0 hazards" in line for line in summary)}

    return step


def table(run: Run) -> dict:
    """Kernel speeds."""
    path = run.work / "table.json"
    run.command(run.work / "harness", "table", path, timeout=400)
    return json.loads(path.read_text())


# ---- stage 2: llama.cpp -----------------------------------------------------------------------------------------------------------------

COMMON = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=ON",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_BUILD_TESTS=ON",
)
PROGRAMS = ("llama-bench", "llama-batched-bench", "llama-perplexity", "test-backend-ops")


def generator() -> list[str]:
    """ninja if it is there."""
    return ["-G", "Ninja"] if shutil.which("ninja") else []


def build(run: Run) -> dict:
    """The patched tree for this GPU only. Takes minutes; a call that is cut off goes on with what is compiled."""
    folder = run.work / "build"
    run.command(
        "cmake", "-S", run.tree, "-B", folder, *generator(), *COMMON, "-DGGML_CUDA=ON", "-DGGML_CUDA_NCCL=OFF", "-DCMAKE_CUDA_ARCHITECTURES=native", timeout=200
    )  # fmt: skip
    run.command("cmake", "--build", folder, "-j", CPUS, "--target", *PROGRAMS, timeout=900)
    for name in ("kernel-table", "synth-model"):
        includes = [f"-I{run.tree / 'ggml' / part}" for part in ("include", "src")]
        run.command(
            "g++", "-std=c++17", "-O2", *includes, f"-I{run.gpu}", run.gpu / f"{name}.cpp", "-o", run.work / name,
            f"-L{folder / 'bin'}", "-lggml", "-lggml-base", "-lpthread", f"-Wl,-rpath,{folder / 'bin'}", f"-Wl,-rpath-link,{folder / 'bin'}", timeout=200,
        )  # fmt: skip
    return {}


def program(run: Run, name: str) -> Path:
    """A program of the build."""
    return run.work / "build" / "bin" / name


def device_name(run: Run) -> str:
    """ggml's name of the GPU."""
    said = run.command(program(run, "llama-bench"), "--list-devices", timeout=60)
    match = re.search(r"^\s*(CUDA\d+):", said, re.MULTILINE)
    if match is None:
        raise Failure("llama-bench lists no CUDA device")
    return match[1]


def ours(run: Run) -> dict:
    """Our cases of test-backend-ops, GPU against CPU."""
    return backend_ops(run, "-p", "type_a=eq|type=eq")


def upstream(op: str) -> Callable[[Run], dict]:
    """Upstream's cases of an op that we touch."""
    return lambda run: backend_ops(run, "-o", op)


def backend_ops(run: Run, *arguments: str) -> dict:
    """Counts of test-backend-ops."""
    said = run.command(program(run, "test-backend-ops"), "test", "-b", device_name(run), *arguments, timeout=400, check=False)
    match = re.search(r"(\d+)/(\d+) tests passed", said)
    if match is None:
        raise Failure((said.strip().splitlines() or ["no output"])[-1])
    return {
        "passed": int(match[1]),
        "of": int(match[2]),
        "not_supported": said.count("not supported"),
        "failed": [line.strip() for line in said.splitlines() if "FAIL" in line][:20],
    }


def perplexity(run: Run) -> dict:
    """CPU in load mode, CUDA fused and CUDA in load mode, on tiny models of each kind and op; batches of 512 and of 4."""
    results = {}
    text = run.work / "pack" / "text.txt"
    for model in sorted((run.work / "pack" / "models").glob("*.gguf")):
        row = {}
        for name, mode, arguments in (
            ("cpu", "load", ["--device", "none", "-ngl", "0", "-ub", "512"]),
            ("cuda fused", "fused", ["-ngl", "99", "-ub", "512"]),
            ("cuda fused, batch of 4", "fused", ["-ngl", "99", "-ub", "4"]),
            ("cuda load", "load", ["-ngl", "99", "-ub", "512"]),
        ):
            command = [program(run, "llama-perplexity"), "-m", model, "-f", text, "-c", "128", "-b", "512", "--chunks", "4", *arguments]
            said = run.command(*command, timeout=120, env={"GGML_ENTROPY_MODE": mode}, check=False)
            match = re.search(r"Final estimate: PPL = ([\d.]+|nan|inf)", said)
            row[name] = float(match[1]) if match else "failed: " + (said.strip().splitlines() or ["no output"])[-1][:200]
        results[model.stem] = row
    return results


def products(run: Run) -> dict:
    """kernel-table.cpp."""
    path = run.work / "products.json"
    run.command(run.work / "kernel-table", path, device_name(run), timeout=400)
    return json.loads(path.read_text())


def models(size: str, kind: str) -> Callable[[Run], dict]:
    """One random model: make it, tokens per second at batch 1 and 4 and for prompts of 512, memory; delete it."""

    def step(run: Run) -> dict:
        path = run.work / f"random-{size}-{kind}.gguf"
        if not path.is_file():
            part = path.with_suffix(".part")
            run.command(run.work / "synth-model", part, size, kind, timeout=300)
            part.replace(path)
        result: dict = {"file_bytes": path.stat().st_size}
        bench = [program(run, "llama-bench"), "-m", path, "-ngl", "99", "-p", "512", "-n", "64", "-r", "3", "-o", "json"]
        for ubatch in (512, 2048):
            arguments = ["-ub", str(ubatch), *(["-p", "2048", "-b", "2048", "-n", "0"] if ubatch == 2048 else [])]
            said = run.command(*bench, *arguments, timeout=200)
            for row in json.loads(said[said.index("[\n") : said.rindex("]") + 1]):
                what = f"generate {row['n_gen']}" if row["n_gen"] else f"prompt {row['n_prompt']}, ubatch {ubatch}"
                result[what] = {"tokens_per_s": row["avg_ts"], "stddev": row["stddev_ts"]}
        said = run.command(
            program(run, "llama-batched-bench"), "-m", path, "-ngl", "99", "-c", "2048", "-npp", "64", "-ntg", "64", "-npl", "1,2,4,8", timeout=200, check=False
        )  # fmt: skip
        for line in said.splitlines():
            cells = [cell.strip() for cell in line.split("|")[1:-1]]
            if len(cells) >= 8 and cells[0].isdigit():
                result[f"batch of {cells[2]}"] = {"tokens_per_s": float(cells[7])}
        result["model_buffers_mib"] = {name: float(mib) for name, mib in re.findall(r"(\S+) model buffer size =\s+([\d.]+) MiB", said)}
        result["mode"] = next((line.strip() for line in said.splitlines() if "llama_entropy" in line), "stock type")
        path.unlink()
        return result

    return step


def cold_start(run: Run) -> dict:
    """Load mode: decoded on the device against on the host, both from the page cache."""
    path = run.work / "random-1B-EQ8-start.gguf"
    if not path.is_file():
        run.command(run.work / "synth-model", path, "1B", "EQ8", timeout=300)
    result = {}
    bench = [program(run, "llama-bench"), "-m", path, "-ngl", "99", "-p", "0", "-n", "1", "-r", "1", "-v"]
    for name, env in (("load", {"GGML_ENTROPY_MODE": "load"}), ("fused", {"GGML_ENTROPY_MODE": "fused"})):
        said = run.command(*bench, timeout=200, env=env)
        result[name] = [line.strip() for line in said.splitlines() if "llama_entropy" in line or "load time" in line]
    path.unlink()
    return result


# ---- stage 3: peers ---------------------------------------------------------------------------------------------------------------------


def peers(run: Run) -> dict:
    """bf16_huffman_infer and dfloat11, where they are installed."""
    code = (
        "import importlib.util, json; "
        "print(json.dumps({name: importlib.util.find_spec(name) is not None for name in ('torch', 'bf16_huffman_infer', 'dfloat11')}))"
    )
    found = json.loads(run.command(sys.executable, "-c", code, timeout=60).strip().splitlines()[-1])
    missing = [name for name, there in found.items() if not there]
    if missing:
        return {"skipped": f"not installed here: {', '.join(missing)}"}
    return json.loads(run.command(sys.executable, run.gpu / "peers.py", timeout=400).strip().splitlines()[-1])


STEPS: list[tuple[int, str, Callable[[Run], dict]]] = [
    (1, "machine", machine),
    (1, "codec", base),
    (1, "harness", harness),
    (1, "check", check),
    (1, "memcheck", sanitizer("memcheck")),
    (1, "racecheck", sanitizer("racecheck")),
    (1, "table", table),
    (2, "build", build),
    (2, "our cases", ours),
    (2, "perplexity", perplexity),
    (2, "products", products),
    *((2, f"1B {kind}", models("1B", kind)) for kind in TYPES),
    *((2, f"8B {kind}", models("8B", kind)) for kind in TYPES),
    (2, "cold start", cold_start),
    *((2, f"upstream {op}", upstream(op)) for op in ("GET_ROWS", "MUL_MAT_ID", "MUL_MAT")),
    (3, "peers", peers),
]


def unpack(run: Run) -> None:
    """The pack, once; another pack begins anew but for what was built."""
    stamp = f"{run.pack.stat().st_size} {int(run.pack.stat().st_mtime)}"
    mark = run.work / "unpacked"
    if mark.is_file() and mark.read_text() == stamp:
        return
    shutil.rmtree(run.work / "pack", ignore_errors=True)
    with tarfile.open(run.pack) as archive:
        archive.extractall(run.work / "pack", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    run.state = {"steps": {}, "pack": json.loads((run.work / "pack" / "pack.json").read_text())}
    mark.write_text(stamp)


def main() -> int:
    """Run what is left to do. 0: all is done and right; 1: something is wrong; 3: out of time, call again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder for results")
    parser.add_argument("--work", type=Path, default=Path("gpu-work"), help="folder that stays between calls")
    parser.add_argument("--budget", type=float, default=570, help="seconds that this call may take")
    parser.add_argument("--stage", type=int, help="only this one")
    arguments = parser.parse_args()
    run = Run(arguments.pack.resolve(), arguments.out.resolve(), arguments.work.resolve(), arguments.budget)
    for tool in ("nvcc", "cmake", "g++"):
        if shutil.which(tool) is None:
            print(f"{tool} is missing; put it on PATH", file=sys.stderr)
            return 1
    unpack(run)
    run.state["command"] = " ".join(sys.argv)
    for stage, name, step in STEPS:
        if arguments.stage not in (None, stage) or "result" in run.state["steps"].get(name, {}):
            continue
        if run.left() < 5:
            break
        started = time.monotonic()
        try:
            entry: dict = {"result": step(run)}
        except OutOfTime:
            print(f"{name}: out of time; call again")
            break
        except (Failure, OSError, ValueError, KeyError, IndexError) as error:
            entry = {"failed": f"{type(error).__name__}: {error}"}
        entry["seconds"] = round(time.monotonic() - started, 1)
        run.state["steps"][name] = entry
        run.save()
        print(f"{name}: {entry.get('failed', 'done')} ({entry['seconds']} s)", flush=True)
    run.save()
    steps = run.state["steps"]
    waiting = [name for _, name, _ in STEPS if name not in steps]
    failed = [name for name, entry in steps.items() if "failed" in entry]
    wrong = [name for name, entry in steps.items() if entry.get("result", {}).get("wrong") or entry.get("result", {}).get("failed")]
    print(f"{len(steps)} steps done, {len(waiting)} to do; failed: {failed or 'none'}; wrong: {wrong or 'none'}")
    return 3 if waiting else 1 if failed or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
