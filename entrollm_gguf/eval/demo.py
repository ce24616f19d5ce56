# SPDX-License-Identifier: MIT
"""`make demo`: a real model through all recipes, measured beside stock types, then asked a question."""

from __future__ import annotations

import dataclasses
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from entrollm_gguf import __version__, runtime
from entrollm_gguf.convert.pipeline import ConversionReport, convert_model
from entrollm_gguf.convert.rate import Calibration
from entrollm_gguf.convert.recipes import DEFAULT_RECIPE
from entrollm_gguf.errors import ToolError
from entrollm_gguf.eval.bench import Speed, measure_speed
from entrollm_gguf.eval.chat import Chat
from entrollm_gguf.eval.demo_model import build_hf_folder, english_text, fetch_gguf
from entrollm_gguf.eval.perplexity import PerplexityResult, ReferenceLogits
from entrollm_gguf.eval.tools import run_tool
from entrollm_gguf.gguf_io.reader import open_model
from entrollm_gguf.inspect.verify import verify_file

QUESTION = "What is the capital of France?"
# EntroLLM's own, the same grids with a scale for each row, and steps by rate; the last with calibration on the text's second half
RECIPES = ("EQ8-paper", "EQ8-mixed", "EQ8-rows", "EQ4-paper", "EQ4-mixed", "EQ4-rows", "EQ8", "EQ8-4.5")
CALIBRATED = ("EQ8-4.5",)
CHAT_RECIPE = DEFAULT_RECIPE
STOCK_TYPES = ("Q8_0", "Q4_K_M")
SPEED_ROUNDS = 2

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    file: str
    file_bytes: int
    bits_per_weight: float  # whole file
    coded_bits_per_weight: float | None  # coded matrices, container included
    entropy: float | None  # of their codes
    perplexity: PerplexityResult
    speed: Speed  # entropy-coded files: load mode
    fused_speed: Speed | None  # entropy-coded files
    seconds: float | None  # conversion, for ours


@dataclasses.dataclass(frozen=True)
class DemoResult:
    """Everything that `results.json` holds."""

    rows: tuple[Row, ...]
    question: str
    answer: str
    environment: dict[str, str]
    text: str
    context: int
    chunks: int


