"""Processes of a benchmark: one object each, whose methods the benchmark calls one at a time.

Calls go over a pipe and are no part of what is timed: a method measures itself, on the clock that all
processes of a machine share. Knows nothing of what is measured.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from baton.closing import Closing
from baton.handle import tail
from services.ops import lifecycle
from services.ops.config import as_arguments

START_S_MAX, CALL_S_MAX, STOP_S_MAX = 60.0, 120.0, 10.0
_SPAWN = multiprocessing.get_context("spawn")


class ActorFailed(Exception):
    """An actor's method raised, or its process is gone; the text says which."""


def cpu_seconds(pids: Iterable[int]) -> float:
    """User and system time of these processes so far, all threads, to the nanosecond.

    Source: clock_getcpuclockid(3) for the shape of a process's clock id in Linux.
    """
    return sum(time.clock_gettime(~pid << 3 | 2) for pid in pids)


class Actor(Closing):
    """`Actor(Class, ...)` makes a `Class(...)` in a process of its own; use as a context manager."""

    def __init__(self, make: Callable[..., object], *args: object) -> None:
        self._pipe, theirs = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=_serve, args=(theirs, make, args), daemon=True)
        self._process.start()
        theirs.close()
        self._name = getattr(make, "__name__", "actor")
        try:
            self.answer(START_S_MAX)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def start(self, method: str, *args: object) -> None:
        """Begins a call; `answer` follows."""
        self._pipe.send((method, args))

    def answer(self, deadline_s: float = CALL_S_MAX) -> Any:
        """What the call gave. Raises ActorFailed."""
        if not self._pipe.poll(deadline_s):
            raise ActorFailed(f"{self._name}: no answer after {deadline_s:g} s")
        try:
            good, value = self._pipe.recv()
        except EOFError:
            raise ActorFailed(f"{self._name}: its process is gone") from None
        if not good:
            raise ActorFailed(f"{self._name}: {value}")
        return value

    def call(self, method: str, *args: object) -> Any:
        self.start(method, *args)
        return self.answer()

    def close(self) -> None:
        self._pipe.close()  # the actor reads the end of its pipe
        self._process.join(STOP_S_MAX)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _serve(pipe: Connection, make: Callable[..., object], args: tuple[object, ...]) -> None:
    """The actor's process: makes the object, then answers calls until the pipe ends."""
    lifecycle.die_with_parent()
    actor = _attempt(pipe, lambda: make(*args), quiet=True)
    if actor is None:
        return
    while True:
        try:
            method, arguments = pipe.recv()
        except EOFError:
            break
        _attempt(pipe, lambda m=method, a=arguments: getattr(actor, m)(*a))  # type: ignore[misc]
    close = getattr(actor, "close", None)
    if close is not None:
        close()


def _attempt(pipe: Connection, work: Callable[[], Any], quiet: bool = False) -> Any:
    """Does it and sends the outcome; this is the process's outermost loop."""
    try:
        value = work()
    except Exception as error:  # noqa: BLE001  reported to whoever called
        pipe.send((False, f"{type(error).__name__}: {error}"))
        return None
    pipe.send((True, None if quiet else value))
    return value


_EXEC = """
import os, sys
from services.ops import lifecycle
lifecycle.die_with_parent()
os.execv(sys.argv[1], sys.argv[1:])
"""


def child(argv: Sequence[str], stdout: Any, stderr: Any) -> subprocess.Popen[bytes]:
    """Starts a program that ends with this process, however that dies. What is to be done in the child
    is done by a program of its own: a fork without exec would run gRPC's threads into the ground."""
    return subprocess.Popen([sys.executable, "-c", _EXEC, *argv], stdout=stdout, stderr=stderr)


class ServiceProcess(Closing):
    """One of Baton's own processes, from its config, ready to be asked."""

    def __init__(self, module: str, config: Any, log: Path) -> None:
        with log.open("ab") as errors:
            argv = [sys.executable, "-m", module, *as_arguments(config)]
            self.process = child(argv, subprocess.PIPE, errors)
        self.facts = self._await_ready(log)

    @property
    def pid(self) -> int:
        return self.process.pid

    def _await_ready(self, log: Path) -> dict[str, Any]:
        assert self.process.stdout is not None
        end, text = time.monotonic() + START_S_MAX, b""
        while b"\n" not in text:
            left = max(0.0, end - time.monotonic())
            readable, _, _ = select.select([self.process.stdout], [], [], left)
            chunk = os.read(self.process.stdout.fileno(), 65536) if readable else b""
            if not chunk:
                self.close()
                raise ActorFailed(f"{log.stem}: not ready:\n{tail(log, 16)}")
            text += chunk
        facts: dict[str, Any] = json.loads(text.partition(b"READY ")[2])
        return facts

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(STOP_S_MAX)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
