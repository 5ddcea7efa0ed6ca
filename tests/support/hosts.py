"""Clusters over several hosts, as tests look at them: at rest, and from a client on its own host."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from baton.chaos.hosts import HostsHandle
from baton.client import Client, ClientError
from baton.handle import wait_until
from baton.v1 import cluster_pb2
from services.kv.arena import Arena
from services.kv.record import StreamRecord

REST_S = 20.0


def settle(cluster: HostsHandle) -> cluster_pb2.ClusterView:
    """Heals the network and waits until everyone that is left is back and nobody holds a page."""
    cluster.network.heal()
    views: list[cluster_pb2.ClusterView] = []
    wait_until(lambda: _at_rest(cluster, views), REST_S, "the hosts to come to rest")
    return views[-1]


def _at_rest(cluster: HostsHandle, views: list[cluster_pb2.ClusterView]) -> bool:
    entries = cluster.state()["processes"]
    if not all(entry["ready"] for entry in entries):
        return False
    try:
        with Client(cluster.address) as client:
            view = client.view()
    except ClientError:
        return False
    views.append(view)
    workers = {e["name"] for e in entries if e["role"] in ("prefill", "decode")}
    here = {cluster.network.address(host) for host in cluster.hosts}
    stores = [s for s in view.stores if s.address.partition(":")[0] in here]
    held = [
        s for s in stores
        if not s.reachable or s.streams + s.pages_open + s.pages_sealed + s.pages_quarantined
    ]  # fmt: skip
    attached = {w.name for w in view.workers if w.state == cluster_pb2.WORKER_STATE_READY}
    asked = view.requests.running + view.requests.waiting
    return attached == workers and bool(stores) and not held and not asked


def view_of(cluster: HostsHandle) -> cluster_pb2.ClusterView:
    with Client(cluster.address) as client:
        return client.view()


def decode_of(view: cluster_pb2.ClusterView) -> cluster_pb2.Worker:
    """The decode that is at work."""
    [worker] = [w for w in view.workers if w.role == cluster_pb2.ROLE_DECODE and w.running_requests]
    return worker


class RemoteClient:
    """`baton generate` on a host of its own; its events as they come."""

    def __init__(self, cluster: HostsHandle, host: str, prompt: str, *options: str) -> None:
        self._process = subprocess.Popen(
            [*cluster.network.command(host), sys.executable, "-m", "baton.cli", "generate", prompt,
             "--address", cluster.address, "--json", *options],
            stdout=subprocess.PIPE,
        )  # fmt: skip

    def events(self) -> Iterator[dict[str, Any]]:
        """Every event, and the summary last."""
        assert self._process.stdout is not None
        with self._process.stdout:
            for line in self._process.stdout:
                yield json.loads(line)
        assert self._process.wait(10) == 0

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def committed(arena_dir: str) -> Sequence[int]:
    """Committed steps of the streams in an arena, read where decode writes them."""
    arena = Arena(Path(arena_dir))
    return [StreamRecord(arena, slot).commit()[1] for slot in range(arena.plan.streams)]


def resident_bytes(pid: int) -> int:
    """Memory that a process has in use for itself, mapped files left out."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    [line] = [line for line in status if line.startswith("RssAnon:")]
    return int(line.split()[1]) * 1024
