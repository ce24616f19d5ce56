# SPDX-License-Identifier: MIT
"""The way over a model: what becomes of each tensor, and the one pass over all of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

import numpy as np

from entrollm_gguf.convert.eligibility import reason_to_keep
from entrollm_gguf.convert.llama_cpp import evaluate
from entrollm_gguf.convert.source import Source
from entrollm_gguf.convert.window import window
from entrollm_gguf.gguf_io.patched import import_gguf

Result = TypeVar("Result")


class Fate(Enum):
    """What becomes of a tensor."""

    CODED = "entropy-coded, if its weights allow it"
    KEPT = "would be quantized by llama.cpp, and goes to a stock type"
    AS_IS = "in its final type already"
    IN_CHUNKS = "larger than memory, and written piece by piece in the type upstream chose"


@dataclass(frozen=True)
class Decision:
    """What becomes of a tensor, by its name, shape and type."""

    fate: Fate
    reason: str = ""  # for KEPT


@dataclass(frozen=True)
class Task:
    """A tensor that a pass has come to."""

    name: str
    data: Any  # its weights, or bytes of its final type; gguf.LazyChunkedTensor for Fate.IN_CHUNKS
    raw_dtype: int | None  # as the source tells it
    decision: Decision
    threads: int  # that work on it may use


def decide(name: str, data: Any, raw_dtype: int | None) -> Decision:
    """Decide what becomes of a tensor by its name, shape and type. What its values do not allow is
    found when they are read (`tensor.code_tensor`).

    Args:
        data, raw_dtype: as the source hands them over (`SourceModel.each_tensor`); no weights are
            read. The source decides which tensors llama.cpp would quantize: their type is BF16.
    """
    gguf = import_gguf()
    if isinstance(data, gguf.LazyChunkedTensor):
        return Decision(Fate.IN_CHUNKS)
    if raw_dtype != gguf.GGMLQuantizationType.BF16 or data.dtype == np.uint8:
        return Decision(Fate.AS_IS)
    reason = reason_to_keep(name, tuple(data.shape))
    return Decision(Fate.CODED) if reason is None else Decision(Fate.KEPT, reason)


def walk(
    source: Source,
    threads: int | None,
    work: Callable[[Task], Result],
    done: Callable[[Result], None],
    workspace: Callable[[str], int] = lambda name: 0,
) -> None:
    """Take all tensors of a model through `work`, several at a time as memory allows, and hand the
    results to `done` on this thread, in the source's order.

    Args:
        threads: None for all cores.
        work: called on other threads; on this one, alone, for a tensor that is larger than memory.
        workspace: memory that coding the tensor of that name takes beside its weights, in f32
            numbers.
    Raises:
        KeyboardInterrupt, and others: whatever the source, `work` and `done` raise passes through.
    """
    with window(threads) as jobs:

        def handle(name: str, data: Any, raw_dtype: int | None) -> None:
            decision = decide(name, data, raw_dtype)
            if decision.fate is Fate.IN_CHUNKS:
                jobs.drain()
                done(work(Task(name, data, raw_dtype, decision, jobs.n_threads)))
                return
            room = math.prod(data.shape) + (workspace(name) if decision.fate is Fate.CODED else 0)
            task = Task(name, evaluate(data), raw_dtype, decision, jobs.threads_for(room))
            jobs.put(room, functools.partial(work, task), done)

        source.each_tensor(handle)
