#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Builds, checks and measures the CUDA path on a machine with a GPU. Runs there, on Python alone:
no packages, no network.

One file, since it travels to that machine alone.

    python3 run.py PACK --out FOLDER [--work FOLDER] [--budget SECONDS] [--stage N] [--skip STEP...]

PACK is what bench/gpu/pack.py made; this file is in it. Needed on PATH: nvcc, cmake, ninja (or
make), a C++ compiler; none of them where the pack holds programs (pack.py --arch). Steps that are
done are not repeated: after a call that was cut off, or whose budget ran out, the next one goes on
from there. Results are in FOLDER/gpu-results.json after every step, all output in
FOLDER/gpu-log.txt.

Stage 1 needs the kernels and the codec only: bit-exactness, compute-sanitizer, table of kernel
speeds. Stage 2 builds llama.cpp for this GPU: test-backend-ops, CUDA = CPU on tiny models in all
kinds of placement, llama-bench on models of 1B and 8B random weights, products beside stock types.
Stage 3 runs the peers, where their packages are. Every step says what is wrong; if anything is, the
exit code is 1.
"""

from __future__ import annotations

import argparse
import filecmp
import hashlib
import itertools
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

CPUS = os.cpu_count() or 1
TYPES = ("Q8_0", "EQ8", "EQ8-4.5", "Q4_0", "Q4_K_M", "EQ4")


class Failure(Exception):
    """A step went wrong; the message is kept in the results and the other steps go on."""


class OutOfTime(Exception):
    """The budget of this call is spent."""


class Run:
    """Folders, the clock, and what is known so far."""

    def __init__(self, pack: Path, out: Path, work: Path, budget: float) -> None:
        self.pack, self.out, self.work = pack, out, work
        self.lock = threading.Lock()  # of the state and the log: steps run side by side
        self.deadline = time.monotonic() + budget
        self.tree = work / "pack" / "llama.cpp"
        self.gpu = work / "pack" / "gpu"
        out.mkdir(parents=True, exist_ok=True)
        work.mkdir(parents=True, exist_ok=True)
        self.state_file = work / "state.json"
        self.state = json.loads(self.state_file.read_text()) if self.state_file.is_file() else {"steps": {}}

    @property
    def prebuilt(self) -> Path | None:
        """Programs that came in the pack, if it has any."""
        folder = self.work / "pack" / "bin"
        return folder if folder.is_dir() else None

    def left(self) -> float:
        """Seconds that this call may still take."""
        return self.deadline - time.monotonic()

    def save(self) -> None:
        """State for the next call, and the same as results."""
        text = json.dumps(self.state, indent=1)
        self.state_file.write_text(text)
        (self.out / "gpu-results.json").write_text(text)

    def keep(self, name: str, entry: dict) -> None:
        """Keep the outcome of a step."""
        with self.lock:
            self.state["steps"][name] = entry
            self.save()

    def log(self, text: str) -> None:
        """Everything that programs said."""
        with self.lock:
            with open(self.work / "gpu-log.txt", "a", errors="replace") as file:
                file.write(text if text.endswith("\n") else text + "\n")
            shutil.copyfile(self.work / "gpu-log.txt", self.out / "gpu-log.txt")

    def command(self, *words: str | Path, timeout: float = 600, env: dict[str, str] | None = None, check: bool = True) -> str:
        """Run a program; returns its output.

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
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env={**os.environ, **(env or {})},
            start_new_session=True,
        )  # fmt: skip
        try:
            said, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            said = stop(process)
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


