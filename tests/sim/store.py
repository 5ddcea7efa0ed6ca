"""A kv-store process: the real `KvStore` over a real arena, its real ingest, calls over the network."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from baton.v1 import store_pb2
from services.engine.identity import ModelIdentity
from services.kv.arena import Arena
from services.kv_store.config import KvStoreConfig
from services.kv_store.endpoint import Endpoint
from services.kv_store.ingest import Lending
from services.kv_store.runtime import KvStore
from services.kv_store.scrub import Scrub
from services.kv_store.state import MAX_EPOCH
from services.ops.errors import BatonError
from tests.sim.hub import Died, Hub, Process
from tests.sim.medium import SimMedium, Wires
from tests.sim.model import CONTEXT
from tests.support import store_actors

SWEEP_S = 0.1
TURN_S = 0.05
ARENA_BYTES = 1 << 20  # 15 blocks: a few requests fill it


@cache
def identity() -> ModelIdentity:
    whole = store_actors.identity()
    return replace(whole, config=replace(whole.config, max_context=CONTEXT))


class Points:
    """What `Failpoints` is to a process: `hit` decides whether it ends here."""

    def __init__(self, hit: Callable[[str], None]) -> None:
        self._hit = hit

    def refresh(self) -> None:
        pass

    def hit(self, point: str, index: int | None = None) -> None:
        self._hit(point)


class StoreProcess(Process):
    """Everything outlives it that lies in `directory`."""

    def __init__(self, hub: Hub, name: str, directory: Path, wires: Wires) -> None:
        super().__init__(hub, name)
        self.directory, self._wires = directory, wires
        self.address = f"tcp://{name}"
        self.doomed = False  # it dies at the next failpoint
        self.store: KvStore
        self.slots = 6
        self.lease_ms = hub.rng.choice([800, 1500, 10_000])
        self.start()
        self.arena = Arena(directory)  # the workers' mapping

    def begin(self) -> None:
        config = KvStoreConfig(
            name=self.name, arena_dir=str(self.directory), arena_bytes=ARENA_BYTES,
            streams_max=self.slots, ingest_listen=self.address, lease_ms=self.lease_ms,
        )  # fmt: skip
        self.store = KvStore(config, identity(), clock=lambda: self.hub.now)
        self._scrub = Scrub(self.store)
        self.store.failpoints = Points(self._hit)  # type: ignore[assignment]
        medium = SimMedium(self._wires, self)
        listener = medium.listen(self.address)
        self.endpoint = Endpoint(
            self.store.arena, Lending(self.store), medium, listener,
            inflight_bytes_max=config.ingest_bytes_inflight_max, clock=lambda: self.hub.now,
        )  # fmt: skip
        listener.came = self._turn
        self.after(TURN_S, self._turns)
        self.after(SWEEP_S, self._sweep)

    @property
    def store_id(self) -> str:
        return self.store.store_id

    def _turn(self) -> None:
        """As `Ingest.run`."""
        while self.endpoint.turn():
            pass

    def _turns(self) -> None:
        self._turn()
        self.after(TURN_S, self._turns)

    def _sweep(self) -> None:
        expired = self.store.counts.leases_expired
        self.store.sweep()
        self.hub.counts["lease expired"] += self.store.counts.leases_expired - expired
        self._scrub.step()
        self.after(SWEEP_S, self._sweep)

    def ended(self) -> None:
        os.close(self.store._own_lock)

    def _hit(self, point: str) -> None:
        if self.doomed:
            self.doomed = False
            self.hub.counts["store killed within a call"] += 1
            raise Died(point)

    def serve(self, method: str, request: Any) -> tuple[Any, str, str]:
        """As `rpc.KvStoreServicer`; a failpoint may end the process within it."""
        if method != "Renew":
            self.tell(f"{method} {' '.join(str(request).split())[:160]}")
        try:
            return self._answer(method, request), "OK", ""
        except BatonError as error:
            self.tell(f"  {error.code}: {error.message}")
            return None, error.code, error.message
        except Died:
            self.kill()
            return None, "UNAVAILABLE", "killed"

    def _answer(self, method: str, request: Any) -> Any:
        store = self.store
        if method == "OpenStream":
            return store.open(request)
        if method == "Reassign":
            return store.reassign(request)
        if method == "Publish":
            return store_pb2.PublishResponse(blocks=store.publish(request.request_id))
        if method == "ReadStream":
            return store.read(request.request_id)
        if method == "Release":
            found = store.release(request)
            waiting = sorted(store.state.waiting_for(request.request_id))
            return store_pb2.ReleaseResponse(found=found, waiting_for=waiting)
        if method == "Reconcile":
            released = store.reconcile(request.request_ids, request.epoch or MAX_EPOCH)
            return store_pb2.ReconcileResponse(released=released)
        if method == "Invalidate":
            blocks = store.invalidate(request.request_id, request.blocks)
            return store_pb2.InvalidateResponse(blocks=blocks)
        if method == "Renew":
            return store.renewed(request)
        assert method == "Retire"
        return store_pb2.RetireResponse(pages=store.retire(request))
