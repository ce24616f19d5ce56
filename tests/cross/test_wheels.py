# SPDX-License-Identifier: MIT
"""The portable wheels on a machine as others have it: an environment of its own, no compiler,
nothing but the index (`make test-wheels`).

ENTROLLM_WHEELS names the index folder that `entrollm runtime wheel` wrote. Without it, all but one
of these tests are skipped: wheels take half an hour to build. What comes out is compared with the
runtime of this environment, which was compiled for this processor alone.

ENTROLLM_CUDA_WHEELS names an index folder of wheels with CUDA, whose tests need no GPU."""

from __future__ import annotations

import functools
import http.server
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from running import TOKENS, logits
from serving import free_port

from entrollm_gguf import runtime
from entrollm_gguf.runtime.wheels import LINKED_TO_CPU, TOOLS

INDEX = Path(os.environ["ENTROLLM_WHEELS"]).resolve() if os.environ.get("ENTROLLM_WHEELS") else None
needs_wheels = pytest.mark.skipif(INDEX is None, reason="no wheels; make test-wheels builds them")
CUDA_INDEX = Path(os.environ["ENTROLLM_CUDA_WHEELS"]).resolve() if os.environ.get("ENTROLLM_CUDA_WHEELS") else None
needs_cuda_wheels = pytest.mark.skipif(CUDA_INDEX is None, reason="no wheels with CUDA; docs/wheels.md says how to build them")

# Upstream's variants from the weakest to the strongest, with what the processor must have, as Linux
# names it (ggml/src/CMakeLists.txt and
# cpu-feats.cpp in ggml-cpu/arch/x86, where a variant that needs more scores higher)
_AVX512 = "avx512f avx512cd avx512vl avx512dq avx512bw"
_AVX2 = "sse4_2 avx f16c fma avx2 bmi2"
VARIANTS = {
    "x64": "",
    "sse42": "sse4_2",
    "sandybridge": "sse4_2 avx",
    "ivybridge": "sse4_2 avx f16c",
    "piledriver": "sse4_2 avx f16c fma",
    "haswell": _AVX2,
    "alderlake": f"{_AVX2} avx_vnni",
    "skylakex": f"{_AVX2} {_AVX512}",
    "cannonlake": f"{_AVX2} {_AVX512} avx512vbmi",
    "cascadelake": f"{_AVX2} {_AVX512} avx512_vnni",
    "icelake": f"{_AVX2} {_AVX512} avx512vbmi avx512_vnni",
    "cooperlake": f"{_AVX2} {_AVX512} avx512_vnni avx512_bf16",
    "zen4": f"{_AVX2} {_AVX512} avx512vbmi avx512_vnni avx512_bf16",
    "sapphirerapids": f"{_AVX2} {_AVX512} avx512vbmi avx512_vnni avx512_bf16 amx_int8",
}


def runnable() -> list[str]:
    """Variants for this processor, the best last."""
    flags = set(re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1].split())
    return [name for name, needed in VARIANTS.items() if flags.issuperset(needed.split())]


# what our three projects require of others
_REQUIREMENTS = """
from importlib.metadata import requires
for name in ("llama-cpp-python", "gguf", "entrollm-gguf"):
    print(*(line for line in requires(name) or () if "extra ==" not in line), sep="\\n")
"""