def stop(process: subprocess.Popen) -> str:
    """End a program and everything that it started: cmake's compilers would otherwise go on and
    keep its output open. ninja is given a moment to delete half-written files."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        return process.communicate(timeout=5)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()[0]


# ---- what programs said --------------------------------------------------------------------------
#
# llama.cpp's own lines come only at verbosity 4, after a time stamp and a letter
# (tests/cuda/batched-bench.log).

_BUFFER = re.compile(r"(\S+)\s+(model|KV|compute|output) buffer size\s*=\s*([\d.]+) MiB")


def buffers(said: str) -> dict[str, float]:
    """MiB of memory by kind and place, as "model CUDA0". A place may be named several times."""
    found: dict[str, float] = {}
    for place, kind, mib in _BUFFER.findall(said):
        found[f"{kind} {place}"] = round(found.get(f"{kind} {place}", 0.0) + float(mib), 2)
    return found


def entropy_lines(said: str) -> list[str]:
    """What the loader did with entropy-coded tensors: decoded some, left some as they are."""
    return re.findall(r"llama_entropy: (.*\S)", said)


def wrong_mode(said: str, mode: str) -> list[str]:
    """Empty if the GPU has the weights as it should: it computes on them in mode fused, and has
    them decoded in mode load. Nothing may end on the CPU unnoticed."""
    lines = entropy_lines(said)
    sign = r"stay as they are; computed by .*CUDA" if mode == "fused" else r"^decoded "
    there = mode == "fused" or any(name.startswith("model CUDA") for name in buffers(said))
    return (
        [] if there and any(re.search(sign, line) for line in lines) else [f"not {mode} on the GPU: {lines or 'no line of llama_entropy'}"]
    )


def batches(said: str) -> dict[int, float]:
    """Tokens per second by batch size from the table of llama-batched-bench."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines() if line.count("|") >= 10]
    column = next((cells.index("S_TG t/s") for cells in lines if "S_TG t/s" in cells), None)
    return {int(cells[2]): float(cells[column]) for cells in lines if column is not None and cells[0].isdigit()}


def tests_passed(said: str) -> dict:
    """Counts of test-backend-ops."""
    match = re.search(r"(\d+)/(\d+) tests passed", said)
    if match is None:
        raise Failure((said.strip().splitlines() or ["no output"])[-1])
    passed, of = int(match[1]), int(match[2])
    failed = [line.strip() for line in said.splitlines() if "FAIL" in line][:20]
    wrong = [f"{passed} of {of} passed"] if passed < of or of == 0 else []
    return {"passed": passed, "of": of, "not_supported": said.count("not supported"), "wrong": wrong + failed}


def sanitized(said: str) -> dict:
    """Verdict of compute-sanitizer, and of the program under it."""
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*\S)", said)
    # racecheck warns where a warp orders its accesses by something else than a barrier: our rings,
    # whose copies are ordered by wait_group and the meeting of a warp
    clean = bool(summary) and all(re.match(r"0 (errors|hazards)\b|\d+ hazards displayed \(0 errors, ", line) for line in summary)
    return {"summary": summary, "wrong": ([] if clean else summary or ["no summary"]) + checked(said)["wrong"]}


def checked(said: str) -> dict:
    """Verdict of harness."""
    match = re.search(r"(\d+) checks, (\d+) wrong", said)
    if match is None:
        raise Failure((said.strip().splitlines() or ["no output"])[-1])
    n_checks, n_wrong = int(match[1]), int(match[2])
    lines = [line.strip() for line in said.splitlines() if "WRONG" in line][:20]
    return {"checks": n_checks, "wrong": [f"{n_wrong} of {n_checks} checks", *lines] if n_wrong or not n_checks else []}


# CUDA against the CPU: the same codes, another order of sums, and activations in int8 on both
# sides, in blocks that differ by some roundings (F16 for large batches). The CPU differs from
# itself (fused or load, batches of 512 or 4) by up to 0.08 % in perplexity and 0.0004 in KL
# divergence, the latter where a router is undecided between experts. Random models have much the
# same perplexity whatever they compute: EQ4-rows and EQ8-rows of one model differ by 0.6 % and
# agree on nothing. Their divergence is 0.14, so that is the sharper of the two.
MAX_PERPLEXITY = 0.005  # relative
MAX_DIVERGENCE = 0.002  # mean, nats


def compared(said: str, base: float) -> dict:
    """Perplexity and mean KL divergence from the CPU, from llama-perplexity --kl-divergence."""
    ppl = re.search(r"Mean PPL\(Q\)\s*:\s*(\S+)", said)
    kld = re.search(r"Mean\s+KLD:\s*(\S+)", said)
    if ppl is None or kld is None:
        return {"wrong": ["failed: " + (said.strip().splitlines() or ["no output"])[-1][:200]]}
    row = {"perplexity": float(ppl[1]), "divergence": float(kld[1])}
    # written in such a way that NaN counts as wrong, too
    if not abs(row["perplexity"] / base - 1) <= MAX_PERPLEXITY:
        row["wrong"] = [f"perplexity {row['perplexity']}, CPU {base}"]
    elif not row["divergence"] <= MAX_DIVERGENCE:
        row["wrong"] = [f"KL divergence {row['divergence']} from the CPU"]
    return row


