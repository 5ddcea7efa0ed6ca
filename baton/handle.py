"""A running cluster seen from outside: its state file, and a handle for whoever starts one.

Processes are known by pid and start time together, and are only ever signalled by pid.
"""

from __future__ import annotations

import functools
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from baton.closing import Closing
from baton.cluster import ClusterSpec, variables_of
from services.ops.config import as_arguments
from services.ops.errors import BatonError, ConfigError
from services.ops.private import private_directory

STATE_FILE = "supervisor.json"
SCALE_FILE, SCALE_SIGNAL = "scale.json", signal.SIGUSR1  # what is asked for, and "look at it"
START_S_MAX = 150.0  # the supervisor itself gives up after 120
STOP_S_MAX = 30.0  # three groups of processes, each bounded by the supervisor
_POLL_S = 0.005


class StartFailed(BatonError):
    """The cluster did not become ready; the message names the process and ends with its log."""

    code = "UNAVAILABLE"


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks after boot; None when there is none. With the pid it
    names one process for ever, since the kernel gives a pid again only to a later one."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *rest = text.rpartition(")")[2].split()
    return None if state in "ZX" else int(rest[18])


def write_atomically(path: Path, value: dict[str, Any]) -> None:
    """Readers see the old file or the new one, never a part."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)


def is_alive(entry: dict[str, Any]) -> bool:
    """Whether the very process that a state file names is still there."""
    pid = entry["pid"]
    return pid is not None and start_time(pid) == entry["start_time"]


def _is_gone(entry: dict[str, Any]) -> bool:
    return not is_alive(entry)


def _last_state(run_dir: str | Path) -> dict[str, Any] | None:
    try:
        state: dict[str, Any] = json.loads((Path(run_dir) / STATE_FILE).read_text())
    except FileNotFoundError:
        return None
    return state


def read_state(run_dir: str | Path) -> dict[str, Any] | None:
    """The state of the supervisor that runs in `run_dir`; None when none does."""
    state = _last_state(run_dir)
    return state if state is not None and is_alive(state) else None


def end_leftovers(run_dir: str | Path, deadline_s: float = 5.0) -> None:
    """Ends what a supervisor that was killed has left behind: two of a kind would fight over a
    socket. The kernel has sent them SIGTERM already; after `deadline_s` they are killed."""
    state = _last_state(run_dir)
    assert state is None or not is_alive(state)
    for entry in state["processes"] if state else []:
        gone = functools.partial(_is_gone, entry)
        try:
            wait_until(gone, deadline_s, entry["name"])
        except TimeoutError:
            os.kill(entry["pid"], signal.SIGKILL)
            wait_until(gone, deadline_s, entry["name"])


def tail(path: Path, lines: int = 12) -> str:
    """The last lines of a log file, for an error message."""
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
    except FileNotFoundError:
        return ""


def wait_until(condition: Callable[[], bool], deadline_s: float, what: str) -> None:
    """Polls a condition that nothing announces. Raises TimeoutError naming `what`."""
    end = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not after {deadline_s:g} s")
        time.sleep(_POLL_S)


def stop_supervisor(state: dict[str, Any], deadline_s: float = STOP_S_MAX) -> None:
    """Ends the cluster that `read_state` has found and waits until its supervisor is gone."""
    if is_alive(state):
        os.kill(state["pid"], signal.SIGTERM)
    what = f"end of the supervisor, pid {state['pid']}"
    wait_until(functools.partial(_is_gone, state), deadline_s, what)


def scale(run_dir: str | Path, decodes: int, deadline_s: float = START_S_MAX) -> dict[str, Any]:
    """Has the supervisor of `run_dir` run so many decodes, and gives its state once they are ready.

    Raises StartFailed when there is no supervisor, or none that runs decodes; TimeoutError.
    """
    assert decodes >= 1
    state = read_state(run_dir)
    if state is None or not _decodes(state):
        raise StartFailed(f"no cluster with a decode in {run_dir}")
    write_atomically(Path(run_dir) / SCALE_FILE, {"decode": decodes})
    os.kill(state["pid"], SCALE_SIGNAL)

    def done() -> bool:
        nonlocal state
        state = read_state(run_dir)
        if state is None:
            raise StartFailed(f"the cluster in {run_dir} has ended")
        return [entry["ready"] for entry in _decodes(state)] == [True] * decodes

    wait_until(done, deadline_s, f"{decodes} decodes, see {Path(run_dir) / 'logs'}")
    assert state is not None
    return state


def _decodes(state: dict[str, Any]) -> list[dict[str, Any]]:
    return [entry for entry in state["processes"] if entry["role"] == "decode"]


def wanted_decodes(run_dir: Path) -> int:
    """What `scale` has asked for last. Raises ConfigError when nobody has, or not in these words."""
    path = run_dir / SCALE_FILE
    try:
        return int(json.loads(path.read_text())["decode"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"decode: {path} does not say how many: {error}") from None


class SupervisorHandle(Closing):
    """A cluster as a child process: `with SupervisorHandle.start(spec) as cluster: ...`.

    The cluster ends with its owner, however that dies, unless it was started detached.
    """

    def __init__(self, spec: ClusterSpec, process: subprocess.Popen[bytes]) -> None:
        self.spec, self.process = spec, process
        self.address = spec.listen

    @classmethod
    def start(
        cls, spec: ClusterSpec, *, deadline_s: float = START_S_MAX, detach: bool = False,
        prefix: Sequence[str] = (),
    ) -> SupervisorHandle:  # fmt: skip
        """Starts a cluster and waits until every process is ready. Raises StartFailed.

        `prefix` goes before the command line and must end in executing it, as `ip netns exec` does.
        """
        handle = cls.launch(spec, detach=detach, prefix=prefix)
        try:
            handle.await_ready(deadline_s)
        except BaseException:
            handle.stop()
            raise
        return handle

    @classmethod
    def launch(
        cls, spec: ClusterSpec, *, detach: bool = False, prefix: Sequence[str] = ()
    ) -> SupervisorHandle:
        """Starts the supervisor alone; `await_ready()` is still to come."""
        private_directory(spec.path, "run_dir")
        logs = spec.path / "logs"
        private_directory(logs, "run_dir")
        unset = variables_of(ClusterSpec)
        more = [] if detach else ["--stop-on-eof"]
        with (logs / "supervisor.log").open("ab") as errors:
            process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "baton.supervisor", *as_arguments(spec), *more],
                env={k: v for k, v in os.environ.items() if k not in unset},
                stdin=subprocess.DEVNULL if detach else subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=detach,
            )
        return cls(spec, process)

    def await_ready(self, deadline_s: float = START_S_MAX) -> None:
        """Waits until every process is ready. Raises StartFailed."""
        assert self.process.stdout is not None
        end, text = time.monotonic() + deadline_s, b""
        while b"\n" not in text:
            wait_s = max(0.0, end - time.monotonic())
            readable, _, _ = select.select([self.process.stdout], [], [], wait_s)
            chunk = os.read(self.process.stdout.fileno(), 65536) if readable else b""
            if not chunk:
                why = "ended" if readable else f"not ready after {deadline_s:g} s"
                last = tail(self.spec.path / "logs" / "supervisor.log", 16)
                raise StartFailed(f"{why}, with the last words:\n{last}")
            text += chunk
        self.address = json.loads(text.partition(b"READY ")[2])["address"]

    def state(self) -> dict[str, Any]:
        """`supervisor.json` as it is now. Raises StartFailed when the supervisor is gone."""
        state = read_state(self.spec.path)
        if state is None:
            raise StartFailed(f"no supervisor in {self.spec.run_dir}")
        return state

    def entry(self, name: str) -> dict[str, Any]:
        """One process's part of the state: name, role, pid, ready, restarts."""
        entries = {entry["name"]: entry for entry in self.state()["processes"]}
        found: dict[str, Any] = entries[name]
        return found

    def names(self, role: str) -> list[str]:
        return [e["name"] for e in self.state()["processes"] if e["role"] == role]

    def pid(self, name: str) -> int:
        """The pid of a process that lives now. Raises StartFailed between two lives."""
        pid = self.entry(name)["pid"]
        if pid is None:
            raise StartFailed(f"{name} is not running now")
        return int(pid)

    def kill(self, name: str, number: int = signal.SIGKILL) -> int:
        """Signals one process by its pid, and gives that pid."""
        pid = self.pid(name)
        os.kill(pid, number)
        return pid

    def wait_restarted(self, name: str, old_pid: int, deadline_s: float = 30.0) -> int:
        """Waits until `name` is ready again as another process; gives the new pid."""

        def back() -> bool:
            entry = self.entry(name)
            return bool(entry["ready"]) and entry["pid"] not in (None, old_pid)

        wait_until(back, deadline_s, f"restart of {name}")
        return self.pid(name)

    def stop(self) -> int:
        """Ends the cluster and gives the supervisor's exit status; safe to call twice."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(STOP_S_MAX)
        except subprocess.TimeoutExpired:
            self.process.kill()  # its children get SIGTERM from the kernel
            self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        return self.process.returncode

    def close(self) -> None:
        self.stop()
