"""The supervisor of what runs on one machine: starts the processes, restarts the dead, ends all.

It waits on each process, so a death is known at once, and it keeps `supervisor.json` in the run
directory true. It knows command lines and pids and nothing about requests.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from baton.cluster import ClusterSpec, ProcessSpec, processes
from baton.handle import (
    SCALE_FILE,
    SCALE_SIGNAL,
    STATE_FILE,
    StartFailed,
    SupervisorHandle,
    end_leftovers,
    start_time,
    tail,
    wanted_decodes,
    write_atomically,
)
from services.engine.weights.names import AS_IS
from services.ops import config, lifecycle, log
from services.ops.errors import ConfigError
from services.ops.private import private_directory
from services.ops.spare import wake_line

__all__ = ["Child", "RestartPolicy", "Supervisor", "SupervisorHandle", "main", "supervise"]

QUICK_DEATH_S = 2.0
BACKOFF_S_MIN, BACKOFF_S_MAX = 0.1, 5.0
READY_S_MAX = 120.0
STOP_S_MAX = 5.0
STOP_ORDER = (("prefill", "decode"), ("scheduler",), ("kv-store",))
PACKING = ("model", "weights", "weights_cache", "log_level")  # options of services.engine.weights
_logger = log.get("supervisor")


@dataclass
class RestartPolicy:
    """At once, unless the process died within two seconds of a restart: then ever later."""

    deaths: int = 0
    quick: int = 0

    def delay(self, lived_s: float) -> float:
        """Seconds to wait after a death, given how long the process had lived."""
        again = self.deaths > 0 and lived_s < QUICK_DEATH_S
        self.deaths += 1
        self.quick = self.quick + 1 if again else 0
        if self.quick == 0:
            return 0.0
        return min(BACKOFF_S_MAX, BACKOFF_S_MIN * 2.0 ** min(self.quick - 1, 16))


def _in_child() -> None:
    os.setpgid(0, 0)
    lifecycle.die_with_parent()


async def _spawn(
    spec: ProcessSpec, errors: BinaryIO, spare: bool = False
) -> asyncio.subprocess.Process:
    """Starts the process, or its spare, which goes to work when a line is written to it."""
    return await asyncio.create_subprocess_exec(
        *(spec.spare if spare else spec.argv),
        env=spec.environment(os.environ),
        stdin=asyncio.subprocess.PIPE if spare else asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=errors,
        preexec_fn=_in_child,
    )


@dataclass
class Child:
    """One supervised process through all its lives. `changed` is called whenever a fact changes."""

    spec: ProcessSpec
    log_file: Path
    changed: Callable[[], None]
    restarts: int = 0
    facts: dict[str, Any] = field(default_factory=dict)  # of its latest READY line
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    policy: RestartPolicy = field(default_factory=RestartPolicy)
    _process: asyncio.subprocess.Process | None = None
    _stopping: asyncio.Event = field(default_factory=asyncio.Event)
    _spare: asyncio.subprocess.Process | None = None
    _keeping: asyncio.Task[None] | None = None  # starts the spare
    _lender: Child | None = None  # whose spare its first life was

    @property
    def pid(self) -> int | None:
        """Of the present life; None between two."""
        if self._process is None or self._process.returncode is not None:
            return None
        return self._process.pid

    async def run(self) -> None:
        """Starts the process, and again whenever it dies, until `stop()`.

        Raises StartFailed when it gives up by itself before it was ever ready.
        """
        while not self._stopping.is_set():
            born = time.monotonic()
            status = await self._live()
            lived_s = time.monotonic() - born
            if self._stopping.is_set():
                return
            if not self.facts and status > 0:
                last = tail(self.log_file, 6)
                raise StartFailed(f"{self.spec.name} ended with status {status}:\n{last}")
            self.restarts += 1
            delay_s = self.policy.delay(lived_s)
            facts = {"name": self.spec.name, "lived_s": round(lived_s, 3), "delay_s": delay_s}
            _logger.warning("process died", status=status, **facts)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay_s)

    def borrow(self, other: Child) -> None:
        """Takes another's spare for its first life, if it keeps any itself; the other gets a new one."""
        assert self._process is None, "it lives already"
        if self.spec.spare and other._spare is not None and self._spare is None:
            self._spare, other._spare, self._lender = other._spare, None, other

    def repay(self) -> None:
        """Has whoever lent a spare make itself another."""
        if self._lender is not None:
            self._lender._keep()

    async def _live(self) -> int:
        """One life of the process; gives its exit status, negative for a signal."""
        with self.log_file.open("ab") as errors:
            self._process = process = self._wake_spare() or await _spawn(self.spec, errors)
        if self._stopping.is_set():
            self._signal(signal.SIGTERM)
        self.changed()
        reader = asyncio.create_task(self._read(process))
        status = await process.wait()
        reader.cancel()
        self.ready.clear()
        self.changed()
        return status

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        async for line in process.stdout:
            if line.startswith(b"READY "):
                self.facts = json.loads(line.removeprefix(b"READY "))
                self.ready.set()
                self.changed()
                self._keep()
                self.repay()

    def _wake_spare(self) -> asyncio.subprocess.Process | None:
        """The spare, told to go to work; None if there is none or it is dead."""
        spare, self._spare = self._spare, None
        if spare is None or spare.returncode is not None:
            return None
        assert spare.stdin is not None
        spare.stdin.write(wake_line(self.spec.options, self.spec.env, self.log_file))
        spare.stdin.close()
        return spare

    def _keep(self) -> None:
        if self._keeping is None or self._keeping.done():
            self._keeping = asyncio.create_task(self._keep_spare())

    async def _keep_spare(self) -> None:
        """Starts a spare, now that the process is ready and does not need the core for its own start."""
        if self.spec.spare and self._spare is None and not self._stopping.is_set():
            with self.log_file.open("ab") as errors:
                self._spare = await _spawn(self.spec, errors, spare=True)

    async def _end_spare(self) -> None:
        if self._keeping is not None:
            await asyncio.wait([self._keeping])
        spare, self._spare = self._spare, None
        if spare is not None:
            with contextlib.suppress(ProcessLookupError):
                spare.kill()
            await spare.wait()

    def _signal(self, number: int) -> None:
        if self._process is not None and self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def stop(self, task: asyncio.Task[None]) -> None:
        """Ends `task`, which is in `run()`: SIGTERM, and SIGKILL when that does not help."""
        self._stopping.set()
        await self._end_spare()
        self._signal(signal.SIGTERM)
        await asyncio.wait([task], timeout=STOP_S_MAX)
        if not task.done():
            _logger.warning("killed at shutdown", name=self.spec.name)
            self._signal(signal.SIGKILL)
            await asyncio.wait([task])


