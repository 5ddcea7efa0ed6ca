"""Mooncake Store over TCP between two processes, in the way its documentation calls the fastest:
`batch_put_from` and `batch_get_into` on registered buffers, with its connection pool on.

A node holds the memory and no client uses it; the client has none of its own, so every byte goes over
loopback. Timed at the client: a put until it has been accepted, a get until it lies in the buffer.
Optional: `scripts/install_group.py peers`, and the Debian packages in docs/performance.md.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np

from baton.bench.kv.actors import START_S_MAX, STOP_S_MAX, ActorFailed, child
from baton.bench.kv.world import MIB, World
from baton.closing import Closing

LOCAL_BUFFER_BYTES = 64 * MIB


def missing() -> str:
    """Why Mooncake Store cannot be measured here; an empty string when it can."""
    if importlib.util.find_spec("mooncake") is None:
        return "mooncake-transfer-engine-non-cuda is not installed (dependency group `peers`)"
    try:
        import mooncake.store  # noqa: F401
    except ImportError as error:
        return f"mooncake.store: {error}"
    return ""


class Master(Closing):
    """`mooncake_master` on a port of its own; use as a context manager."""

    def __init__(self, log: Path) -> None:
        import mooncake

        program = Path(next(iter(mooncake.__path__))) / "mooncake_master"
        self.address = f"127.0.0.1:{_free_port()}"
        with log.open("ab") as output:
            argv = [
                str(program), f"--rpc_port={self.address.rpartition(':')[2]}",
                "--rpc_address=127.0.0.1", f"--metrics_port={_free_port()}",
                "--enable_metric_reporting=false",
            ]  # fmt: skip
            self._process = child(argv, output, output)
        self._await_listening(log)

    @property
    def pid(self) -> int:
        return self._process.pid

    def _await_listening(self, log: Path) -> None:
        host, _, port = self.address.rpartition(":")
        end = time.monotonic() + START_S_MAX
        while time.monotonic() < end and self._process.poll() is None:
            try:
                socket.create_connection((host, int(port)), 1.0).close()
            except OSError:
                time.sleep(0.02)
                continue
            return
        self.close()
        raise ActorFailed(f"mooncake_master: not listening; see {log}")

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(STOP_S_MAX)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _free_port() -> int:
    """A port that was free a moment ago: mooncake_master does not tell which one it picked."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Node:
    """A process of the store. `segment_bytes` of memory for the pool, 0 for a mere client."""

    def __init__(self, master: str, segment_bytes: int, log: str) -> None:
        os.environ.setdefault("MC_TCP_ENABLE_CONNECTION_POOL", "1")
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(output, 1), os.dup2(output, 2)
        from mooncake.store import MooncakeDistributedStore

        self.store: Any = MooncakeDistributedStore()
        code = self.store.setup(
            "127.0.0.1", "P2PHANDSHAKE", segment_bytes, LOCAL_BUFFER_BYTES, "tcp", "", master
        )
        if code:
            raise ActorFailed(f"setup: error {code}")

    def close(self) -> None:
        self.store.close()


class Client(Node):
    """Puts and gets one prompt's KV, an object for each run, `batch` of them in a call."""

    def __init__(self, master: str, world: World, log: str) -> None:
        super().__init__(master, 0, log)
        self._generation = 0
        self._source = np.random.default_rng(1).integers(0, 256, world.total_bytes, np.uint8)
        self._target = np.zeros_like(self._source) + np.uint8(1)
        for buffer in (self._source, self._target):
            if code := self.store.register_buffer(buffer.ctypes.data, buffer.nbytes):
                raise ActorFailed(f"register_buffer: error {code}")

    def prepare(self) -> None:
        """Takes the objects of the put before out of the store."""
        self.store.remove_all(True)
        self._generation += 1

    def put(self, run_bytes: int, total_bytes: int, batch: int) -> float:
        start = time.monotonic()
        for keys, offsets in self._batches(run_bytes, total_bytes, batch):
            at = [self._source.ctypes.data + offset for offset in offsets]
            codes = self.store.batch_put_from(keys, at, [run_bytes] * len(keys))
            assert not any(codes), f"batch_put_from: {codes}"
        return time.monotonic() - start

    def get(self, run_bytes: int, total_bytes: int, batch: int) -> float:
        self._target[:total_bytes:4096] = 0  # what was there would pass for what should come
        start = time.monotonic()
        for keys, offsets in self._batches(run_bytes, total_bytes, batch):
            at = [self._target.ctypes.data + offset for offset in offsets]
            sizes = self.store.batch_get_into(keys, at, [run_bytes] * len(keys))
            assert sizes == [run_bytes] * len(keys), f"batch_get_into: {sizes}"
        seconds = time.monotonic() - start
        same = self._target[:total_bytes:4096] == self._source[:total_bytes:4096]
        assert same.all(), "other bytes came back"
        return seconds

    def _batches(
        self, run_bytes: int, total_bytes: int, batch: int
    ) -> list[tuple[list[str], list[int]]]:
        """(keys, offsets) of each call."""
        offsets = list(range(0, total_bytes, run_bytes))
        made = []
        for first in range(0, len(offsets), batch):
            chosen = offsets[first : first + batch]
            made.append(([f"{self._generation}-{offset}" for offset in chosen], chosen))
        return made