@dataclass(frozen=True)
class Bare:
    """An environment without compiler, and with nothing on PATH but its own programs."""

    folder: Path

    def run(self, *command: str | Path, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        """A program of it; what is in this process's environment does not reach it."""
        words = [str(self.folder / "bin" / command[0]), *map(str, command[1:])]
        env = {"PATH": str(self.folder / "bin"), "HOME": str(self.folder / "home"), "LANG": "C.UTF-8", "CC": "false", "CXX": "false"}
        result = subprocess.run(
            words, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL, env={**env, **environment}
        )
        assert not check or result.returncode == 0, f"{words}: {result.stdout[-2000:]}{result.stderr[-4000:]}"
        return result

    @functools.cached_property
    def package(self) -> Path:
        """The installed llama_cpp."""
        return next(self.folder.glob("lib/python*/site-packages/llama_cpp"))


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Iterator[Bare]:
    """All three wheels, installed from the index through a web server. What they need of others
    comes first, from where pip always has it."""
    here = Bare(tmp_path_factory.mktemp("bare") / "venv")
    subprocess.run([sys.executable, "-m", "venv", here.folder], check=True)
    (here.folder / "home").mkdir()
    assert shutil.which("cc", path=str(here.folder / "bin")) is None and shutil.which("c++", path=str(here.folder / "bin")) is None
    with served(INDEX) as address:
        alone = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": f"{address}/", "PIP_NO_CACHE_DIR": "1"}
        pip = ("python", "-m", "pip", "install", "-q", "--disable-pip-version-check", "--only-binary", ":all:")
        here.run(*pip, "--no-deps", "-r", INDEX / "requirements.txt", **alone)
        others = here.folder / "others.txt"
        others.write_text(here.run("python", "-c", _REQUIREMENTS).stdout)
        usual = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "XDG_"))}
        here.run(*pip, "--cache-dir", Path.home() / ".cache" / "pip", "-r", others, **usual)
        # from our index alone: all that the three require is there, in versions that fit
        here.run(*pip, "-r", INDEX / "requirements.txt", **alone)
    yield here
    shutil.rmtree(here.folder)  # a gigabyte


class served:
    """A folder behind a web server on this machine; gives its address."""

    def __init__(self, folder: Path) -> None:
        class Quiet(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *arguments) -> None:
                pass

        handler = functools.partial(Quiet, directory=str(folder))
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)

    def __enter__(self) -> str:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self._server.server_port}"

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def model(converted) -> Path:
    """A small one, one kind of grid."""
    return converted("llama", "EQ8-rows")


# loads a model through the binding, saves its logits, and tells which variants of the CPU's code
# stay in the process
_SCRIPT = """
import sys
import numpy as np
from llama_cpp import Llama
path, out, mode, *tokens = sys.argv[1:]
tokens = [int(one) for one in tokens]
model = Llama(path, n_ctx=64, n_batch=64, n_threads=2, n_threads_batch=2, logits_all=True, verbose=False, kv_overrides={"entropy.mode": mode})
model.eval(tokens[:-4])
for token in tokens[-4:]:
    model.eval([token])
np.save(out, model.scores[: len(tokens)])
loaded = {line.split("/")[-1] for line in open("/proc/self/maps") if "libggml-cpu-" in line}
print(*sorted(loaded))
"""


def bare_logits(bare: Bare, model: Path, folder: Path, mode: str, **environment: str) -> tuple[str, np.ndarray]:
    """Variant that was chosen, logits."""
    out = folder / "logits.npy"
    loaded = bare.run("python", "-c", _SCRIPT, model, out, mode, *map(str, TOKENS), **environment).stdout.split()
    assert len(loaded) == 1, loaded
    return re.fullmatch(r"libggml-cpu-(\w+)\.so", loaded[0])[1], np.load(out)


def nmse(found: np.ndarray, expected: np.ndarray) -> float:
    return float(((found - expected) ** 2).sum() / (expected**2).sum())


# ---- installed -----------------------------------------------------------------------------------


@needs_wheels
def test_names_tell_where_they_run():
    """One runtime for all of x86-64 and all Pythons, whose system the tag names; the others for
    everywhere."""
    (coded,) = INDEX.glob("llama-cpp-python/*.whl")
    assert re.search(rf"\+entrollm\.[0-9a-f]{{12}}-py3-none-manylinux_2_\d+_{platform.machine()}\.whl$", coded.name)
    (gguf,) = INDEX.glob("gguf/*.whl")
    (own,) = INDEX.glob("entrollm-gguf/*.whl")
    assert gguf.name.endswith("-py3-none-any.whl") and own.name.endswith("-py3-none-any.whl")


@needs_wheels
def test_auditwheel_agrees():
    """The tag is the one that the symbols allow, and no library of others came along."""
    pytest.importorskip("auditwheel")
    (coded,) = INDEX.glob("llama-cpp-python/*.whl")
    said = subprocess.run([sys.executable, "-m", "auditwheel", "show", coded], capture_output=True, text=True, check=True).stdout
    tag = re.search(r"manylinux_2_\d+_\w+(?=\.whl)", coded.name)[0]
    said = " ".join(said.split())
    assert f'is consistent with the following platform tag: "{tag}"' in said, said
    assert "libgomp" not in said
    subprocess.run([sys.executable, "-m", "zipfile", "-t", coded], check=True, capture_output=True)


