# SPDX-License-Identifier: MIT
"""`make demo`: a real model as stock types and as ours, measured side by side, then asked a
question."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from entrollm_gguf import runtime
from entrollm_gguf.convert.basis import Calibration
from entrollm_gguf.convert.pipeline import convert_model
from entrollm_gguf.convert.recipes import DEFAULT_RECIPE
from entrollm_gguf.errors import ToolError
from entrollm_gguf.eval.chat import Chat
from entrollm_gguf.eval.compare import Row, compare, environment
from entrollm_gguf.eval.demo_model import build_hf_folder, english_text, fetch_gguf
from entrollm_gguf.eval.report import write_report
from entrollm_gguf.eval.tools import run_tool
from entrollm_gguf.inspect.report import inspect_file
from entrollm_gguf.progress import Say

# The unquantized model is sure of every token of its answer: 0.78 is the smallest probability. With
# a less certain answer, a rounding error would decide.
QUESTION = "What is the capital city of Japan?"
CALIBRATED = ("EQ8-4.5",)
STOCK_TYPES = ("Q8_0", "Q4_K_M")
ASKED = ("Q8_0", DEFAULT_RECIPE)
CONTEXT = 512

NOTES = (
    "Q4_K_M: rows of 576 are no multiple of 256, so llama-quantize falls back to Q5_0, Q8_0 and the like for them. The model came as Q4_1: "
    "its weights lie near a 4-bit block grid by birth.",
)


@dataclass(frozen=True)
class Extent:
    """How much is made and measured."""

    recipes: tuple[str, ...]
    chunks: int  # of CONTEXT tokens that are scored
    sequences: int  # that a calibration reads
    speed_rounds: int


# The recipes that users choose between, and the paper's.
SHORT = Extent(("EQ8", "EQ8-4.5", "EQ8-paper", "EQ4-paper"), chunks=4, sequences=6, speed_rounds=1)
# The paper's, the same grids with a scale for each row, and steps by rate.
FULL = Extent(
    ("EQ8-paper", "EQ8-mixed", "EQ8-rows", "EQ4-paper", "EQ4-mixed", "EQ4-rows", "EQ8", "EQ8-4.5"),
    chunks=16, sequences=40, speed_rounds=2,
)  # fmt: skip


@dataclass(frozen=True)
class DemoResult:
    """Everything that `results.json` holds."""

    rows: tuple[Row, ...]
    question: str
    answers: dict[str, str]  # by the row's name
    environment: dict[str, str]
    text: str
    context: int
    chunks: int
    sequences: int


def run_demo(
    out: Path, *, full: bool = False, text: Path | None = None, chunks: int | None = None, threads: int | None = None, say: Say = print
) -> DemoResult:
    """Fetch, convert, measure, ask; leaves the model files, results.json and report.html in `out`.

    Args:
        out: folder, made if missing. A model folder that an earlier run left there is used again.
        full: eight recipes, a calibration as long as `entrollm convert` makes it, four times the
            text and two rounds of speed.
        text: text for perplexity; Python's language reference if None.
        chunks: chunks of 512 tokens that are scored; 4 if None, 16 of a full demo.
    Raises:
        EntroLLMError: see the steps.
    """
    extent = FULL if full else SHORT
    if chunks is not None:
        extent = dataclasses.replace(extent, chunks=chunks)
    out.mkdir(parents=True, exist_ok=True)
    if text is None:
        text = out / "text.txt"
        text.write_text(english_text(), encoding="utf-8")
    hf = _model_folder(out, say)
    files, seconds = _make_files(hf, out, extent, threads, say)
    reports = {name: inspect_file(path, threads=threads) for name, path in files.items()}
    rows = compare(
        reports,
        reference="F16",
        text=text,
        context=CONTEXT,
        chunks=extent.chunks,
        speed_rounds=extent.speed_rounds,
        threads=threads,
        say=say,
    )
    rows = tuple(dataclasses.replace(row, seconds=seconds.get(row.name)) for row in rows)

    say(f"asking {' and '.join(ASKED)}")
    answers = {name: _ask(files[name], threads) for name in ASKED}
    demo = DemoResult(rows, QUESTION, answers, environment(), text.name, CONTEXT, extent.chunks, extent.sequences)
    (out / "results.json").write_text(json.dumps(dataclasses.asdict(demo), indent=2) + "\n")
    write_report(
        out / "report.html", rows, reports, title=demo_title(demo), notes=demo_notes(demo), environment=demo.environment, force=True
    )
    return demo


def demo_title(demo: DemoResult) -> str:
    """What was measured, on what."""
    return f"SmolLM2-135M-Instruct, {demo.chunks} x {demo.context} tokens of {demo.text}"


def demo_notes(demo: DemoResult) -> tuple[str, ...]:
    """What a reader of the figures has to know."""
    return (*NOTES, f"{', '.join(CALIBRATED)}: calibrated on {demo.sequences} x 512 tokens; `entrollm convert` takes 40 x 512 by default.")


def _make_files(hf: Path, out: Path, extent: Extent, threads: int | None, say: Say) -> tuple[dict[str, Path], dict[str, float]]:
    """Files by their names in the table, and the seconds that our conversions took."""
    files: dict[str, Path] = {"F16": _stock_f16(hf, out, say)}
    for stock in STOCK_TYPES:
        files[stock] = out / f"{stock}.gguf"
        say(f"quantizing {stock} with llama-quantize")
        run_tool("llama-quantize", [files["F16"], files[stock], stock], model=files["F16"])
    seconds: dict[str, float] = {}
    learnt_from = out / "calibration.txt"
    whole = english_text()
    learnt_from.write_text(whole[len(whole) // 2 :], encoding="utf-8")  # what is scored by default lies in the first half
    for recipe in extent.recipes:
        calibration = Calibration(text=learnt_from, n_sequences=extent.sequences) if recipe in CALIBRATED else None
        name = f"{recipe}, calibrated" if calibration else recipe
        say(f"converting {name}" + (", which takes longest" if calibration else ""))
        files[name] = out / f"{name.replace(', ', '-')}.gguf"
        seconds[name] = convert_model(hf, files[name], recipe=recipe, calibration=calibration, threads=threads, force=True).seconds
    return files, seconds


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


def _ask(path: Path, threads: int | None) -> str:
    chat = Chat(path, threads=threads, temperature=0.0)
    try:
        return "".join(chat.ask(QUESTION, max_tokens=64)).strip()
    finally:
        chat.close()
