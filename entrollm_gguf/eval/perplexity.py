# SPDX-License-Identifier: MIT
"""Perplexity and KL divergence of a GGUF on a text, by llama-perplexity."""

from __future__ import annotations

import math
import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from entrollm_gguf.errors import ToolError
from entrollm_gguf.eval.generation import has_vocabulary, predicts_next_token
from entrollm_gguf.eval.tools import run_tool
from entrollm_gguf.gguf_io.reader import open_model
from entrollm_gguf.texts import read_text

DEFAULT_CONTEXT = 512

_NUMBER = r"\s*(-?(?:[\d.]+(?:e[+-]?\d+)?|nan|inf))"
_FINAL = re.compile(rf"Final estimate: PPL ={_NUMBER} \+/-{_NUMBER}")
_STATISTICS = {
    "ppl": re.compile(rf"Mean PPL\(Q\)\s*:{_NUMBER} ±{_NUMBER}"),
    "kld": re.compile(rf"Mean    KLD:{_NUMBER} ±{_NUMBER}"),
    "top": re.compile(rf"Same top p:{_NUMBER} ±{_NUMBER}"),
}
_MEDIAN = re.compile(rf"Median  KLD:{_NUMBER}")
_TABLE = "KL Divergence"  # heads the table with a line for each chunk, which is there for any text
_NAN_SO_FAR = re.compile(r"\[\d+\]-?nan")  # the running perplexity
_P99 = re.compile(rf"99\.0%   KLD:{_NUMBER}")


@dataclass(frozen=True)
class PerplexityResult:
    """Means with standard errors. The KLD fields (nats per token) and agreement (%) are None
    without a reference."""

    file: str
    ppl: float
    ppl_error: float
    kld_mean: float | None = None
    kld_error: float | None = None
    kld_median: float | None = None
    kld_99: float | None = None
    same_top_percent: float | None = None
    same_top_error: float | None = None
    seconds: float = 0.0


class ReferenceLogits:
    """Log-probabilities of a reference model on a text, kept in a temporary file; use as a context
    manager.

    They are computed once and serve any number of comparisons. The file takes about vocabulary x 2
    bytes per scored token (half of them are scored): 400 MB for 16 chunks of 512 tokens at a
    vocabulary of 49152.

    Args:
        model: the reference GGUF, as a rule the unquantized model.
        text: a text file, UTF-8.
        context: tokens per chunk.
        chunks: number of chunks; None for the whole text.

    >>> plain, text = Path("plain.gguf"), Path("text.txt")
    >>> with ReferenceLogits(plain, text, context=64, chunks=8) as reference:
    ...     result = reference.compare(Path("model.gguf"))
    >>> result.kld_mean < 0.01
    True
    """

    def __init__(
        self, model: Path, text: Path, *, context: int = DEFAULT_CONTEXT, chunks: int | None = None, threads: int | None = None
    ) -> None:
        self.model = model
        self._arguments = _arguments(model, context, chunks, threads)
        self._text = text
        self._context = context
        self._threads = threads
        self._folder: tempfile.TemporaryDirectory | None = None
        self.result: PerplexityResult | None = None

    def __enter__(self) -> ReferenceLogits:
        read_text(self._text)
        _check_model(self.model)
        self._folder = tempfile.TemporaryDirectory(prefix="entrollm-logits-")
        try:
            started = time.monotonic()
            arguments = [*self._arguments, "-f", self._text, "--kl-divergence-base", self.path]
            output = run_tool("llama-perplexity", arguments, model=self.model)
            ppl, error = _final(self.model, output.stdout + output.stderr)
            self.result = PerplexityResult(str(self.model), ppl, error, seconds=time.monotonic() - started)
        except BaseException:
            self._folder.cleanup()
            raise
        return self

    def __exit__(self, *_) -> None:
        if self._folder:
            self._folder.cleanup()

    @property
    def path(self) -> Path:
        """The file of log-probabilities."""
        assert self._folder is not None, "use ReferenceLogits as a context manager"
        return Path(self._folder.name) / "logits.dat"

    def compare(self, model: Path) -> PerplexityResult:
        """Perplexity of another model on the same tokens, and its divergence from the reference.

        Raises:
            ToolError: the tool failed, the vocabularies differ, or the model does not predict the
                next token.
        """
        _check_model(model)
        started = time.monotonic()
        arguments = _arguments(model, self._context, None, self._threads)
        output = run_tool("llama-perplexity", [*arguments, "--kl-divergence", "--kl-divergence-base", self.path], model=model)
        text = output.stdout + output.stderr
        found = {key: pattern.search(text) for key, pattern in _STATISTICS.items()}
        median, p99 = _MEDIAN.search(text), _P99.search(text)
        if not (all(found.values()) and median and p99):
            if _TABLE in text and "inconsistent vocabulary" not in text:
                raise ToolError(
                    f"{model}: fewer than 100 tokens were scored, too few for statistics; take a longer text, more chunks or a larger context"
                )
            raise ToolError(f"{model}: llama-perplexity printed no statistics; has it the same vocabulary as {self.model}?")
        values = {key: (float(match[1]), float(match[2])) for key, match in found.items() if match}
        if math.isnan(values["ppl"][0]):
            raise _not_finite(model)
        return PerplexityResult(
            str(model), *values["ppl"], *values["kld"], float(median[1]), float(p99[1]), *values["top"],
            seconds=time.monotonic() - started,
        )  # fmt: skip


