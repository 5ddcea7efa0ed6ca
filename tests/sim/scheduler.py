"""The scheduler process: the real `SchedulerState` under the real `Scheduler`, without its sockets.

Its journal is bytes that outlive it, the last record torn if it died in the midst of writing; its
calls to the stores follow `services/scheduler/stores.py`; clients and workers come over the network.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

from baton.v1 import control_pb2, inference_pb2, journal_pb2, store_pb2
from policies.placement import LeastLoaded
from services.ops.errors import BatonError
from services.ops.failpoints import Failpoints
from services.scheduler import journal
from services.scheduler.config import SchedulerConfig
from services.scheduler.request import CallStore
from services.scheduler.runtime import EPOCH_ZERO_UNIX_S, Scheduler
from services.scheduler.state import SchedulerState
from services.scheduler.text import TextStream
from tests.sim.hub import Died, Hub, Process
from tests.sim.net import End, Link, Net
from tests.sim.store import StoreProcess, identity

TICK_S = 0.05
WATCH_S = 0.05
RENEW_S = 0.2
_RETRY_S = (0.01, 0.02, 0.05, 0.1)


class JournalFile:
    """What lies on disk. `torn` tells how much of the next write gets there before the process dies."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.torn: float | None = None
        self.written: list[journal_pb2.JournalRecord] = []  # all that ever was, whole
        self.path = self

    def exists(self) -> bool:
        return True

    def stat(self) -> SimpleNamespace:
        return SimpleNamespace(st_size=len(self.data))

    def read_bytes(self) -> bytes:
        return bytes(self.data)

    def append(self, records: Iterable[journal_pb2.JournalRecord]) -> None:
        new = list(records)
        frames = b"".join(map(journal.frame, new))
        if not frames:
            return
        if self.torn is not None:
            share, self.torn = self.torn, None
            self.data += frames[: int(len(frames) * share)]
            raise Died("torn")
        self.data += frames
        self.written += new

    def rewrite(self, records: Iterable[journal_pb2.JournalRecord]) -> None:
        self.data = bytearray(b"".join(map(journal.frame, records)))


class Calls:
    """As `Stores`: in order per request and store, retried while a store is away."""

    def __init__(self, process: SchedulerProcess, stores: list[StoreProcess], net: Net) -> None:
        self._process, self._net = process, net
        self._stores = {store.store_id: store for store in stores}
        self._queues: dict[tuple[str, str], deque[CallStore]] = {}

    def call(self, call: CallStore) -> None:
        self._process.asked(call)
        queue = self._queues.setdefault((call.request_id, call.store_id), deque())
        queue.append(call)
        if len(queue) == 1:
            self._next(queue, 0)

    def _next(self, queue: deque[CallStore], failures: int) -> None:
        call = queue[0]
        store = self._stores[call.store_id]

        def replied(reply: Any, code: str, message: str) -> None:
            if code in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):
                pause = _RETRY_S[min(failures, len(_RETRY_S) - 1)]
                self._process.after(pause, lambda: self._next(queue, failures + 1))
                return
            core = self._process.core
            self._process.guarded(lambda: core._store_replied(call, reply, code, message))
            if not self._process.alive:
                return
            queue.popleft()
            if queue:
                self._next(queue, 0)
            else:
                self._queues.pop((call.request_id, call.store_id), None)

        self._net.call(
            self._process, store, lambda: store.serve(call.method, call.message), replied
        )

    def idle(self) -> bool:
        return not self._queues


class Reader:
    """A client's stream: what it has been told, and its end of the link."""

    def __init__(self, request_id: str, at: int) -> None:
        self.request_id, self.at = request_id, at
        self.link: Link | None = None
        self.end: End | None = None
        self.changed = True

    def set(self) -> None:
        self.changed = True


