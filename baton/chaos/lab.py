"""One cluster to break: its view, its failpoints, its pids, and when it has come to rest.

It signals processes by the pids that the supervisor reports; it knows nothing of what a run is for.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Any

import grpc

from baton.chaos.hosts import HostsHandle, start_hosts
from baton.chaos.link import Flipper, Relay
from baton.chaos.setups import CABLE_MBIT_PER_S, SETUPS, Setup
from baton.client import open_channel
from baton.cluster import ClusterSpec
from baton.handle import StartFailed, SupervisorHandle
from baton.v1 import cluster_pb2, cluster_pb2_grpc, inference_pb2_grpc

VIEW_S = 2.0
LEFTOVERS_S_MAX = 5.0
LINK = "link"
LOST = "host "  # before the name of one, among what has been stopped
REST_S_MAX = 30.0
POLL_S = 0.01
FLIP_GAP_BYTES = 300_000  # between two flips on the wire, on average


@dataclass(frozen=True)
class Death:
    """Which process died (or was paused), and when on this machine's monotonic clock."""

    process: str
    at: float


class Lab:
    """A running cluster; use as a context manager. What prefill's store sends to decode's goes
    through `link` if the set-up has one; several hosts are behind one handle."""

    def __init__(
        self, spec: ClusterSpec, setup: Setup = SETUPS["standard"], rng: Random | None = None
    ) -> None:
        self._failpoints = spec.path / "failpoints"
        self._failpoints.mkdir(parents=True, exist_ok=True)
        self.spec = dataclasses.replace(spec, failpoints=str(self._failpoints))
        self.link: Relay | None = None
        if setup.link:
            self._lay_link(rng or Random(0))
        self.handle = self._start(setup)
        self.arenas = self._arena_dirs()
        entries = self.handle.state()["processes"]
        self._workers = sum(entry["role"] in ("prefill", "decode") for entry in entries)
        self._stopped: set[str] = set()
        self._wall_offset = time.time() - time.monotonic()
        self.leaked = 0  # pages that an earlier run has left behind
        self._files = arena_files(self.arenas)
        self.leaked_shm_files = 0  # known after the end

    def _start(self, setup: Setup) -> SupervisorHandle:
        if not setup.hosts:
            return SupervisorHandle.start(self.spec)
        handle = start_hosts(self.spec, setup.hosts)
        handle.network.limit(CABLE_MBIT_PER_S)
        return handle

    def _arena_dirs(self) -> list[str]:
        """Directories of all arenas, decode's last."""
        if isinstance(self.handle, HostsHandle):
            return self.handle.arena_dirs()
        return [self.spec.arena_dir(store) for store in range(self.spec.stores)]

    def _lay_link(self, rng: Random) -> None:
        """Decode's store takes pages on a unix socket, and prefill is told the relay's address."""
        socket = f"{self.spec.run_dir}/ingest.sock"
        self.link = Relay(socket, Flipper(rng, FLIP_GAP_BYTES))
        store = f"kv-store-{self.spec.stores - 1}"  # decode's
        options = (f"--ingest-listen=ipc://{socket}", f"--ingest-advertise={self.link.address}")
        more = tuple(f"{store}:{option}" for option in options)
        self.spec = dataclasses.replace(self.spec, extra=(*self.spec.extra, *more))

    def __enter__(self) -> Lab:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        files: set[str] = set()
        try:
            self.revive()
            files = self._leftovers()
        finally:
            self.handle.stop()
        self.leaked_shm_files = len(files) + len(arena_files(self.arenas))
        for directory in self.arenas:  # the control without the guard leaves them
            shutil.rmtree(directory, ignore_errors=True)
        if self.link is not None:
            self.link.close()

    def _leftovers(self) -> set[str]:
        """Files beside the arenas' own and the locks of whoever lives; the dead's locks have some
        time to go."""
        end = time.monotonic() + LEFTOVERS_S_MAX
        while True:  # bounded by the deadline
            known = {name for name in self._files if "/locks/" not in name}
            extra, workers = arena_files(self.arenas) - known, self._workers
            locks = {name for name in extra if "/locks/" in name}
            if (extra == locks and len(locks) <= workers) or time.monotonic() > end:
                return (extra - locks) | set(sorted(locks)[workers:])
            time.sleep(POLL_S)

    # --- faults ---

    def arm(self, point: str, index: int | None = None, action: str = "kill") -> None:
        """The next process that reaches `point` dies, or stops, there."""
        value: dict[str, Any] = {"point": point, "action": action}
        if index is not None:
            value["index"] = index
        temporary = self._failpoints / f"{point}.tmp"
        temporary.write_text(json.dumps(value))
        temporary.replace(self._failpoints / f"{point}@1.json")

    def fired(self) -> list[Death]:
        """Who has reached a failpoint since `disarm()`, the first one first."""
        offset = self._wall_offset
        found = []
        for path in self._failpoints.glob("*.fired-*"):
            process = path.name.rpartition(".fired-")[2].rpartition("-")[0]
            found.append(Death(process, path.stat().st_ctime - offset))
        return sorted(found, key=lambda fired: fired.at)

    def disarm(self) -> None:
        for path in self._failpoints.iterdir():
            path.unlink(missing_ok=True)

    def process_of(self, role: str) -> str:
        """The process of a role that has only one, as far as decode is concerned."""
        if role == LINK:
            return LINK
        if isinstance(self.handle, HostsHandle):
            return self.handle.names(role)[0]
        if role == "kv-store":
            return f"kv-store-{self.spec.stores - 1}"  # that of decode
        return "prefill-0" if role == "prefill" else role

    def cut(self, between: str = "", owner: str = "") -> None:
        """Breaks the link, or that `between` two roles' hosts, until `revive()`. `owner`: the process
        that the role of this name stands for."""
        self.note_stopped(LINK)
        if not between:
            assert self.link is not None, "this cluster has no link"
            self.link.cut()
            return
        hosts = self._hosts
        one, other = between.split("/")
        others = [hosts.host_of(owner)] if other == "owner" else hosts.hosts_of(other)
        hosts.cut(hosts.hosts_of(one), others)

    @property
    def _hosts(self) -> HostsHandle:
        assert isinstance(self.handle, HostsHandle), "this cluster is on one machine"
        return self.handle

    def lose(self, process: str) -> None:
        """Switches off the machine that this process runs on, until `revive()`."""
        host = self._hosts.host_of(process)
        self._hosts.lose(host)
        self.note_stopped(LOST + host)

    def signal(self, name: str, number: signal.Signals) -> None:
        """Signals a process; one that is between two lives has died already."""
        with contextlib.suppress(StartFailed, ProcessLookupError):
            self.handle.kill(name, number)
        if number == signal.SIGSTOP:
            self.note_stopped(name)

    def note_stopped(self, name: str) -> None:
        """A process is stopped; `revive()` is to wake it."""
        self._stopped.add(name)

    def revive(self) -> None:
        """Wakes whatever was stopped, switches lost hosts on again, and mends the links."""
        stopped, self._stopped = self._stopped, set()
        if LINK in stopped and self.link is not None:
            self.link.heal()
        lost = {name for name in stopped if name.startswith(LOST)}
        if stopped and isinstance(self.handle, HostsHandle):
            self.handle.network.heal()
        for name in sorted(lost):
            self._hosts.regain(name.removeprefix(LOST))
        for name in stopped - lost - {LINK}:
            with contextlib.suppress(StartFailed, ProcessLookupError):
                self.handle.kill(name, signal.SIGCONT)

    # --- looking at it ---

    def connect(self) -> Connection:
        """A client's connection; make it inside a running loop."""
        return Connection(self.handle.address, self.spec.keys_dir)

    def trouble(self, view: cluster_pb2.ClusterView) -> str:
        """Why the cluster is not at rest, or an empty string."""
        try:
            entries = {e["name"]: e for e in self.handle.state()["processes"]}
        except StartFailed as error:  # a host that has just been switched on
            return error.message
        if missing := [name for name, e in entries.items() if not e["ready"]]:
            return f"{', '.join(missing)} not ready"
        workers = {w.name: w for w in view.workers}
        for name, entry in entries.items():
            if entry["role"] not in ("prefill", "decode"):
                continue
            if name not in workers or workers[name].pid != entry["pid"]:
                return f"{name} not attached"
            if workers[name].state != cluster_pb2.WORKER_STATE_READY:
                return f"{name} suspected"
        if view.requests.running or view.requests.waiting:
            return f"{view.requests.running + view.requests.waiting} requests not ended"
        pids = {entry["pid"] for entry in entries.values()}
        here = [store for store in view.stores if store.reachable and store.pid in pids]
        if len(here) != len(self.arenas):
            return "a store is away"
        return self._leak(view)

    def _leak(self, view: cluster_pb2.ClusterView) -> str:
        if pages_in_use(view) <= self.leaked:
            return ""
        kinds = ("open", "sealed", "quarantined")
        counts = {kind: sum(getattr(s, f"pages_{kind}") for s in view.stores) for kind in kinds}
        counts["streams"] = sum(s.streams for s in view.stores)
        return "still there: " + ", ".join(f"{k} {n}" for k, n in counts.items() if n)