def verdict(steps: dict[str, dict]) -> list[str]:
    """All that failed or is wrong, one line each."""
    lines = [f"{name}: failed: {entry['failed']}" for name, entry in steps.items() if "failed" in entry]
    return lines + [f"{name}: {reason}" for name, entry in steps.items() for reason in entry.get("result", {}).get("wrong", [])]


# ---- stage 1: the kernels by themselves ----------------------------------------------------------


def machine(run: Run) -> dict:
    """The machine that all figures belong to."""
    query = "name,driver_version,compute_cap,memory.total,clocks.max.sm,clocks.max.mem"
    gpu = run.command("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", timeout=60, check=False).strip()
    nvcc = run.command("nvcc", "--version", timeout=60).strip().splitlines() if shutil.which("nvcc") else ["", "none"]
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")  # noqa: UP017, Python there may be older
    return {"gpu": gpu, "nvcc": nvcc[-2:], "cpus": CPUS, "system": platform.platform(), "date": date}


def card(run: Run) -> str:
    """The GPU of this call: the next call may get another one, and times of two do not compare."""
    try:
        return run.command("nvidia-smi", "--query-gpu=name", "--format=csv,noheader", timeout=60).strip()
    except (OSError, Failure):
        return "unknown"


def base(run: Run) -> dict:
    """The codec, as ggml-base."""
    if run.prebuilt:
        return {"prebuilt": True}
    build = run.work / "build-base"
    run.command("cmake", "-S", run.tree, "-B", build, *generator(), *COMMON, "-DGGML_NATIVE=OFF", "-DGGML_CUDA=OFF", timeout=200)
    run.command("cmake", "--build", build, "-j", CPUS, "--target", "ggml-base", timeout=300)
    return {}


def harness(run: Run) -> dict:
    """nvcc on one file."""
    if run.prebuilt:
        return {"prebuilt": True}
    includes = [f"-I{run.tree / 'ggml' / part}" for part in ("include", "src", "src/ggml-cuda")]
    libraries = run.work / "build-base" / "bin"
    run.command(
        "nvcc", "-std=c++17", "-O3", "-use_fast_math", "-arch=native", "-lineinfo", *includes, f"-I{run.gpu}", run.gpu / "harness.cu",
        "-o", run.work / "harness", f"-L{libraries}", "-lggml-base", "-lpthread", "-Xlinker", f"-rpath={libraries}", timeout=300,
    )  # fmt: skip
    return {}


def check(run: Run) -> dict:
    """Bit-exact rows, products within the bound."""
    said = run.command(own_program(run, "harness"), "check", timeout=200, check=False)
    return checked(said)


def sanitizer(tool: str) -> Callable[[Run], dict]:
    """compute-sanitizer over the small cases."""

    def step(run: Run) -> dict:
        program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        if not Path(program).is_file():
            return {"skipped": "no compute-sanitizer on this machine"}
        said = run.command(program, "--tool", tool, own_program(run, "harness"), "small", timeout=240, check=False)
        return sanitized(said)

    return step


def table(run: Run) -> dict:
    """Kernel speeds."""
    path = run.work / "table.json"
    run.command(own_program(run, "harness"), "table", path, timeout=400)
    return json.loads(path.read_text())


# the sections of Nsight Compute's report that say where the time goes
_PROFILE = re.compile(
    r"^\s*(entropy_\w+|void entropy_\w+|Duration|SM Frequency|Registers Per Thread|Achieved Occupancy|Issue Slots Busy|Executed Ipc Active|"
    r"DRAM Throughput|L1/TEX Hit Rate|No Eligible|Eligible Warps Per Scheduler|Active Warps Per Scheduler|Warp Cycles Per Issued Instruction|.*\bstall\b.*)"
)