class Supervisor:
    """Owns the children of one cluster and its run directory."""

    def __init__(
        self, spec: ClusterSpec, plan: Callable[[ClusterSpec], list[ProcessSpec]] = processes
    ) -> None:
        self.spec, self._plan = spec, plan
        self.address = spec.listen if "scheduler" in spec.roles else ""
        self._ready = False
        (spec.path / "logs").mkdir(parents=True, exist_ok=True)
        self.children = [self._child(process) for process in plan(spec)]
        self._tasks: dict[str, asyncio.Task[None]] = {}  # in `Child.run`, by name
        self.asked = asyncio.Event()  # another number of workers is wanted: see `handle.scale`

    def _child(self, process: ProcessSpec) -> Child:
        return Child(process, self.spec.path / "logs" / f"{process.name}.log", self._on_change)

    async def run(self, stop: asyncio.Event, on_ready: Callable[[dict[str, Any]], None]) -> None:
        """Runs the cluster until `stop` is set; always leaves no process behind."""
        self._tasks = {c.spec.name: asyncio.create_task(c.run()) for c in self.children}
        stopped = asyncio.create_task(stop.wait())
        try:
            await self._until_ready([*self._tasks.values(), stopped])
            if not stop.is_set():
                self._ready = True
                self._on_change()
                on_ready(self.state())
            while not stop.is_set():
                await self._until_something(stopped)
        finally:
            stopped.cancel()
            await self._shut_down()

    async def _until_something(self, stopped: asyncio.Task[Any]) -> None:
        """Returns after the stop signal or a change of scale; raises what a child raised."""
        asked = asyncio.create_task(self.asked.wait())
        done, _ = await asyncio.wait(
            [asked, stopped, *self._tasks.values()], return_when=asyncio.FIRST_COMPLETED
        )
        asked.cancel()
        for task in done - {asked}:
            task.result()
        if self.asked.is_set():
            self.asked.clear()
            await self._scale()
            self._on_change()

    async def _scale(self) -> None:
        """Starts the decodes that are missing, from spares while there are any, and ends what is more
        than was asked for. The streams of those are taken over as after a death."""
        try:
            spec = dataclasses.replace(self.spec, decode=wanted_decodes(self.spec.path))
            planned = {p.name: p for p in self._plan(spec) if p.role == "decode"}
        except ConfigError as error:
            _logger.error("not scaled", reason=str(error))
            return
        self.spec = spec
        present = {c.spec.name: c for c in self.children if c.spec.role == "decode"}
        for name in planned.keys() - present.keys():
            child = self._child(planned[name])
            for lender in present.values():
                child.borrow(lender)
            self.children.append(child)
            self._tasks[name] = asyncio.create_task(self._run_added(child))
        for name in present.keys() - planned.keys():
            self.children.remove(present[name])
            await present[name].stop(self._tasks.pop(name))

    async def _run_added(self, child: Child) -> None:
        """A worker that cannot be added leaves the others alone."""
        try:
            await child.run()
        except (StartFailed, OSError) as error:  # OSError: the system has no room for a process
            _logger.error("not added", name=child.spec.name, reason=str(error))
            child.repay()
            self.children.remove(child)
            del self._tasks[child.spec.name]
            self._on_change()

    async def _until_ready(self, endings: Sequence[asyncio.Task[Any]]) -> None:
        """Returns when all are ready or one of `endings` is done; raises what that raised."""
        ready = asyncio.create_task(self._all_ready())
        done, _ = await asyncio.wait(
            [ready, *endings], timeout=READY_S_MAX, return_when=asyncio.FIRST_COMPLETED
        )
        ready.cancel()
        for task in done:
            task.result()
        if not done:
            missing = [child for child in self.children if not child.ready.is_set()]
            names = ", ".join(child.spec.name for child in missing)
            last = tail(missing[0].log_file, 6)
            raise StartFailed(f"not ready after {READY_S_MAX:g} s: {names}\n{last}")

    async def _all_ready(self) -> None:
        for child in self.children:
            await child.ready.wait()

    async def _shut_down(self) -> None:
        """Workers first, so that they can still report; the stores, which others need, last."""
        for roles in STOP_ORDER:
            group = [child for child in self.children if child.spec.role in roles]
            await asyncio.gather(*(c.stop(self._tasks[c.spec.name]) for c in group))
        assert all(child.pid is None for child in self.children)
        removed = self.spec.stores if "kv-store" in self.spec.roles else 0
        for store in range(removed if "shm" not in self.spec.unsafe else 0):
            shutil.rmtree(self.spec.arena_dir(store), ignore_errors=True)
        for pattern in ("*.sock", "*.alive", STATE_FILE, SCALE_FILE):
            for path in self.spec.path.glob(pattern):
                path.unlink(missing_ok=True)

    def _on_change(self) -> None:
        """Writes the state; pins the address, so that a scheduler that returns keeps its port."""
        scheduler = next((c for c in self.children if c.spec.role == "scheduler"), None)
        if scheduler is not None and "address" in scheduler.facts:
            self.address = scheduler.facts["address"]
            pinned = dataclasses.replace(self.spec, listen=self.address)
            scheduler.spec = next(p for p in self._plan(pinned) if p.role == "scheduler")
        write_atomically(self.spec.path / STATE_FILE, self.state())

    def state(self) -> dict[str, Any]:
        """What `supervisor.json` holds."""
        return {
            "pid": os.getpid(),
            "start_time": start_time(os.getpid()),
            "ready": self._ready,
            "address": self.address,
            "run_dir": self.spec.run_dir,
            "medium": self.spec.medium,
            "keys_dir": self.spec.keys_dir,
            "host": self.spec.host,
            "scheduler": self.spec.control,
            "model": self.spec.model,
            "processes": [
                {
                    "name": child.spec.name,
                    "role": child.spec.role,
                    "pid": child.pid,
                    "start_time": start_time(child.pid) if child.pid else None,
                    "ready": child.ready.is_set(),
                    "restarts": child.restarts,
                }
                for child in self.children
            ],
        }


