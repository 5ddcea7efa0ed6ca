"""Prefill and decode processes: the real engines, on greenlets, with the tiny model; the real words in
a real arena; a link to the scheduler that follows `services/wire/link.py`."""

from __future__ import annotations

import os
from typing import Any

from baton.v1 import control_pb2
from services.decode.__main__ import DecodeWorker
from services.decode.config import DecodeConfig
from services.decode.engine_loop import DecodeEngine
from services.decode.stream import Report, as_event
from services.kv import locks
from services.kv.worker import ArenaHold
from services.prefill.__main__ import PrefillWorker
from services.prefill.config import PrefillConfig
from services.prefill.engine_loop import PrefillEngine
from tests.sim.hub import Died, Event, Hub, Process, Queue, Thread, current
from tests.sim.medium import Wires
from tests.sim.model import GROUP_S, TinyBackend
from tests.sim.net import Link, Net
from tests.sim.store import Points, StoreProcess, identity

BEAT_S = 0.2
RETRY_S = (0.02, 0.05, 0.1, 0.2)
PREFILL, DECODE = "prefill", "decode"


class WorkerProcess(Process):
    """One worker; every life of it has an id of its own."""

    role = ""

    def __init__(
        self, hub: Hub, name: str, home: StoreProcess, scheduler: Any, net: Net, wires: Wires
    ) -> None:
        super().__init__(hub, name)
        self.home, self.net, self.wires = home, net, wires
        self._scheduler = scheduler
        self.id = ""
        self.doomed = ""  # what is to happen at the next point within the engine: kill or pause
        self.start()

    def begin(self) -> None:
        self.id = f"{self.hub.rng.getrandbits(128):032x}"
        self._lock = locks.hold(self.home.directory, self.id)
        self.hold = ArenaHold(self.id, self.home.arena, identity(), self._lock)
        self.backend = TinyBackend(self.home.arena, self._computes, self._mine)
        self.worker: Any = self._build()
        self.attached = False
        self._failures = 0
        self._link: Link | None = None
        for thread in self.threads:
            thread.go()
        self.after(self.net.delay(), self._dial)
        self.after(BEAT_S, self._beat)

    def _build(self) -> Any:
        raise NotImplementedError

    def _threaded(self, engine: Any) -> Thread:
        engine._failpoints = Points(lambda point: self._point())
        self.threads = [Thread(self, engine._run)]
        return self.threads[0]

    def ended(self) -> None:
        os.close(self._lock)
        for thread in self.threads:
            thread.drop()
        self.net.gone(self)

    def _mine(self, block: int) -> bool:
        """Blocks that the store has given to this prefill; a decode's are asked of its streams."""
        return self.role == PREFILL and self.home.store.state.pool.writers.get(block) == self.id

    # --- within the engine ---

    def _computes(self, group: int) -> None:
        current().sleep(GROUP_S)
        self._point()

    def _point(self) -> None:
        """Here it may die or be paused in the midst of its work."""
        what, self.doomed = self.doomed, ""
        if what == "kill":
            self.hub.counts[f"{self.role} killed within a step"] += 1
            self.after(0.0, lambda: self.kill() if self.alive else None)
            current().sleep(3600.0)
            raise Died
        if what == "pause":
            self.hub.counts[f"{self.role} paused within a step"] += 1
            self.pause()
            self.hub.after(self.hub.rng.uniform(0.1, 3.0), self._continue, self)
            current().sleep(0.0)

    def _continue(self) -> None:
        """Reached only when it is not paused any more."""

    # --- the link ---

    def _dial(self) -> None:
        server = self._scheduler
        self._link, self._end = self.net.connect(
            self, server, server.accept_worker, self._command, self._closed
        )
        self._link.send(self._end, control_pb2.WorkerEvent(register=self.worker.register()))

    def _closed(self) -> None:
        self._failures = 0 if self.attached else self._failures + 1
        self.attached, self._link = False, None
        self.after(RETRY_S[min(self._failures, 3)], self._dial)

    def _command(self, command: control_pb2.WorkerCommand) -> None:
        if command.WhichOneof("command") == "welcome":
            self.attached = True
            return
        self.worker.command(command)

    def report(self, event: control_pb2.WorkerEvent) -> None:
        """Without a scheduler it is dropped, since the records hold the truth."""
        self.tell(f"says {' '.join(str(event).split())[:160]}")
        if self.attached and self._link is not None:
            self._link.send(self._end, event)

    def _beat(self) -> None:
        if self._link is not None:
            self._link.send(self._end, control_pb2.WorkerEvent(heartbeat=control_pb2.Heartbeat()))
        self.after(BEAT_S, self._beat)

    # --- what it may write ---

    def writable(self) -> dict[str, set[int]]:
        """Blocks of its own arena, by request."""
        raise NotImplementedError

    def idle(self) -> bool:
        raise NotImplementedError


class PrefillProcess(WorkerProcess):
    role = PREFILL

    def _build(self) -> PrefillWorker:
        transfer = self.hub.rng.choice(["push", "push", "pull"])
        config = PrefillConfig(name=self.name, chunk_tokens=64, transfer=transfer)
        worker = PrefillWorker.__new__(PrefillWorker)
        worker._settings, worker._hold = config, self.hold
        self.wires.starting = self
        engine = PrefillEngine(config, self.home.arena, self.backend, self.report)
        worker.engine, worker._report = engine, self.report  # type: ignore[method-assign]
        thread = self._threaded(engine)
        sender = engine._transfers._sender
        sender._clock = sender.client._clock = lambda: self.hub.now
        self.threads.append(Thread(self, engine._transfers._run))
        engine._jobs = Queue(thread, self.backend.writing.clear)  # type: ignore[assignment]
        self.engine = engine
        return worker

    def writable(self) -> dict[str, set[int]]:
        return {"a prefill": self.backend.writing} if self.backend.writing else {}

    def idle(self) -> bool:
        return not self.engine.jobs


class DecodeProcess(WorkerProcess):
    role = DECODE

    def begin(self) -> None:
        self.address = f"tcp://{self.name}/{self.life}"
        super().begin()
        self.wires.wakes[self.address] = (self, self.engine.announced)

    def ended(self) -> None:
        del self.wires.wakes[self.address]
        super().ended()

    def _build(self) -> DecodeWorker:
        config = DecodeConfig(name=self.name, batch_max=3)
        worker = DecodeWorker.__new__(DecodeWorker)
        worker._settings, worker._hold, worker._address = config, self.hold, self.address
        engine = DecodeEngine(config, self.home.arena, self.backend, self._report)
        worker.engine, worker._report = engine, self._report  # type: ignore[method-assign]
        engine._wake = Event(self._threaded(engine))  # type: ignore[assignment]
        self.engine = engine
        return worker

    def _report(self, report: Report) -> None:
        self.report(as_event(report))

    def writable(self) -> dict[str, set[int]]:
        return {
            request_id: set(stream.table[stream.position // 64 :, 0].tolist())
            for request_id, stream in self.engine._batch.active.items()
            if len(stream.table)
        }

    def idle(self) -> bool:
        return not self.engine._batch.all() and not self.engine.running


WORKERS: dict[str, type[WorkerProcess]] = {PREFILL: PrefillProcess, DECODE: DecodeProcess}