def profile(run: Run) -> dict:
    """Where the time of the mat-vec goes, by Nsight Compute; the whole of it is in the log."""
    if shutil.which("ncu") is None:
        return {"skipped": "no ncu on this machine"}
    said = run.command(
        "ncu", "--set", "full", "--kernel-name", "regex:entropy_mat_vec", own_program(run, "harness"), "profile", timeout=120
    )
    return {"lines": [" ".join(line.split())[:400] for line in said.splitlines() if _PROFILE.match(line)]}


# ---- stage 2: llama.cpp --------------------------------------------------------------------------

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
AVX512 = "avx512"  # folder beside the programs: ggml's CPU backend, built for AVX-512 with VNNI
PROGRAMS = ("llama-bench", "llama-batched-bench", "llama-perplexity", "test-backend-ops")


def generator() -> list[str]:
    """ninja if it is there."""
    return ["-G", "Ninja"] if shutil.which("ninja") else []


def build(run: Run) -> dict:
    """The patched tree for this GPU only. Takes minutes; a call that is cut off goes on with what
    is compiled."""
    if run.prebuilt:
        return {"prebuilt": True}
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
    """A program of llama.cpp's build."""
    return (run.prebuilt or run.work / "build" / "bin") / name


def own_program(run: Run, name: str) -> Path:
    """A program of this folder."""
    return (run.prebuilt or run.work) / name


def device_name(run: Run) -> str:
    """ggml's name of the GPU."""
    said = run.command(program(run, "llama-bench"), "--list-devices", timeout=60)
    match = re.search(r"^\s*(CUDA\d+):", said, re.MULTILINE)
    if match is None:
        raise Failure("llama-bench lists no CUDA device")
    return match[1]


def ours(run: Run) -> dict:
    """Our cases of test-backend-ops, GPU against CPU. The GPU has to support all of them: a case
    that it does not support is not counted, and would go to the CPU in a model."""
    result = backend_ops(run, "-p", "type_a=eq|type=eq")
    if result["not_supported"]:
        result["wrong"].append(f"{result['not_supported']} cases are not supported")
    return result


def upstream(op: str) -> Callable[[Run], dict]:
    """Upstream's cases of the ops that we touch."""
    return lambda run: backend_ops(run, "-o", op)


def backend_ops(run: Run, *arguments: str) -> dict:
    """Counts of test-backend-ops."""
    return tests_passed(run.command(program(run, "test-backend-ops"), "test", "-b", device_name(run), *arguments, timeout=400, check=False))


# Where the weights are and who decodes them: name, mode, arguments, environment. The tiny models
# have two layers and an output, so -ngl 2 is half of the layers.
_PLACES: tuple[tuple[str, str, tuple[str, ...], dict[str, str]], ...] = (
    ("fused", "fused", ("-ngl", "99", "-ub", "512"), {}),
    ("fused, batches of 4", "fused", ("-ngl", "99", "-ub", "4"), {}),
    ("fused, batches of 4, no pairs", "fused", ("-ngl", "99", "-ub", "4"), {"GGML_CUDA_DISABLE_FUSION": "1"}),
    ("fused, rows decoded to blocks", "fused", ("-ngl", "99", "-ub", "512"), {"GGML_ENTROPY_CUDA_ROWS": "blocks"}),
    ("fused, scratch of NaNs", "fused", ("-ngl", "99", "-ub", "512"), {"GGML_ENTROPY_CUDA_POISON": "1"}),
    (
        "fused, rows decoded to blocks, scratch of NaNs",
        "fused",
        ("-ngl", "99", "-ub", "512"),
        {"GGML_ENTROPY_CUDA_ROWS": "blocks", "GGML_ENTROPY_CUDA_POISON": "1"},
    ),
    ("load", "load", ("-ngl", "99", "-ub", "512"), {}),
    ("half of the layers", "fused", ("-ngl", "2", "-ub", "512"), {}),
    ("half of the layers, batches of 4", "fused", ("-ngl", "2", "-ub", "4"), {}),
)
# experts of a layer, or one of gate and up, on the CPU: batches of all sizes are computed there,
# the rest on the GPU
_EXPERTS = (
    ("--n-cpu-moe 1", "fused", ("-ngl", "99", "--n-cpu-moe", "1", "-ub", "512"), {}),
    ("--n-cpu-moe 1, batches of 4", "fused", ("-ngl", "99", "--n-cpu-moe", "1", "-ub", "4"), {}),
    ("-ot ffn_up_exps=CPU", "fused", ("-ngl", "99", "-ot", "ffn_up_exps=CPU", "-ub", "512"), {}),
    ("-ot ffn_up_exps=CPU, batches of 4", "fused", ("-ngl", "99", "-ot", "ffn_up_exps=CPU", "-ub", "4"), {}),
    ("-ot ffn_up_exps=CPU, load", "load", ("-ngl", "99", "-ot", "ffn_up_exps=CPU", "-ub", "512"), {}),
)


