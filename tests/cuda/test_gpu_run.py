# SPDX-License-Identifier: MIT
"""What runs on a machine with a GPU, as far as it can be checked without one: the programs compile,
the harness passes on the CPU, the pack has what run.py needs, and run.py sees what is wrong in what
programs say."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench" / "gpu"))
sys.path.insert(0, str(Path(__file__).parent))

import pack
import run as gpu_run
from host import codec_library, patched_tree

ROOT = Path(__file__).resolve().parents[2]
LOG = (
    Path(__file__).parent / "batched-bench.log"
).read_text()  # llama-batched-bench -lv 4 on a tiny EQ8 model, CPU, GGML_ENTROPY_MODE=fused


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    return patched_tree(tmp_path_factory.mktemp("gpu-programs"))


@pytest.mark.parametrize("name", ["kernel-table.cpp", "synth-model.cpp"])
def test_programs_compile(tree, name):
    includes = [f"-I{tree / 'ggml' / part}" for part in ("include", "src")]
    subprocess.run(
        ["g++", "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", *includes, ROOT / "bench" / "gpu" / name], check=True
    )


def test_harness_on_the_cpu(tree, tmp_path):
    """The checks that a GPU has to pass themselves pass where the kernels are right."""
    base = codec_library()
    includes = [Path(__file__).parent, *(tree / "ggml" / part for part in ("include", "src", "src/ggml-cuda"))]
    command = ["g++", "-x", "c++", "-std=c++17", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-unused-function", "-Werror"]
    command += [*(f"-I{path}" for path in includes), str(ROOT / "bench" / "gpu" / "harness.cu"), "-o", str(tmp_path / "harness")]
    subprocess.run([*command, "-x", "none", str(base), f"-Wl,-rpath,{base.parent}", "-lpthread"], check=True)
    said = subprocess.run([tmp_path / "harness", "small"], capture_output=True, text=True).stdout
    result = gpu_run.checked(said)
    assert result["wrong"] == [] and result["checks"] > 300


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> gpu_run.Run:
    """A pack, made and unpacked as it would be there; without xz and most of the models, which take
    a minute."""
    folder = tmp_path_factory.mktemp("gpu-pack")
    pack.build(folder / "pack.tar", pack.MODELS[:1] + pack.MODELS[-1:])
    run = gpu_run.Run(folder / "pack.tar", folder / "out", folder / "work", 600)
    gpu_run.unpack(run)
    return run


def test_pack_has_what_run_needs(unpacked):
    there = unpacked.work / "pack"
    assert (there / "run.py").read_bytes() == (ROOT / "bench" / "gpu" / "run.py").read_bytes()
    for name in ("harness.cu", "payload.h", "kernel-table.cpp", "synth-model.cpp", "peers.py"):
        assert (unpacked.gpu / name).is_file()
    assert (there / "text.txt").stat().st_size > 10_000
    # on the bare machine: this Python alone, no packages
    help_text = subprocess.run([sys.executable, "-I", "-S", there / "run.py", "--help"], capture_output=True, text=True, check=True).stdout
    assert "build/gpu/work" in help_text  # what git ignores stays on the machine

    steps = gpu_run.steps_of(unpacked)
    names = [one.name for one in steps]
    assert len(set(names)) == len(names) and all(callable(one.do) for one in steps)
    tiny = {path.stem for path in (there / "models").glob("*.gguf")}
    assert {name.removeprefix("CUDA = CPU, ") for name in names if name.startswith("CUDA = CPU")} == tiny
    assert {name.split("-")[0] for name in tiny} == {"llama", "qwen2_moe"}
    # right, then fast, then whole models
    order = ["check", "memcheck", "table", "build", "our cases", "1B EQ8", "8B EQ4"]
    assert sorted(order, key=names.index) == order
    assert {one.stage for one in steps} == {1, 2, 3}
    groups = gpu_run.batches_of(steps)
    assert [one for group in groups for one in group] == steps
    assert all(len(group) == 1 or not any(one.timed for one in group) for group in groups)
    assert ["check", "memcheck"] in [[one.name for one in group] for group in groups]
    # programs in the pack: nothing is built, and all that is to be right comes first
    (there / "bin").mkdir()
    ready = [one.name for one in gpu_run.steps_of(unpacked)]
    assert sorted(ready) == sorted(names) and ready.index("our cases") < ready.index("table")
    assert gpu_run.build(unpacked) == gpu_run.harness(unpacked) == gpu_run.base(unpacked) == {"prebuilt": True}
    assert gpu_run.program(unpacked, "llama-bench") == there / "bin" / "llama-bench"
    (there / "bin").rmdir()


def test_pack_configures(unpacked):
    """Nothing that was left out of the tree is missed: cmake knows every program that run.py
    builds."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    build = unpacked.work / "build"
    command = ["cmake", "-S", unpacked.tree, "-B", build, "-G", "Ninja", *gpu_run.COMMON, "-DGGML_CUDA=OFF", "-DGGML_NATIVE=OFF"]
    subprocess.run(command, check=True, capture_output=True, env=environment)
    targets = subprocess.run(["ninja", "-C", build, "-t", "targets", "all"], check=True, capture_output=True, text=True, env=environment)
    known = {line.split(":")[0] for line in targets.stdout.splitlines()}
    assert known >= {*gpu_run.PROGRAMS, "ggml-base"}


