"""Between two arenas over ZeroMQ: the very code that prefill and the stores run.

`put`: a sender pushes pages out of its arena into another store's. `get`: it offers them, and the other
store fetches them out of the arena of the sender's own store. Either way that store copies them once,
verifies every row, seals and announces them; timed from the first page until the last acknowledgement.
"""

from __future__ import annotations

import time
from pathlib import Path

from baton.bench.kv.local import Worker
from baton.bench.kv.world import World
from services.kv.layout import PAGE_TOKENS
from services.ops.keys import load as load_keys
from services.prefill.handoff import Destination, LocalHandoff, RemoteHandoff, push_of
from services.prefill.transfer import Sender as Carrier
from services.wire.client import Client
from services.wire.session import hello_of
from services.wire.stream import FRAME_BYTES_MAX
from services.wire.zmq_medium import ZmqMedium


class Sender(Worker):
    """Stands where prefill stands: maps the source arena and pushes."""

    def __init__(self, arena_dir: Path, world: World, keys_dir: str) -> None:
        super().__init__(arena_dir, world)
        self._medium = ZmqMedium(keys=load_keys(keys_dir, "prefill"))
        self._client = Client(self._medium, hello_of(self.arena.plan))

    def fill(self) -> None:
        """K and V, with their checksums, in the pages of the stream that is open."""
        for group, begin, end in self.world.steps(self.world.group_bytes):
            view = self.run(group, begin, end)
            view[:] = bytes([group + 1]) * len(view)
            self.stamp_run(group, begin, end)

    def move(self, run_bytes: int, to: Destination) -> float:
        """Seconds until the store at `to` has acknowledged everything."""
        fingerprint = bytes.fromhex(self.arena.plan.fingerprint)
        local = LocalHandoff(self.record, self.attempt, fingerprint, self._medium.notify)
        push = push_of(self.record, self.attempt, to, min(run_bytes, FRAME_BYTES_MAX))
        handoff = RemoteHandoff(local, push, to, Carrier(self._client))
        start = time.monotonic()
        for group, _, end in self.world.steps(run_bytes):
            handoff.ready(group, end * PAGE_TOKENS)
            self._client.poll()
        handoff.first(0, 0.0)
        self._client.carry(push)
        return time.monotonic() - start

    def close(self) -> None:
        self._client.close()
        self._medium.close()