def equal(model: str) -> Callable[[Run], dict]:
    """CUDA = CPU on a tiny model: perplexity and divergence from the CPU in load mode, for every
    placement."""

    def step(run: Run) -> dict:
        logits = run.work / f"cpu-logits-{model}.bin"
        pack = run.work / "pack"
        command = [program(run, "llama-perplexity"), "-m", pack / "models" / f"{model}.gguf", "-f", pack / "text.txt"]
        command += ["-c", "128", "-b", "512", "--chunks", "4", "-lv", "4", "--kl-divergence-base", logits]
        cpu = ["--device", "none", "-ngl", "0"]
        said = run.command(*command, *cpu, timeout=120, env={"GGML_ENTROPY_MODE": "load"})
        base = re.search(r"Final estimate: PPL = ([\d.]+)", said)
        if base is None:
            raise Failure("no perplexity from the CPU")
        result: dict = {"cpu": float(base[1]), "wrong": []}
        places = (("cpu, fused", "fused", tuple(cpu), {}), *_PLACES, *(_EXPERTS if "moe" in model else ()))
        for name, mode, arguments, env in places:
            said = run.command(*command, "--kl-divergence", *arguments, timeout=120, env={"GGML_ENTROPY_MODE": mode, **env}, check=False)
            row = compared(said, result["cpu"])
            wrong = row.pop("wrong", []) or ([] if name.startswith("cpu") else wrong_mode(said, mode))
            result[name] = row
            result["wrong"] += [f"{name}: {reason}" for reason in wrong]
        logits.unlink()
        return result

    return step


def products(env: dict[str, str]) -> Callable[[Run], dict]:
    """kernel-table.cpp. Its graphs are products one after the other with the same columns, so ours
    go two by two unless fusion is off; stock types go singly."""

    def step(run: Run) -> dict:
        path = run.work / "products.json"
        run.command(own_program(run, "kernel-table"), path, device_name(run), timeout=400, env=env)
        return {"environment": env, **json.loads(path.read_text())}

    return step


def synthetic(run: Run, size: str, kind: str) -> Path:
    """A random model; a call that was cut off may have made it."""
    path = run.work / f"random-{size}-{kind}.gguf"
    if not path.is_file():
        part = path.with_suffix(".part")
        run.command(own_program(run, "synth-model"), part, size, kind, timeout=300)
        part.replace(path)
    return path


BATCHES = (1, 2, 4, 8)
# switches of ggml-cuda: kernels that begin before the one ahead has ended (on unless 0), and q, k
# and v at the same time (off unless 1)
SWITCHES = ({"GGML_CUDA_PDL": "0"}, {"GGML_CUDA_GRAPH_OPT": "1"})


