# SPDX-License-Identifier: MIT
"""Running a GGUF inside the test process, for its logits; kernel levels."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import multiprocessing
import os
import shlex
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from entrollm_gguf import runtime

TOKENS = (1, 17, 99, 256, 31, 300, 42, 8, 411, 77, 123, 5)


def ops_program() -> list[str]:
    """The command that runs test-entropy-ops; ENTROLLM_OPS_COMMAND names another build of it
    (tests/neon/run.py)."""
    given = os.environ.get("ENTROLLM_OPS_COMMAND")
    return shlex.split(given) if given else [str(runtime.tool("test-entropy-ops"))]


@functools.cache
def levels() -> list[str]:
    """Kernel levels of fused mode that can run here, best first."""
    return subprocess.run([*ops_program(), "--levels"], capture_output=True, text=True, check=True).stdout.split()


def refusal_of_level(name: str) -> str:
    """The line that refuses a level of that name."""
    *others, last = levels()
    return f"unknown value '{name}' of GGML_ENTROPY_KERNEL: use {', '.join(others)} or {last}"


def logits(path: Path, tokens: tuple[int, ...] = TOKENS, **arguments) -> np.ndarray:
    """Logits of every position, f32 (n_tokens, n_vocab): the first tokens as one batch, the last
    four one by one."""
    from llama_cpp import Llama

    model = Llama(str(path), n_ctx=64, n_batch=64, n_threads=2, n_threads_batch=2, logits_all=True, verbose=False, **arguments)
    try:
        model.eval(list(tokens[:-4]))
        for token in tokens[-4:]:
            model.eval([token])
        return np.array(model.scores[: len(tokens)], copy=True)
    finally:
        model.close()


@contextlib.contextmanager
def log_lines():
    """What llama.cpp logs meanwhile, line by line."""
    import llama_cpp
    from llama_cpp._logger import llama_log_callback as default

    lines: list[str] = []

    @llama_cpp.llama_log_callback
    def collect(level, text, _):
        lines.append(text.decode(errors="replace").rstrip("\n"))

    llama_cpp.llama_log_set(collect, ctypes.c_void_p(0))
    try:
        yield lines
    finally:
        llama_cpp.llama_log_set(default, ctypes.c_void_p(0))


@dataclass(frozen=True)
class Outcome:
    """Of loading a model and running it."""

    refusal: str | None  # the loader's reason
    logits: np.ndarray | None  # of every position, f32 (n, n_vocab)


@dataclass(frozen=True)
class Trial:
    """A model file, and how it is loaded and run."""

    path: Path
    mode: str = ""  # what GGML_ENTROPY_MODE says
    embeddings: bool = False  # given vectors in place of tokens, as for images


def outcomes(trials: Sequence[Trial]) -> list[Outcome]:
    """Load and run models that have no tokenizer, in a process of their own.

    Raises:
        AssertionError: the process crashed or hung; names the trial.
    """
    return in_a_process(_outcome, [(trial,) for trial in trials])


def in_a_process(function: Callable, calls: Sequence[tuple]) -> list:
    """Call a function of a module several times in one new process, which may crash or hang;
    returns what it returned.

    Raises:
        AssertionError: it did; tells in which call.
    """
    spawn, done = multiprocessing.get_context("spawn"), []
    here, there = spawn.Pipe()
    process = spawn.Process(target=_answer, args=(there, function, calls), daemon=True)
    process.start()
    there.close()
    try:
        for call in calls:
            assert here.poll(60), f"{function.__name__}{call}: hangs"
            try:
                result = here.recv()
            except EOFError:
                process.join(10)
                raise AssertionError(f"{function.__name__}{call}: the process ended with {process.exitcode}") from None
            if isinstance(result, BaseException):
                raise AssertionError(f"{function.__name__}{call}: {result!r}") from result
            done.append(result)
    finally:
        process.kill()
        process.join()
    return done


def _answer(connection, function: Callable, calls: Sequence[tuple]) -> None:
    os.environ["GGML_NO_BACKTRACE"] = "1"  # which takes a debugger and seconds
    for call in calls:
        try:
            connection.send(function(*call))
        except Exception as error:
            connection.send(error)


def _outcome(trial: Trial) -> Outcome:
    import llama_cpp

    os.environ["GGML_ENTROPY_MODE"] = trial.mode
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    with log_lines() as lines:
        model = llama_cpp.llama_model_load_from_file(str(trial.path).encode(), params)
        if not model:
            return Outcome(next(line.partition("error loading model: ")[2] for line in lines if "error loading model: " in line), None)
        found = _run(model, trial.embeddings)
        llama_cpp.llama_model_free(model)
        return Outcome(None, found)


def _run(model, embeddings: bool) -> np.ndarray:
    import llama_cpp

    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = 32
    settings.n_threads = settings.n_threads_batch = 2
    context = llama_cpp.llama_init_from_model(model, settings)
    assert context
    n_vocab, width, n = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model)), llama_cpp.llama_model_n_embd(model), 6
    batch = llama_cpp.llama_batch_init(n, width if embeddings else 0, 1)
    batch.n_tokens = n
    for i in range(n):
        batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = i, 1, 0, 1
        if not embeddings:
            batch.token[i] = TOKENS[i] % n_vocab
    if embeddings:
        vectors = np.random.default_rng(3).standard_normal((n, width)).astype(np.float32)
        ctypes.memmove(batch.embd, vectors.ctypes.data, vectors.nbytes)
    assert llama_cpp.llama_decode(context, batch) == 0
    found = np.array(np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), shape=(n, n_vocab)), copy=True)
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    return found