@needs_wheels
def test_installed_without_a_compiler(bare):
    info = json.loads(bare.run("entrollm", "runtime", "info", "--json").stdout)
    assert info["portable"] and info["matches_checkout"] is None
    assert f"any, {len(VARIANTS)} variants" in bare.run("entrollm", "runtime", "info").stdout
    assert {path.name for path in bare.package.glob("lib/libggml-cpu*")} == {f"libggml-cpu-{name}.so" for name in VARIANTS}
    assert not list(bare.package.parent.glob("llama_cpp_python.libs"))
    bare.run("python", "-m", "pip", "check")


@needs_wheels
@pytest.mark.parametrize("command", [name for name, program in TOOLS.items() if program not in LINKED_TO_CPU])
def test_every_tool_starts(bare, command):
    result = bare.run(command, "--help", check=False)
    assert "error while loading" not in result.stderr and "not found" not in result.stderr
    assert re.search(r"usage|version", result.stdout + result.stderr, re.IGNORECASE), result.stdout + result.stderr


@needs_wheels
def test_tools_that_need_one_cpu_library_are_no_commands(bare):
    for program in LINKED_TO_CPU:
        assert not (bare.folder / "bin" / program).exists() and not (bare.package / "bin" / program).exists()


# ---- a coded model -------------------------------------------------------------------------------


@needs_wheels
@pytest.mark.parametrize("mode", ["load", "fused"])
def test_logits_are_those_of_a_runtime_built_here(bare, model, tmp_path, mode):
    """The same algorithms, compiled otherwise: sums are rounded elsewhere, and an activation may go
    to the other side of a step."""
    chosen, found = bare_logits(bare, model, tmp_path, mode)
    assert chosen == runnable()[-1]
    expected = logits(model, kv_overrides={"entropy.mode": mode})
    assert nmse(found, expected) < 5e-4
    assert (found.argmax(1) == expected.argmax(1)).all()


@needs_wheels
@pytest.mark.parametrize("recipe", ["EQ8-paper", "EQ4-mixed"])
def test_other_grids(bare, converted, tmp_path, recipe):
    coded = converted("qwen2_moe", recipe)
    _, found = bare_logits(bare, coded, tmp_path, "fused")
    assert nmse(found, logits(coded, kv_overrides={"entropy.mode": "fused"})) < 5e-4


@needs_wheels
def test_weaker_variants(bare, model, tmp_path):
    """Each variant that runs here, where the better ones are taken away, gives the same model."""
    expected = logits(model, kv_overrides={"entropy.mode": "fused"})
    for name in runnable():
        folder = without(bare, name, tmp_path / name)
        chosen, found = bare_logits(bare, model, tmp_path, "fused", LLAMA_CPP_LIB_PATH=str(folder / "lib"))
        assert chosen == name
        assert nmse(found, expected) < 5e-4, name


def without(bare: Bare, best: str, folder: Path) -> Path:
    """The package's libraries and programs without the variants that are better than `best`."""
    better = list(VARIANTS)[list(VARIANTS).index(best) + 1 :]
    for kind in ("lib", "bin"):
        shutil.copytree(bare.package / kind, folder / kind, copy_function=os.link)
    for name in better:
        (folder / "lib" / f"libggml-cpu-{name}.so").unlink()
    return folder


@needs_wheels
@pytest.mark.parametrize("variant", VARIANTS)
def test_ops_of_every_variant(bare, tmp_path, variant):
    """MUL_MAT, MUL_MAT_ID and GET_ROWS on coded weights at every kernel level, against numpy, by
    the tests of the runtime built here."""
    if variant not in runnable():
        pytest.skip("not for this processor")
    program = without(bare, variant, tmp_path / variant) / "bin" / "test-entropy-ops"
    levels = subprocess.run([program, "--levels"], capture_output=True, text=True, check=True)
    assert f"libggml-cpu-{variant}.so" in levels.stderr
    here = subprocess.run([runtime.tool("test-entropy-ops"), "--levels"], capture_output=True, text=True, check=True)
    assert levels.stdout == here.stdout  # the decoders ask the processor themselves, whatever the variant is compiled for
    # without level ref: slow, and the same plain code in every variant
    chosen = ["-k", "every_level_against_numpy and not ref"]
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-pno:cacheprovider", *chosen, Path(__file__).with_name("test_fused_ops.py")]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "ENTROLLM_OPS_COMMAND": str(program)})
    assert result.returncode == 0, result.stdout[-4000:]