def models(size: str, kind: str) -> Callable[[Run], dict]:
    """One random model: make it, tokens per second at batch 1 to 8 and for prompts of 512 and 2048,
    memory; delete it."""

    def step(run: Run) -> dict:
        path = synthetic(run, size, kind)
        result: dict = {"file_bytes": path.stat().st_size, "wrong": []}
        bench = [program(run, "llama-bench"), "-m", path, "-ngl", "99", "-r", "3", "-o", "json"]
        for arguments in (["-p", "512", "-n", "64", "-ub", "512"], ["-p", "2048", "-n", "0", "-b", "2048", "-ub", "2048"]):
            said = run.command(*bench, *arguments, timeout=200)
            for row in json.loads(said[said.index("[\n") : said.rindex("]") + 1]):
                what = f"generate {row['n_gen']}" if row["n_gen"] else f"prompt {row['n_prompt']}, ubatch {row['n_ubatch']}"
                result[what] = {"tokens_per_s": row["avg_ts"], "stddev": row["stddev_ts"]}
        for env in SWITCHES:
            said = run.command(*bench, "-p", "0", "-n", "64", timeout=200, env=env)
            (row,) = json.loads(said[said.index("[\n") : said.rindex("]") + 1])
            name = ", ".join(f"{key}={value}" for key, value in env.items())
            result[f"generate {row['n_gen']}, {name}"] = {"tokens_per_s": row["avg_ts"], "stddev": row["stddev_ts"]}
        batched = [program(run, "llama-batched-bench"), "-m", path, "-ngl", "99", "-c", "2048", "-npp", "64", "-ntg", "64", "-lv", "4"]
        said = run.command(*batched, "-npl", ",".join(map(str, BATCHES)), timeout=200, check=False)
        speeds = batches(said)
        result |= {f"batch of {n}": {"tokens_per_s": speed} for n, speed in speeds.items()}
        result["wrong"] += [f"no speed at batch {n}" for n in BATCHES if n not in speeds]
        result["buffers_mib"] = buffers(said)
        if not any(name.startswith("model CUDA") for name in result["buffers_mib"]):
            result["wrong"].append("no model buffer on the GPU")
        if kind.startswith("EQ"):
            result["mode"] = entropy_lines(said)
            result["wrong"] += wrong_mode(said, "fused")
        path.unlink()
        return result

    return step


def cold_start(run: Run) -> dict:
    """From the start of a program to its first token, 1B: the file in the page cache, and then on
    the disk."""
    result: dict = {"wrong": []}
    for kind, name, mode in (("EQ8", "load", "load"), ("EQ8", "fused", "fused"), ("Q8_0", "stock Q8_0", "load")):
        path = synthetic(run, "1B", kind)
        row: dict = {}
        for where in ("page cache", "disk"):
            with open(path, "rb") as file:
                if where == "disk":  # clean pages can be dropped on request
                    os.fsync(file.fileno())
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                else:
                    while file.read(1 << 24):
                        pass
            command = [program(run, "llama-batched-bench"), "-m", path, "-ngl", "99", "-lv", "4"]
            command += ["-c", "256", "-npp", "1", "-ntg", "1", "-npl", "1"]
            started = time.monotonic()
            said = run.command(*command, timeout=120, env={"GGML_ENTROPY_MODE": mode})
            row[f"seconds, {where}"] = round(time.monotonic() - started, 2)
            row[f"loader, {where}"] = entropy_lines(said)
        result[name] = row
        if kind.startswith("EQ"):
            result["wrong"] += [f"{name}: {reason}" for reason in wrong_mode(said, mode)]
    for kind in ("EQ8", "Q8_0"):
        synthetic(run, "1B", kind).unlink()
    return result


# ---- the processor that is there, too ------------------------------------------------------------


def cpu_levels() -> list[str]:
    """Kernel levels that can run here by what the processor says, best first."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    return [level for level, flag in (("avx512", "avx512bw"), ("avx2", "bmi2"), ("generic", "")) if flag in flags]


def cpu_backend(run: Run) -> dict[str, str]:
    """Environment in which stock types use what this processor offers, where the pack includes that
    build."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    if run.prebuilt is None or not {"avx512_vnni", "avx512vbmi"} <= set(flags.split()):
        return {}
    return {"LD_LIBRARY_PATH": os.pathsep.join([str(run.prebuilt / AVX512), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])])}


def cpu_ours(run: Run) -> dict:
    """Our cases of test-backend-ops on the CPU, every level against ref."""
    result: dict = {"levels": cpu_levels(), "wrong": []}
    for level in result["levels"]:
        said = run.command(
            program(run, "test-backend-ops"), "test", "-b", "CPU", "-p", "type_a=eq|type=eq", timeout=400, env={"GGML_ENTROPY_KERNEL": level}, check=False
        )  # fmt: skip
        row = tests_passed(said)
        if "no such kernel level" in said:
            row["wrong"].append("the level is not there")
        result["wrong"] += [f"{level}: {reason}" for reason in row["wrong"]]
        result[level] = row
    return result