class SchedulerProcess(Process):
    """One scheduler after another, over one journal."""

    def __init__(self, hub: Hub, stores: list[StoreProcess], net: Net, **options: Any) -> None:
        super().__init__(hub, "scheduler")
        self.net, self.stores = net, stores
        self.config = SchedulerConfig(
            heartbeat_ms=200,
            suspect_ms=700,
            recover_grace_ms=400,
            lost_ms=hub.rng.choice([1200, 3000]),
            **options,
        )
        self.disk = JournalFile()
        self.core: Scheduler
        self.asked: Callable[[CallStore], None] = lambda call: None
        self.start()

    @property
    def state(self) -> SchedulerState:
        return self.core.state

    def begin(self) -> None:
        core = self.core = Scheduler.__new__(Scheduler)
        core.config, core.identity = self.config, identity()
        core.failpoints = Failpoints("", self.name)
        first = int(self.hub.unix_s) - EPOCH_ZERO_UNIX_S
        core.state = SchedulerState(self.config, LeastLoaded(), first, self._text)
        core._links, core._readers = {}, {}
        core._compacted_at = 0.0
        core._journal = self.disk  # type: ignore[assignment]
        self.calls = Calls(self, self.stores, self.net)
        core.stores = self.calls  # type: ignore[assignment]
        self._readers: list[Reader] = []
        self._workers: dict[str, tuple[Any, Link, End]] = {}
        core._recover()
        self.after(TICK_S, self._tick)
        self.after(self.net.delay(), self._watch)
        for store in self.stores:
            self.after(RENEW_S, lambda store=store: self._renew(store))

    def ended(self) -> None:
        self.net.gone(self)

    def _text(self, body: inference_pb2.GenerateRequest) -> TextStream:
        return TextStream(lambda token: f"<{token}>", list(body.sampling.stop))

    # --- time ---

    def _tick(self) -> None:
        self.guarded(lambda: self.core.run(self.state.tick(self.hub.now)))
        self.core._compact(self.hub.now)
        if self.hub.chance(0.02):
            self.disk.rewrite(self.state.journal())
        self.after(TICK_S, self._tick)

    def _watch(self) -> None:
        """Asks the stores what they are, until all have answered."""
        known = dict(self.state.ingest)
        for store in self.stores:
            if store.store_id not in known and store.runs and not self.net.parted(self, store):
                known[store.store_id] = store.address
        if known != self.state.ingest:
            self.guarded(lambda: self.core.stores_changed(known, set()))
        if len(known) < len(self.stores):
            self.after(WATCH_S, self._watch)

    def _renew(self, store: StoreProcess) -> None:
        """As `Stores.renew`: keeps the leases of all open streams."""
        wanted = self.state.open_streams().get(store.store_id, {})
        self.after(RENEW_S, lambda: self._renew(store))
        if store.store_id not in self.state.ingest:
            return

        def replied(reply: Any, code: str, message: str) -> None:
            if reply is not None and reply.unknown:
                lost = {request_id: wanted[request_id] for request_id in reply.unknown}
                lose = self.state.streams_lost
                self.guarded(lambda: self.core.run(lose(self.hub.now, store.store_id, lost)))
            if reply is not None and self.alive:
                hear = self.state.writers_awaited
                self.guarded(lambda: self.core.run(hear(reply.awaited)))

        message = store_pb2.RenewRequest(request_ids=wanted)
        self.net.call(self, store, lambda: store.serve("Renew", message), replied)

    def guarded(self, act: Any) -> Any:
        """An event; one that ends in the midst of a journal write ends the process."""
        try:
            return act()
        except Died:
            self.hub.counts["journal torn"] += 1
            self.kill()
            return None

    # --- workers ---

    def accept_worker(self, link: Link) -> End:
        state: dict[str, Any] = {}

        def take(event: control_pb2.WorkerEvent) -> None:
            if event.HasField("register"):
                worker_id = state["id"] = event.register.worker.worker_id
                queue = state["queue"] = self.guarded(lambda: self.core.attach(event.register))
                if queue is not None:
                    self._workers[worker_id] = (queue, link, end)
            elif "id" in state:
                self.guarded(lambda: self.core.heard(state["id"], event))

        def closed() -> None:
            if state.get("queue") is None:
                return
            kept = self._workers.get(state["id"])
            if kept and kept[1] is link:
                del self._workers[state["id"]]
            self.guarded(lambda: self.core.detach(state["id"], state["queue"]))

        end = End(self, take, closed)
        return end

    # --- clients ---

    def accept_client(self, link: Link) -> End:
        reader: list[Reader] = []

        def take(message: tuple[Any, ...]) -> None:
            try:
                found = self.guarded(lambda: self._follow(message))
            except BatonError as error:
                link.send(end, ("error", error.code, error.message))
                return
            if found is not None:
                found.link, found.end = link, end
                reader.append(found)

        def closed() -> None:
            for one in reader:
                self._left(one)

        end = End(self, take, closed)
        return end

    def _follow(self, message: tuple[Any, ...]) -> Reader:
        """As `Scheduler.generate` and `follow`."""
        if message[0] == "generate":
            _, body, prompt, sampling, deadline_s = message
            if not self.state.same_body(body):
                self.core.run(
                    self.state.accept(
                        self.hub.now,
                        int(self.hub.unix_s * 1000),
                        body,
                        prompt,
                        sampling,
                        deadline_s,
                    )
                )
            reader = Reader(body.request_id, 0)
        else:
            reader = Reader(message[1], message[2])
        self.state.find(reader.request_id)
        self.state.reader_joined(reader.request_id)
        self.core._readers.setdefault(reader.request_id, []).append(reader)  # type: ignore[arg-type]
        self._readers.append(reader)
        return reader

    def _left(self, reader: Reader) -> None:
        if reader not in self._readers:
            return
        self._readers.remove(reader)
        self.core._readers[reader.request_id].remove(reader)  # type: ignore[arg-type]
        state = self.state
        self.guarded(lambda: self.core.run(state.reader_left(self.hub.now, reader.request_id)))

    def cancel(self, request_id: str) -> tuple[Any, str, str]:
        try:
            self.guarded(lambda: self.core.cancel(request_id))
        except BatonError as error:
            return None, error.code, error.message
        return True, "OK", ""

    # --- after each event ---

    def flush(self) -> None:
        """What has been said goes out."""
        for queue, link, end in self._workers.values():
            while not queue.empty():
                link.send(end, queue.get_nowait())
        for reader in [r for r in self._readers if r.changed and r.link is not None]:
            reader.changed = False
            request = self.state.requests.get(reader.request_id)
            if request is None or reader.link is None or reader.end is None:
                continue
            while reader.at < len(request.events):
                reader.link.send(reader.end, request.events[reader.at])
                reader.at += 1
            if request.final is not None:
                reader.link.send(reader.end, request.final)
                self._left(reader)