@contextlib.contextmanager
def exclusive(run_dir: Path) -> Iterator[None]:
    """Holds the run directory for this process. Raises ConfigError when another one has it."""
    private_directory(run_dir, "run_dir")
    with (run_dir / "supervisor.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"run_dir: a cluster is running in {run_dir}") from None
        yield


def _stop_on_eof(stop: asyncio.Event) -> None:
    """Sets `stop` when standard input ends: whoever started this is gone."""
    loop = asyncio.get_running_loop()

    def on_readable() -> None:
        if not os.read(0, 4096):
            loop.remove_reader(0)
            stop.set()

    loop.add_reader(0, on_readable)


def with_prefill_class(spec: ClusterSpec) -> ClusterSpec:
    """The spec with prefill's numerics class, asked once in a process that has prefill's cores.

    Every process of the cluster is told the same class, and only prefill needs the device. Raises
    ConfigError when torch cannot use it.
    """
    if spec.prefill_device == "cpu" or spec.prefill_class:
        return spec
    asked = subprocess.run(
        [sys.executable, "-m", "services.engine.torch_device", f"--device={spec.prefill_device}"],
        capture_output=True, text=True, timeout=READY_S_MAX, check=False,
        preexec_fn=lambda: lifecycle.pin(spec.cores()[0]),
    )  # fmt: skip
    if asked.returncode:
        reason = asked.stderr.strip().rpartition("\n")[2].removeprefix("ConfigError: device: ")
        raise ConfigError(f"prefill_device: {reason}")
    return dataclasses.replace(spec, prefill_class=asked.stdout.strip())


def pack_weights(spec: ClusterSpec) -> None:
    """Packs the weights before workers are waited for, in a process that may use every core.

    Its progress goes to standard error. Raises ConfigError when they cannot be packed.
    """
    workers = {"prefill", "decode"} if spec.prefill_device == "cpu" else {"decode"}
    if spec.weights == AS_IS or not workers.intersection(spec.roles):
        return
    arguments = [f"--{name.replace('_', '-')}={getattr(spec, name)}" for name in PACKING]
    command = [sys.executable, "-m", "services.engine.weights", *arguments]
    if subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode:
        raise ConfigError(f"weights: {spec.model} could not be packed as {spec.weights}")


async def supervise(
    spec: ClusterSpec, on_ready: Callable[[dict[str, Any]], None], stop_on_eof: bool = False
) -> None:
    """Runs a cluster until the first SIGTERM or SIGINT."""
    with exclusive(spec.path):
        end_leftovers(spec.path)
        stop = lifecycle.stop_event()
        if stop_on_eof:
            _stop_on_eof(stop)
        await asyncio.to_thread(pack_weights, spec)
        supervisor = Supervisor(with_prefill_class(spec))
        asyncio.get_running_loop().add_signal_handler(SCALE_SIGNAL, supervisor.asked.set)
        await supervisor.run(stop, on_ready)


def _announce(state: dict[str, Any]) -> None:
    lifecycle.announce_ready(**{key: value for key, value in state.items() if key != "pid"})


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m baton.supervisor`: prints one READY line and runs until it is told to stop."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--stop-on-eof", action="store_true")
    own, rest = parser.parse_known_args(argv)
    try:
        spec = config.load(ClusterSpec, rest)
    except ConfigError as error:
        print(f"ConfigError: {error.message}", file=sys.stderr)
        return 2
    log.configure("supervisor", spec.log_level)
    return lifecycle.run(lambda: supervise(spec, _announce, own.stop_on_eof))


if __name__ == "__main__":
    sys.exit(main())
