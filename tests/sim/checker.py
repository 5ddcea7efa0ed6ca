"""What must hold: after every event, and when all is over."""

from __future__ import annotations

from typing import TYPE_CHECKING

from baton.v1 import store_pb2
from services.kv.record import StreamRecord
from services.scheduler.request import CallStore
from tests.sim.hub import Process, Violation
from tests.sim.scheduler import SchedulerProcess
from tests.sim.store import StoreProcess
from tests.sim.workers import WorkerProcess

if TYPE_CHECKING:
    from tests.sim.world import World


class Checker:
    """Keeps its own books of what has been seen."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._epochs: dict[tuple[str, str], tuple[int, int]] = {}

    def after(self, process: Process | None) -> None:
        """After an event of this process."""
        if isinstance(process, SchedulerProcess) and process.alive:
            process.state.check_invariants()
            process.flush()
        elif isinstance(process, StoreProcess) and process.alive:
            process.store.state.check_invariants()
            process.store.leases.check_invariants(process.store.state.streams)
            self._epochs_advance(process)
            self._pages(process)
        elif isinstance(process, WorkerProcess) and process.alive:
            self._pages(process.home)

    def _epochs_advance(self, store: StoreProcess) -> None:
        """An epoch or attempt of an open stream never goes back. Once it has been released, a call that
        a dead scheduler had sent may open it again under an old one: its lease runs out."""
        open_now = store.store.state.streams
        for name, request_id in [key for key in self._epochs if key[0] == store.name]:
            if request_id not in open_now:
                del self._epochs[name, request_id]
        for request_id, stream in store.store.state.streams.items():
            key, now = (store.name, request_id), (stream.epoch, stream.attempt)
            before = self._epochs.get(key, (0, 0))
            if now[0] < before[0] or now[1] < before[1]:
                raise Violation(f"{request_id} in {store.name}: epochs {before}, then {now}")
            self._epochs[key] = now
            word = StreamRecord(store.store.arena, stream.slot).commit()[0]
            if word < stream.epoch:
                raise Violation(f"{request_id} in {store.name}: record {word} < {stream.epoch}")

    def _pages(self, store: StoreProcess) -> None:
        """No page has two writers; none that may still be written is free, or can be found. The
        writers are asked, the fenced, paused and cut off ones too."""
        owners: dict[int, str] = {}
        pool, index = store.store.state.pool, store.store.state.index
        for worker in self.world.workers:
            if worker.home is not store or not worker.alive:
                continue
            for request_id, blocks in worker.writable().items():
                for block in blocks:
                    who = f"{worker.name} for {request_id}"
                    if block in owners:
                        raise Violation(f"block {block} has two writers: {owners[block]}, {who}")
                    owners[block] = who
                    if store.alive and block in pool.free:
                        raise Violation(f"block {block} is free, and {who} may write it")
                    if store.alive and block in index:
                        raise Violation(f"block {block} can be found, and {who} may write it")

    def called(self, call: CallStore) -> None:
        """Only a death, or silence with a ready successor, gives a decode's stream away."""
        message = call.message
        if call.method != "Reassign":
            return
        state = self.world.scheduler.state
        request = state.requests[call.request_id]
        decodes = message.role == store_pb2.WRITER_ROLE_DECODE
        if not request.awaits("decode" if decodes else "prefill", message.epoch):
            return  # given up in the same breath: the request is being opened anew
        present = state.workers.get(request.decode_worker if decodes else request.prefill_worker)
        refused = ("decode" if decodes else "prefill") in request.left
        if present is not None and present.ready and not refused:
            raise Violation(f"{call.request_id}: taken from {present.worker.name}, which is there")
        if not message.writer:
            return  # the other arena of a prefill
        heir = state.workers.get(message.writer)
        if heir is None or not heir.ready:
            raise Violation(f"{call.request_id}: the epoch changes without a ready successor")

    # --- when all is over ---

    def unquiet(self) -> str:
        """What is still to come, or nothing."""
        world = self.world
        for client in world.clients:
            if not client.over:
                return f"{client.name} has not ended"
        open_now = [r for r, q in world.scheduler.state.requests.items() if not q.done]
        if open_now:
            return f"open at the scheduler: {open_now}"
        for worker in world.workers:
            if not worker.idle():
                return f"{worker.name} is at work"
        for store in world.stores:
            if found := self._left_over(store):
                return f"{store.name}: {found}"
        state = world.scheduler.state
        asked = [pair for pair in state._stops._waiting if pair[1] in state.workers]
        if asked:  # of those who are gone the rest is told to nobody
            return f"unanswered stops: {asked}"
        return "" if world.scheduler.calls.idle() else "calls are under way"

    @staticmethod
    def _left_over(store: StoreProcess) -> str:
        """Pages, leases, records and quarantine, beside the cache."""
        state = store.store.state
        if state.streams:
            return f"{sorted(state.streams)} still open"
        if state.resting_slots:
            return f"records wait: {state.resting_slots}"
        if state.pool.quarantined:
            return f"pages wait: {state.pool.quarantined}"
        if set(state.pool.leases) != set(state.index.keys):
            return f"leased and not cached: {set(state.pool.leases) - set(state.index.keys)}"
        if len(state.pool.free) + state.evictable() != state.pool.total:
            return "pages are neither free nor cached"
        return ""

    def ended_once(self) -> None:
        """In the journal, over all schedulers."""
        ended: dict[str, int] = {}
        for record in self.world.scheduler.disk.written:
            if record.HasField("ended"):
                name = record.ended.request_id
                ended[name] = ended.get(name, 0) + 1
        twice = [name for name, times in ended.items() if times > 1]
        if twice:
            raise Violation(f"ended twice: {twice}")