def test_another_pack(unpacked):
    """The same pack is not unpacked again, whatever its time. From another pack, files that are the
    same keep their times."""
    harness, text = unpacked.gpu / "harness.cu", unpacked.work / "pack" / "text.txt"
    unpacked.state["steps"]["machine"] = {"result": {}}
    os.utime(unpacked.pack, (1, 1))
    before = harness.stat().st_mtime_ns
    gpu_run.unpack(unpacked)
    assert "machine" in unpacked.state["steps"]

    text.write_text("changed, as if this were the older pack")
    time.sleep(0.01)
    with open(unpacked.pack, "ab") as file:
        file.write(b"\0" * 10240)  # another file with the same members
    gpu_run.unpack(unpacked)
    assert unpacked.state["steps"] == {} and harness.stat().st_mtime_ns == before
    assert text.stat().st_size > 10_000 and text.stat().st_mtime_ns > before


def test_a_call_ends_in_time(tmp_path):
    """The programs that it started end as well: cmake's children would keep the pipe open."""
    run = gpu_run.Run(tmp_path / "pack", tmp_path / "out", tmp_path / "work", 3)
    started = time.monotonic()
    with pytest.raises(gpu_run.OutOfTime):
        run.command("sh", "-c", "sleep 30 & sleep 30; echo never")
    assert time.monotonic() - started < 10
    assert "stopped after" in (tmp_path / "out" / "gpu-log.txt").read_text()


# ---- what is wrong, from what programs say -------------------------------------------------------


def test_memory_and_speed_from_a_log():
    assert gpu_run.buffers(LOG) == {"model CPU_Mapped": 4.7, "output CPU": 0.0, "KV CPU": 0.75, "compute CPU": 8.89}
    assert gpu_run.batches(LOG) == {1: 3.63, 2: 6.72}
    line = "0.00.1 I load_tensors:        CUDA0 model buffer size =   100.25 MiB\n"
    assert gpu_run.buffers(line + line) == {"model CUDA0": 200.5}
    assert gpu_run.buffers("") == {} and gpu_run.batches("") == {}


def test_the_mode_of_a_model():
    (line,) = gpu_run.entropy_lines(LOG)
    assert line.startswith("16 entropy-coded tensors, 4.69 MiB, stay as they are")
    assert gpu_run.wrong_mode(LOG, "fused")  # by the CPU
    assert not gpu_run.wrong_mode(LOG.replace("computed by CPU", "computed by CPU, CPU kernel avx2 and CUDA0"), "fused")
    decoded = "0.0 I llama_entropy: decoded 16 entropy-coded tensors, 1.00 MiB -> 2.00 MiB, in 0.13 s with 2 threads (mode load: GGML_ENTROPY_MODE)\n"
    assert gpu_run.wrong_mode(decoded, "load") and gpu_run.wrong_mode("", "load")
    assert not gpu_run.wrong_mode(decoded + "0.0 I load_tensors:        CUDA0 model buffer size =   100.25 MiB\n", "load")