# qemu's model of a processor -> variant and kernel level for it; "max" has AVX2, but says that it
# is an AMD from before Zen 3, whose pdep is slow
PROCESSORS = {
    "qemu64": ("x64", "generic"),
    "Nehalem": ("sse42", "generic"),
    "SandyBridge": ("sandybridge", "generic"),
    "IvyBridge": ("ivybridge", "generic"),
    "Haswell": ("haswell", "avx2"),
    "max": ("haswell", "avx2-nopdep"),
}


@needs_wheels
@pytest.mark.parametrize("processor", PROCESSORS)
def test_other_processors(bare, model, processor):
    """The variant is chosen at run time, and nothing else in the programs needs more than the
    processor has."""
    emulator = shutil.which("qemu-x86_64")
    if emulator is None:
        pytest.skip("needs qemu-x86_64 (apt-get install qemu-user)")
    program = bare.package / "bin" / "llama-completion"
    command = [emulator, "-cpu", processor, program, "-m", model, *shlex.split("-p python -n 4 -t 2 -no-cnv --temp 0 -lv 4")]
    result = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL,
        env={"PATH": "", "GGML_ENTROPY_MODE": "fused"}, timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    variant, level = PROCESSORS[processor]
    assert f"libggml-cpu-{variant}.so" in result.stderr, result.stderr[:2000]
    assert f"computed by CPU, CPU kernel {level} (mode" in result.stderr


@needs_wheels
def test_convert_and_everything_else(bare, tiny_model, converted, text_file, tmp_path):
    """From a Hugging Face folder to numbers and text, by the commands of the README; the converted
    file is the one that is made here."""
    coded, plain = tmp_path / "model.gguf", tmp_path / "plain.gguf"
    bare.run("entrollm", "convert", tiny_model("llama").folder, coded, "--recipe", "EQ8-rows")
    assert "sound" in bare.run("entrollm", "verify", coded).stdout
    assert coded.read_bytes() == converted("llama", "EQ8-rows").read_bytes()
    bare.run("entrollm", "inspect", coded)
    bare.run("entrollm", "decode", coded, plain)
    said = bare.run("entrollm", "perplexity", coded, "--text", text_file, "--chunks", "2", "--ctx", "64").stdout
    assert re.search(r"\d+\.\d+", said)
    texts = {
        mode: bare.run(
            "llama-completion", "-m", coded, "-p", "The python", "-n", "12", "-t", "2", "-no-cnv", "--temp", "0", GGML_ENTROPY_MODE=mode
        ).stdout
        for mode in ("load", "fused")
    }
    assert "The python" in texts["load"] and "The python" in texts["fused"]
    speeds = [json.loads(line) for line in bare.run("llama-bench", "-m", coded, "-p", "16", "-n", "4", "-o", "jsonl").stdout.splitlines()]
    assert len(speeds) == 2 and all(one["avg_ts"] > 0 for one in speeds)


@needs_wheels
def test_a_real_model_answers(bare, smollm2_hf, tmp_path):
    """SmolLM2 through the server, which is what most people start."""
    from entrollm_gguf.convert.pipeline import convert_model

    coded = tmp_path / "smollm2.gguf"
    convert_model(smollm2_hf, coded, recipe="EQ8")
    port = free_port()
    command = [bare.folder / "bin" / "llama-server", "-m", coded, "--host", "127.0.0.1", "--port", port, "-t", "2", "-c", "512"]
    env = {"PATH": str(bare.folder / "bin"), "HOME": str(tmp_path), "GGML_ENTROPY_MODE": "fused"}
    with open(tmp_path / "log", "wb") as log, subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, env=env) as server:
        try:
            answer = ask(port)
        finally:
            server.terminate()
    assert "Paris" in answer, (tmp_path / "log").read_text(errors="replace")[-2000:]
    coded.unlink()