def run_demo(
    out: Path, *, text: Path | None = None, chunks: int = 16, context: int = 512, threads: int | None = None, say: Say = print
) -> DemoResult:
    """Fetch, convert, measure, ask; leaves the model files and results.json in `out`.

    Args:
        out: folder, made if missing. A model folder that an earlier run left there is used again.
        text: text for perplexity; Python's language reference if None.
        chunks: chunks of `context` tokens that are scored.
    Raises:
        EntroLLMError: see the steps.
    """
    out.mkdir(parents=True, exist_ok=True)
    if text is None:
        text = out / "text.txt"
        text.write_text(english_text(), encoding="utf-8")
    hf = _model_folder(out, say)

    files: dict[str, Path] = {"F16": _stock_f16(hf, out, say)}
    for stock in STOCK_TYPES:
        files[stock] = out / f"{stock}.gguf"
        say(f"quantizing {stock} with llama-quantize")
        run_tool("llama-quantize", [files["F16"], files[stock], stock], model=files["F16"])
    reports: dict[str, ConversionReport] = {}
    learnt_from = out / "calibration.txt"
    whole = english_text()
    learnt_from.write_text(whole[len(whole) // 2 :], encoding="utf-8")  # what is scored by default lies in the first half
    for recipe in RECIPES:
        calibration = Calibration(text=learnt_from) if recipe in CALIBRATED else None
        name = f"{recipe}, calibrated" if calibration else recipe
        say(f"converting {name}")
        files[name] = out / f"{name.replace(', ', '-')}.gguf"
        reports[name] = convert_model(hf, files[name], recipe=recipe, calibration=calibration, threads=threads, force=True)
        problems = verify_file(files[name]).problems
        if problems:
            raise ToolError(f"{files[name]}: {problems[0]}")

    results: dict[str, PerplexityResult] = {}
    say(f"measuring perplexity and KL divergence on {chunks} x {context} tokens of {text.name}")
    with ReferenceLogits(files["F16"], text, context=context, chunks=chunks, threads=threads) as reference:
        for name, path in files.items():
            result = reference.result if name == "F16" else reference.compare(path)
            assert result is not None
            results[name] = result
            say(f"  {name}: perplexity {result.ppl:.4g}")
    say(f"measuring speed, best of {SPEED_ROUNDS} rounds")
    speeds = _speeds(files, threads)
    fused = _speeds({name: files[name] for name in reports}, threads, mode="fused")
    rows = [_row(name, path, results[name], speeds[name], fused.get(name), reports.get(name)) for name, path in files.items()]

    chat = Chat(files[CHAT_RECIPE], threads=threads, temperature=0.0)
    answer = "".join(chat.ask(QUESTION, max_tokens=64)).strip()
    chat.close()
    demo = DemoResult(tuple(rows), QUESTION, answer, environment(), text.name, context, chunks)
    (out / "results.json").write_text(json.dumps(dataclasses.asdict(demo), indent=2) + "\n")
    return demo


def _speeds(files: dict[str, Path], threads: int | None, mode: str = "load") -> dict[str, Speed]:
    """Files take turns, so that a noisy minute of a shared machine does not hit one of them alone."""
    best: dict[str, Speed] = {}
    for _ in range(SPEED_ROUNDS):
        for name, path in files.items():
            speed = measure_speed(path, prompt_tokens=128, generated_tokens=16, repetitions=2, threads=threads, mode=mode)
            best[name] = speed.best(best.get(name, speed))
    return best


def _model_folder(out: Path, say: Say) -> Path:
    hf = out / "SmolLM2-135M-Instruct"
    marker = hf / "tokenizer.json"  # written last
    if not marker.is_file():
        say("fetching SmolLM2-135M-Instruct and rebuilding its Hugging Face folder")
        build_hf_folder(fetch_gguf(runtime.cache_folder() / "models"), hf)
    return hf


def _stock_f16(hf: Path, out: Path, say: Say) -> Path:
    """The unquantized model by llama.cpp's own script: the reference of the comparison."""
    path = out / "F16.gguf"
    say("converting F16 with llama.cpp's converter")
    script = runtime.conversion_path() / "convert_hf_to_gguf.py"
    command = [sys.executable, str(script), str(hf), "--outfile", str(path), "--outtype", "f16"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise ToolError(f"{hf}: convert_hf_to_gguf.py failed: {(result.stderr.strip().splitlines() or ['no output'])[-1]}")
    return path


def _row(name: str, path: Path, result: PerplexityResult, speed: Speed, fused_speed: Speed | None, report: ConversionReport | None) -> Row:
    model = open_model(path)
    n_weights = sum(t.n_elements for t in model.tensors())
    coded = report.coded() if report else []
    n_coded = sum(t.n_elements for t in coded)
    return Row(
        name=name,
        file=path.name,
        file_bytes=model.n_bytes,
        bits_per_weight=model.n_bytes * 8 / n_weights,
        coded_bits_per_weight=sum(t.n_bytes for t in coded) * 8 / n_coded if n_coded else None,
        entropy=sum(t.entropy_bits or 0 for t in coded) / n_coded if n_coded else None,
        perplexity=result,
        speed=speed,
        fused_speed=fused_speed,
        seconds=report.seconds if report else None,
    )


def environment() -> dict[str, str]:
    """What a figure depends on: processor, system, versions, the runtime's hash, the time."""
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    import os

    return {
        "cpu": cpu,
        "cores": str(os.cpu_count()),
        "system": platform.platform(),
        "python": platform.python_version(),
        "entrollm": __version__,
        "runtime": runtime.info().hash,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