@pytest.mark.parametrize(
    ("ppl", "kld", "wrong"),
    [("100.3", "0.0003", False), ("100.6", "0.0003", True), ("100.0", "0.01", True), ("nan", "0.0", True), ("100.0", "-nan", True)],
)
def test_cuda_against_the_cpu(ppl, kld, wrong):
    said = f"Mean PPL(Q)                   : {ppl} +/-  20.73\nMean PPL(base)                : 1.0 +/- 1\nMean    KLD:   {kld} +/-   0.000000\n"
    assert bool(gpu_run.compared(said, 100.0).get("wrong")) == wrong


def test_a_run_that_failed():
    assert gpu_run.compared("CUDA error: out of memory\n", 100.0)["wrong"] == ["failed: CUDA error: out of memory"]


def test_sanitizers():
    passed = "312 checks, 0 wrong\n"
    assert not gpu_run.sanitized(passed + "========= ERROR SUMMARY: 0 errors\n")["wrong"]
    assert not gpu_run.sanitized(passed + "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n")["wrong"]
    assert not gpu_run.sanitized(passed + "========= RACECHECK SUMMARY: 100 hazards displayed (0 errors, 139 warnings)\n")["wrong"]
    assert gpu_run.sanitized(passed + "========= RACECHECK SUMMARY: 100 hazards displayed (1 error, 139 warnings)\n")["wrong"]
    assert gpu_run.sanitized(passed + "========= ERROR SUMMARY: 10 errors\n")["wrong"] == ["10 errors"]
    assert gpu_run.sanitized(passed)["wrong"] == ["no summary"]
    assert gpu_run.sanitized("WRONG: products\n312 checks, 1 wrong\n========= ERROR SUMMARY: 0 errors\n")["wrong"]


def test_backend_ops():
    assert gpu_run.tests_passed("  452/452 tests passed\n")["wrong"] == []
    assert gpu_run.tests_passed("  MUL_MAT(): FAIL\n  451/452 tests passed\n")["wrong"] == ["451 of 452 passed", "MUL_MAT(): FAIL"]
    assert gpu_run.tests_passed("  0/0 tests passed\n")["wrong"]
    with pytest.raises(gpu_run.Failure, match="Segmentation"):
        gpu_run.tests_passed("Segmentation fault\n")


def test_verdict():
    steps = {
        "a": {"result": {"wrong": []}},
        "b": {"result": {"wrong": ["x", "y"]}},
        "c": {"failed": "Failure: z"},
        "d": {"result": {"skipped": "no peers"}},
    }
    assert gpu_run.verdict(steps) == ["c: failed: Failure: z", "b: x", "b: y"]


def fake_machine(folder: Path) -> dict[str, str]:
    for name in ("nvcc", "cmake", "g++", "nvidia-smi"):
        (folder / name).write_text("#!/bin/sh\necho 'Fake GPU'\n")
        (folder / name).chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:/usr/bin:/bin"}


@pytest.mark.skipif(shutil.which("sh") is None, reason="no sh")
def test_a_whole_call_that_fails(unpacked, tmp_path):
    """With compilers that make nothing, every step is tried, fails and is reported, and the exit
    code is not 0."""
    command = [
        sys.executable,
        "-I",
        "-S",
        unpacked.work / "pack" / "run.py",
        unpacked.pack,
        "--out",
        tmp_path / "out",
        "--work",
        tmp_path / "work",
    ]
    result = subprocess.run(command, env=fake_machine(tmp_path), capture_output=True, text=True)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "0 to do; wrong:" in result.stdout and "WRONG: check: failed" in result.stdout
    assert (tmp_path / "out" / "gpu-results.json").is_file()