def cpu_model(kind: str, levels: tuple[str, ...]) -> Callable[[Run], dict]:
    """llama-bench of a random 1B model on the CPU alone, fused, by threads and kernel level."""

    def step(run: Run) -> dict:
        path = synthetic(run, "1B", kind)
        cores = [n for n in (1, 2, 4, 16, 64) if n <= CPUS]
        model = next(
            (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), ""
        )
        result: dict = {"processor": model, "built_for": "AVX-512 with VNNI" if cpu_backend(run) else "AVX2"}
        command = [program(run, "llama-bench"), "-m", path, "-dev", "none", "-ngl", "0", "-r", "2", "-o", "json"]
        for level in [one for one in levels if not one or one in cpu_levels()]:
            env = {"GGML_ENTROPY_MODE": "fused", **cpu_backend(run), **({"GGML_ENTROPY_KERNEL": level} if level else {})}
            # a prompt on one core tells little and takes long
            for threads, arguments in ((cores, ("-p", "0", "-n", "16")), (cores[1:] or cores, ("-p", "128", "-n", "0"))):
                said = run.command(*command, "-t", ",".join(map(str, threads)), *arguments, timeout=300, env=env)
                for row in json.loads(said[said.index("[\n") : said.rindex("]") + 1]):
                    what = f"{level or 'stock'}, {row['n_threads']} threads, {'generate' if row['n_gen'] else 'prompt'}"
                    result[what] = {"tokens_per_s": row["avg_ts"], "best": max(row["samples_ts"])}
        path.unlink()
        return result

    return step


# ---- stage 3: peers ------------------------------------------------------------------------------


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


class Step(NamedTuple):
    """One thing to do."""

    stage: int
    name: str
    do: Callable[[Run], dict]
    timed: bool = True  # needs the machine for itself; steps that time nothing run side by side


def steps_of(run: Run) -> list[Step]:
    """The most telling steps come first: is it right, how fast are the kernels, how fast is a
    model. With programs in the pack, everything about correctness comes before everything about
    speed; otherwise the kernels' speed is measured before llama.cpp is built."""
    tiny = sorted(path.stem for path in (run.work / "pack" / "models").glob("*.gguf"))
    kernels = [
        Step(1, "check", check, timed=False),
        Step(1, "memcheck", sanitizer("memcheck"), timed=False),
    ]
    products_right = [
        Step(2, "our cases", ours, timed=False),
        Step(2, "our cases, CPU", cpu_ours, timed=False),
        *(Step(2, f"CUDA = CPU, {model}", equal(model), timed=False) for model in tiny),
    ]
    speeds = Step(1, "table", table)
    build_all = Step(2, "build", build)
    return [
        Step(1, "machine", machine),
        Step(1, "codec", base),
        Step(1, "harness", harness),
        *([build_all, *kernels, *products_right, speeds] if run.prebuilt else [*kernels, speeds, build_all, *products_right]),
        *(Step(2, f"1B {kind}", models("1B", kind)) for kind in TYPES),
        Step(2, "products, one by one", products({"GGML_CUDA_DISABLE_FUSION": "1"})),
        *(Step(2, f"8B {kind}", models("8B", kind)) for kind in TYPES),
        Step(2, "products, two by two", products({})),
        Step(1, "profile", profile),
        Step(2, "cold start", cold_start),
        Step(2, "CPU, 1B Q8_0", cpu_model("Q8_0", ("",))),
        Step(2, "CPU, 1B EQ8-4.5", cpu_model("EQ8-4.5", ("avx512", "avx2"))),
        Step(2, "CPU, 1B Q4_K_M", cpu_model("Q4_K_M", ("",))),
        Step(1, "racecheck", sanitizer("racecheck"), timed=False),
        *(Step(2, f"upstream {op}", upstream(op), timed=False) for op in ("GET_ROWS", "MUL_MAT_ID", "MUL_MAT")),
        Step(3, "peers", peers),
    ]


def batches_of(steps: list[Step]) -> list[list[Step]]:
    """Steps in order: each step that is timed is a batch by itself, and the steps between two of
    these are one batch."""
    return [
        list(group)
        for alone, part in itertools.groupby(steps, lambda one: one.timed)
        for group in ([[one] for one in part] if alone else [part])
    ]


