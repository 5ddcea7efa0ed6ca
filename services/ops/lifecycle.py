"""How a process starts, is pinned and stops: the same for all of them.

The first SIGTERM or SIGINT drains, the second exits at once. Readiness is told by a line on standard
output, `READY {json}`, for whoever started the process, and by gRPC health for everybody else.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import uvloop

from services.ops import log
from services.ops.errors import BatonError, ConfigError
from services.ops.private import UMASK

_logger = log.get("lifecycle")
_PR_SET_PDEATHSIG = 1
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h
_KEEP = {_M_TRIM_THRESHOLD: 512 << 20, _M_MMAP_THRESHOLD: 32 << 20, _M_ARENA_MAX: 1}


def pin(cores: tuple[int, ...]) -> None:
    """Restricts this process and its later threads to `cores`; () leaves it as it is.

    Raises ConfigError when the kernel does not grant exactly these cores.
    """
    if not cores:
        return
    try:
        os.sched_setaffinity(0, cores)
    except OSError as error:
        raise ConfigError(f"cores: cannot run on {list(cores)}: {error.strerror}") from error
    granted = os.sched_getaffinity(0)
    if granted != set(cores):
        raise ConfigError(f"cores: asked for {sorted(cores)}, granted {sorted(granted)}")


def require_core(core: int, name: str) -> None:
    """Raises ConfigError when threads cannot be put on `core`; a negative one is no wish. `name`: the
    option. Ask before `pin`: a process may keep some of its threads off its own cores."""
    if core < 0:
        return
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {core})
    except OSError as error:
        raise ConfigError(f"{name}: cannot run on {core}: {error.strerror}") from error
    finally:
        os.sched_setaffinity(0, allowed)


def die_with_parent() -> None:
    """Asks the kernel to end this process when the supervisor that started it dies."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def keep_freed_memory() -> None:
    """Tells glibc's allocator to keep what is freed for the next one, and one heap for all threads.

    For a process that receives pages: each message is a new buffer of about 1 MiB, and with the
    allocator's own limits up to one in five of its pages was unmapped, mapped and zeroed again, which
    cost as much as receiving it. What is kept is bounded by what may be on its way at once. Call it
    before there are threads. With another C library it does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in _KEEP.items():
            mallopt(parameter, value)


def engine_thread(target: Callable[[], None], name: str) -> threading.Thread:
    """A thread without which its process is of no use: when it fails, the process ends at once,
    so that whoever waits for it is told by the kernel instead of by silence."""

    def run_or_die() -> None:
        try:
            target()
        except BaseException:
            _logger.exception("engine failed", thread=name)
            os._exit(70)

    return threading.Thread(target=run_or_die, name=name, daemon=True)


def announce_ready(**facts: Any) -> None:
    """Tells whoever started this process. What the start has made stays, so the collector need not look
    at it again: that took 5 ms, in which no thread could run."""
    gc.freeze()
    print("READY " + json.dumps({"pid": os.getpid(), **facts}), flush=True)


def stop_event() -> asyncio.Event:
    """An event set by the first SIGTERM or SIGINT; the second ends the process."""
    stopping = asyncio.Event()

    def on_signal() -> None:
        if stopping.is_set():
            os._exit(130)
        stopping.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    return stopping


def run(main: Callable[[], Awaitable[None]]) -> int:
    """Runs a process's main coroutine under uvloop; the outermost place where errors end."""
    os.umask(UMASK)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main())  # type: ignore[arg-type]
    except BatonError as error:
        print(f"{type(error).__name__}: {error.message}", file=sys.stderr)
        return 2
    return 0


async def until_stopped(stopping: asyncio.Event, tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Waits for the stop signal; then ends `tasks`. A task that fails ends the process with it."""
    waiting = asyncio.create_task(stopping.wait())
    everything: list[asyncio.Task[Any]] = [waiting, *tasks]
    done, _ = await asyncio.wait(everything, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    for task in tasks:
        task.cancel()
    await asyncio.gather(waiting, *tasks, return_exceptions=True)
    for task in done - {waiting}:
        task.result()