def ask(port: int) -> str:
    question = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0, "max_tokens": 12}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(question).encode(), {"Content-Type": "application/json"}
    )
    for _ in range(240):
        try:
            return json.load(urllib.request.urlopen(request, timeout=120))["choices"][0]["message"]["content"]
        except (urllib.error.URLError, ConnectionError):
            threading.Event().wait(0.5)
    return ""


# ---- what is loaded ------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["runtime", pytest.param("wheel", marks=needs_wheels)])
def test_a_library_in_the_current_folder_is_not_run(request, tmp_path, which):
    """A model's folder may hold anything, also what is called as a backend is."""
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs a compiler, and Linux")
    source, strange = tmp_path / "strange.c", tmp_path / "here"
    strange.mkdir()
    source.write_text('#include <stdio.h>\n__attribute__((constructor)) static void run(void) { fclose(fopen("ran", "w")); }\n')
    for name in ("libggml-cpu-strange.so", "libggml-cuda.so", "libggml-rpc-strange.so"):
        subprocess.run([compiler, "-shared", "-fPIC", source, "-o", strange / name], check=True)
    folder = request.getfixturevalue("bare").package / "bin" if which == "wheel" else runtime.tool("llama-bench").parent
    result = subprocess.run([folder / "llama-bench", "--list-devices"], cwd=strange, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert not (strange / "ran").exists()


# ---- with CUDA -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bare_cuda(tmp_path_factory) -> Iterator[Bare]:
    """The runtime's wheel with CUDA and what pip fetches for it; a gigabyte."""
    here = Bare(tmp_path_factory.mktemp("cuda") / "venv")
    subprocess.run([sys.executable, "-m", "venv", here.folder], check=True)
    (wheel,) = CUDA_INDEX.glob("llama-cpp-python/*.whl")
    usual = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "XDG_"))}
    pip = ("python", "-m", "pip", "install", "-q", "--disable-pip-version-check", "--only-binary", ":all:")
    here.run(*pip, "--cache-dir", Path.home() / ".cache" / "pip", wheel, **usual)
    yield here
    shutil.rmtree(here.folder)


def first_words(bare: Bare, coded: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ("llama-completion", "-m", coded, "-p", "The python", "-n", "8", "-t", "2", "-no-cnv", "--temp", "0", "-v")
    return bare.run(*command, **environment)


@needs_cuda_wheels
def test_without_a_driver_the_cpu_does_it(bare_cuda, model):
    """CUDA's libraries are those of NVIDIA's packages; none is in the wheel."""
    assert [path.name for path in bare_cuda.package.rglob("libcu*")] == []
    assert (bare_cuda.package / "lib" / "libggml-cuda.so").exists()
    result = first_words(bare_cuda, model)
    assert "The python" in result.stdout
    assert "loaded CPU backend" in result.stderr and "loaded CUDA backend" not in result.stderr


@needs_cuda_wheels
def test_all_that_it_needs_of_cuda_is_found(bare_cuda, model, tmp_path):
    """With a stand-in for the driver, which fails at whatever it is asked, the library is loaded,
    every symbol bound at once, and the CPU still does the work."""
    compiler, reader = shutil.which("cc"), shutil.which("nm")
    if compiler is None or reader is None:
        pytest.skip("needs a compiler, and nm")
    wanted = subprocess.run(
        [reader, "-D", "--undefined-only", bare_cuda.package / "lib" / "libggml-cuda.so"], capture_output=True, text=True, check=True
    ).stdout
    source = tmp_path / "driver.c"
    source.write_text("".join(f"int {name}(void) {{ return 999; }}\n" for name in re.findall(r"\bU (cu[A-Z]\w*)$", wanted, re.MULTILINE)))
    subprocess.run([compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", source, "-o", tmp_path / "libcuda.so.1"], check=True)
    result = first_words(bare_cuda, model, LD_LIBRARY_PATH=str(tmp_path), LD_BIND_NOW="1")
    assert "The python" in result.stdout
    assert "loaded CUDA backend" in result.stderr, result.stderr[-2000:]