def find_libraries() -> None:
    """Let programs that came in the pack find cublas and cudart, which may be a toolkit's or those
    of Python packages."""
    folders = [Path("/usr/local/cuda/lib64"), Path("/usr/local/cuda/targets/x86_64-linux/lib")]
    folders += [folder for place in sys.path for folder in sorted(Path(place or ".").glob("nvidia/*/lib"))]
    there = [str(folder) for folder in folders if any(folder.glob("libcu*.so*"))]
    os.environ["LD_LIBRARY_PATH"] = os.pathsep.join([*there, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])])


def unpack(run: Run) -> None:
    """Unpack the pack, once. Another pack replaces it; files that are the same keep their times, so
    that only what changed is built again."""
    stamp = hashlib.sha256(run.pack.read_bytes()).hexdigest()
    mark = run.work / "unpacked"
    if mark.is_file() and mark.read_text() == stamp:
        return
    mark.unlink(missing_ok=True)
    old, new = run.work / "pack", run.work / "pack.new"
    shutil.rmtree(new, ignore_errors=True)
    with tarfile.open(run.pack) as archive:
        archive.extractall(new, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    now = time.time_ns()
    for path in new.rglob("*"):
        if path.is_file():
            before = old / path.relative_to(new)
            same = before.is_file() and filecmp.cmp(before, path, shallow=False)
            os.utime(path, ns=(before.stat().st_mtime_ns if same else now,) * 2)
    shutil.rmtree(old, ignore_errors=True)
    new.replace(old)
    for path in run.work.glob("random-*"):  # made by another synth-model
        path.unlink()
    run.state = {"steps": {}, "pack": {**json.loads((old / "pack.json").read_text()), "sha256": stamp}}
    run.save()
    mark.write_text(stamp)


def perform(run: Run, one: Step, gpu: str) -> bool:
    """Do a step and keep its outcome. False: no time was left."""
    started = time.monotonic()
    try:
        entry: dict = {"result": one.do(run)}
    except OutOfTime:
        print(f"{one.name}: out of time; call again")
        return False
    except (Failure, OSError, ValueError, KeyError, IndexError) as error:
        entry = {"failed": f"{type(error).__name__}: {error}"}
    entry |= {"seconds": round(time.monotonic() - started, 1), "gpu": gpu}
    run.keep(one.name, entry)
    print(f"{one.name}: {entry.get('failed', 'done')} ({entry['seconds']} s)", flush=True)
    return True


def main() -> int:
    """Run what is left to do. 0: all is done and right; 1: something is wrong; 3: out of time, call
    again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder for results")
    parser.add_argument("--work", type=Path, default=Path("build/gpu/work"), help="folder that stays between calls (build/gpu/work)")
    parser.add_argument("--budget", type=float, default=570, help="seconds that this call may take")
    parser.add_argument("--stage", type=int, help="only this one")
    parser.add_argument("--only", nargs="*", metavar="STEP", help="these steps, in their usual order")
    parser.add_argument("--skip", nargs="*", default=[], metavar="STEP", help="steps to leave for another call")
    arguments = parser.parse_args()
    run = Run(arguments.pack.resolve(), arguments.out.resolve(), arguments.work.resolve(), arguments.budget)
    unpack(run)
    if run.prebuilt:
        find_libraries()
    else:
        for tool in ("nvcc", "cmake", "g++"):
            if shutil.which(tool) is None:
                print(f"{tool} is missing; put it on PATH", file=sys.stderr)
                return 1
    run.state["command"] = " ".join(sys.argv)
    steps = steps_of(run)
    gpu = card(run)
    left = [
        one
        for one in steps
        if arguments.stage in (None, one.stage)
        and (arguments.only is None or one.name in arguments.only)
        and one.name not in arguments.skip
        and "result" not in run.state["steps"].get(one.name, {})
    ]
    with ThreadPoolExecutor(max(1, CPUS // 2)) as pool:
        for group in batches_of(left):
            if run.left() < 5 or not all(list(pool.map(lambda one: perform(run, one, gpu), group))):
                break
    run.state["wrong"] = verdict(run.state["steps"])
    run.save()
    done = run.state["steps"]
    waiting = [one.name for one in steps if one.name not in done]
    for line in run.state["wrong"]:
        print(f"WRONG: {line}")
    print(f"{len(done)} steps done, {len(waiting)} to do; wrong: {len(run.state['wrong']) or 'none'}")
    return 3 if waiting else 1 if run.state["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