def measure_perplexity(
    model: str | Path,
    text: str | Path,
    *,
    reference: str | Path | None = None,
    context: int = DEFAULT_CONTEXT,
    chunks: int | None = None,
    threads: int | None = None,
) -> PerplexityResult:
    """Perplexity of a model on a text; with a reference also KL divergence and top-token agreement.

    Args:
        model: GGUF file.
        text: UTF-8 text file of at least two contexts.
        reference: GGUF of the unquantized model.
        context: tokens per chunk; the second half of each chunk is scored.
        chunks: number of chunks; None for the whole text.
    Raises:
        FormatError: a model file is missing or damaged.
        TextError: the file is no text in UTF-8.
        ToolError: llama-perplexity failed, or a model does not predict the next token.
        RuntimeMissingError: the runtime is not installed.

    >>> from entrollm_gguf import measure_perplexity
    >>> result = measure_perplexity("model.gguf", "text.txt", context=64, chunks=2)
    >>> 1 < result.ppl, result.kld_mean
    (True, None)
    """
    model, text = Path(model), Path(text)
    read_text(text)
    _check_model(model)
    if reference is not None:
        with ReferenceLogits(Path(reference), text, context=context, chunks=chunks, threads=threads) as logits:
            return logits.compare(model)
    started = time.monotonic()
    output = run_tool("llama-perplexity", [*_arguments(model, context, chunks, threads), "-f", text], model=model)
    ppl, error = _final(model, output.stdout + output.stderr)
    return PerplexityResult(str(model), ppl, error, seconds=time.monotonic() - started)


def _arguments(model: Path, context: int, chunks: int | None, threads: int | None) -> list[str | Path]:
    arguments: list[str | Path] = ["-m", model, "-c", str(context), "-b", str(max(context, 512))]
    if chunks:
        arguments += ["--chunks", str(chunks)]
    if threads:
        arguments += ["-t", str(threads)]
    return arguments


def _check_model(path: Path) -> None:
    """llama-perplexity computes a number for every architecture, but it means something only for
    those that predict the next token."""
    model = open_model(path)
    architecture = model.text("general.architecture") or ""
    if not predicts_next_token(architecture, causal=model.field(f"{architecture}.attention.causal") is not False):
        raise ToolError(f"{path}: {architecture} models do not predict the next token: perplexity means nothing for them")
    if not has_vocabulary(model.text("tokenizer.ggml.model") or ""):
        raise ToolError(f"{path}: has no vocabulary, so that it takes no text; convert the model together with its tokenizer")


def _final(model: Path, output: str) -> tuple[float, float]:
    match = _FINAL.search(output)
    if not match:
        if _NAN_SO_FAR.search(output):
            raise _not_finite(model)
        raise ToolError(f"{model}: llama-perplexity printed no result; the text may be shorter than two contexts")
    return float(match[1]), float(match[2])


def _not_finite(model: Path) -> ToolError:
    return ToolError(f"{model}: has no perplexity: its logits are no finite numbers; convert the model again, or download it again")