def arena_files(directories: Sequence[str]) -> set[str]:
    """Everything that lies in a cluster's arena directories now, and the directories."""
    roots = [Path(directory) for directory in directories]
    found = [path for root in roots if root.exists() for path in (root, *root.rglob("*"))]
    return {str(path) for path in found}


def pages_in_use(view: cluster_pb2.ClusterView) -> int:
    """Pages that somebody still holds, prefix cache excepted; a stream record counts as one."""
    return sum(s.pages_open + s.pages_sealed + s.pages_quarantined + s.streams for s in view.stores)


def of_stores(after: cluster_pb2.ClusterView, counter: str, before: cluster_pb2.ClusterView) -> int:
    """By how much a counter of the stores has moved, all of them together."""
    now, was = (sum(getattr(s, counter) for s in view.stores) for view in (after, before))
    return int(now - was)


class Connection:
    """Stubs over one channel, without the client library: nothing is filtered here."""

    def __init__(self, address: str, keys_dir: str) -> None:
        self._channel = open_channel(grpc.aio, address, keys_dir)
        self.inference: Any = inference_pb2_grpc.InferenceStub(self._channel)  # type: ignore[no-untyped-call]
        self._cluster: Any = cluster_pb2_grpc.ClusterStub(self._channel)  # type: ignore[no-untyped-call]

    async def view(self) -> cluster_pb2.ClusterView | None:
        """None while the scheduler is away."""
        try:
            view: cluster_pb2.ClusterView = await self._cluster.GetView(
                cluster_pb2.GetViewRequest(), timeout=VIEW_S
            )
        except grpc.aio.AioRpcError:
            return None
        return view

    async def close(self) -> None:
        await self._channel.close()


async def rest(
    lab: Lab, connection: Connection, deadline_s: float = REST_S_MAX
) -> tuple[cluster_pb2.ClusterView | None, str]:
    """Waits until every process is back and no page is held. Gives the last view and what is still
    wrong after the deadline, if anything."""
    end = time.monotonic() + deadline_s
    while True:  # bounded by the deadline
        view = await connection.view()
        trouble = lab.trouble(view) if view is not None else "no view"
        if not trouble or time.monotonic() > end:
            return view, trouble
        await asyncio.sleep(POLL_S)
