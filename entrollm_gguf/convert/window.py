# SPDX-License-Identifier: MIT
"""A pool of threads through which tensors pass in order, with a bound on the weights that are in
memory at a time."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

# Weights in flight: 4 bytes each as floats, and about as much again in temporaries. Larger tensors
# are worked on alone, by all threads.
MAX_WEIGHTS_IN_FLIGHT = 32_000_000

Result = TypeVar("Result")


@dataclass(frozen=True)
class _Job:
    future: Future
    room: int
    done: Callable[[Any], None]


class Window:
    """Made by `window`."""

    def __init__(self, pool: ThreadPoolExecutor, n_threads: int, stop: threading.Event) -> None:
        self.n_threads = n_threads
        self._pool = pool
        self._stop = stop  # set by an interrupt or an error: what is still queued then does nothing
        self._jobs: deque[_Job] = deque()
        self._in_flight = 0

    def put(self, room: int, work: Callable[[], Result], done: Callable[[Result], None]) -> None:
        """Let a thread do the work once there is room; `done` is called with the result, on this
        thread and in the order of the calls.

        Args:
            room: weights, and memory beside them in f32 numbers.
        Raises:
            KeyboardInterrupt: an interrupt has come; whatever work and `done` of earlier calls
                raise passes through.
        """
        if self._stop.is_set():
            raise KeyboardInterrupt
        while self._jobs and (self._in_flight + room > MAX_WEIGHTS_IN_FLIGHT or len(self._jobs) >= 2 * self.n_threads):
            self._finish_one()
        self._jobs.append(_Job(self._pool.submit(functools.partial(self._unless_stopped, work)), room, done))
        self._in_flight += room

    def drain(self) -> None:
        """Wait for everything that was put.

        Raises:
            KeyboardInterrupt, and others: as `put`.
        """
        while self._jobs:
            self._finish_one()
        if self._stop.is_set():
            raise KeyboardInterrupt

    def threads_for(self, room: int) -> int:
        """A tensor that is alone gets all threads, one of many gets one."""
        return self.n_threads if room > MAX_WEIGHTS_IN_FLIGHT else 1

    def _unless_stopped(self, work: Callable[[], Result]) -> Result:
        if self._stop.is_set():
            raise InterruptedError
        return work()

    def _finish_one(self) -> None:
        job = self._jobs.popleft()
        try:
            result = job.future.result()
        except InterruptedError as error:
            raise KeyboardInterrupt from error
        self._in_flight -= job.room
        job.done(result)


@contextlib.contextmanager
def window(threads: int | None) -> Iterator[Window]:
    """A pool of so many threads, of all cores for None. At the end everything that was put is
    done."""
    n_threads, stop = threads or os.cpu_count() or 1, threading.Event()
    with _interrupts(stop), ThreadPoolExecutor(n_threads) as pool:
        jobs = Window(pool, n_threads, stop)
        try:
            yield jobs
            jobs.drain()
        except BaseException:
            stop.set()
            raise


@contextlib.contextmanager
def _interrupts(stop: threading.Event) -> Iterator[None]:
    """Remember signals that raise KeyboardInterrupt in `stop` as well: Python drops one that
    arrives inside a destructor or a callback."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    found = (
        (name, signal.getsignal(signal.Signals[name])) for name in ("SIGINT", "SIGTERM", "SIGHUP") if name in signal.Signals.__members__
    )
    previous = {signal.Signals[name]: handler for name, handler in found if callable(handler)}

    def remember(number: int, frame: Any) -> None:
        stop.set()
        previous[signal.Signals(number)](number, frame)

    for number in previous:
        signal.signal(number, remember)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
