"""The scheduler at work: gives `state.py` its events and carries out what it says."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from baton.v1 import cluster_pb2, control_pb2, inference_pb2, store_pb2
from policies.placement import LeastLoaded
from services.engine.identity import ModelIdentity
from services.ops import log
from services.ops.errors import InvalidRequest, LayoutMismatch
from services.ops.failpoints import Failpoints
from services.ops.keys import Keys
from services.scheduler import journal, validate
from services.scheduler.config import SchedulerConfig
from services.scheduler.request import CallStore, Instruction, Notify, Send, Write
from services.scheduler.state import SchedulerState
from services.scheduler.stores import Stores
from services.scheduler.text import TextStream

_logger = log.get("scheduler")
TICK_S = 0.02
IDLE_TICK_S = 0.1  # while nobody waits for anything
EPOCH_ZERO_UNIX_S = 1_700_000_000  # a lost journal must not make epochs go backwards
JOURNAL_COMPACT_BYTES = 16 << 20
COMPACT_S_MIN = 0.5  # between two compactions: each writes all that is known and waits for the disk


class Scheduler:
    """One event loop's worth of scheduler. Every method runs on that loop."""

    def __init__(
        self, config: SchedulerConfig, identity: ModelIdentity, address: str,
        keys: Keys | None = None,
    ) -> None:  # fmt: skip
        self.config, self.identity, self.address = config, identity, address
        self.model = config.model_name or Path(config.model).resolve().name
        self.failpoints = Failpoints(config.failpoints, config.name)
        self._tokenizer = Tokenizer.from_file(str(Path(config.model) / "tokenizer.json"))
        self.limits = validate.Limits(
            self.model, identity.config.vocab_size, identity.config.max_context,
            identity.config.eos_token_ids,
        )  # fmt: skip
        self.state = SchedulerState(
            config, LeastLoaded(), int(time.time()) - EPOCH_ZERO_UNIX_S, self._text
        )
        self._links: dict[str, asyncio.Queue[control_pb2.WorkerCommand | None]] = {}
        self._readers: dict[str, list[asyncio.Event]] = {}
        self._accepted = asyncio.Event()  # a request, which nothing may keep waiting
        self._compacted_at = 0.0
        self._journal = journal.Journal(Path(config.journal_dir), config.journal_fsync)
        self.stores = Stores(config.stores, identity.fingerprint, self._store_replied, keys)
        self._recover()

    def _recover(self) -> None:
        records = list(journal.read(self._journal.path))
        self.state.recover(time.monotonic(), _unix_ms(), records)
        self._journal.rewrite(self.state.journal())
        if self.state.requests:
            _logger.info("journal taken up", requests=len(self.state.requests))

    def _text(self, body: inference_pb2.GenerateRequest) -> TextStream:
        stream = DecodeStream(skip_special_tokens=True)
        return TextStream(
            lambda token: stream.step(self._tokenizer, token) or "", list(body.sampling.stop)
        )

    # --- clients ---

    async def generate(
        self, body: inference_pb2.GenerateRequest, deadline_s: float | None
    ) -> AsyncIterator[inference_pb2.GenerateEvent]:
        """Starts a request or attaches to it; gives its events from the first on."""
        validate.check_request_id(body.request_id)
        if not self.state.same_body(body):
            try:
                prompt = validate.prompt_ids(body, self.limits, self._encode)
                sampling = validate.resolve(body, prompt, self.limits, lambda: secrets.randbits(63))
            except InvalidRequest:
                self.state.counts.refused += 1
                raise
            self.failpoints.refresh()
            self.run(
                self.state.accept(time.monotonic(), _unix_ms(), body, prompt, sampling, deadline_s)
            )
            self._accepted.set()
        async for event in self.follow(body.request_id, 0):
            yield event

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    async def follow(
        self, request_id: str, from_index: int
    ) -> AsyncIterator[inference_pb2.GenerateEvent]:
        """A request's events from a token index on, then live, then its final event."""
        request = self.state.find(request_id)
        self.state.reader_joined(request_id)
        changed = asyncio.Event()
        self._readers.setdefault(request_id, []).append(changed)
        at = from_index
        try:
            while True:
                changed.clear()
                while at < len(request.events):
                    yield request.events[at]
                    at += 1
                if request.final is not None:
                    yield request.final
                    return
                await changed.wait()
        finally:
            self._readers[request_id].remove(changed)
            if not self._readers[request_id]:
                del self._readers[request_id]
            self.run(self.state.reader_left(time.monotonic(), request_id))

    def cancel(self, request_id: str) -> bool:
        was_running = not self.state.find(request_id).done
        self.run(self.state.cancel(time.monotonic(), request_id, "cancelled by the client"))
        return was_running

    # --- workers ---

    def attach(
        self, register: control_pb2.Register
    ) -> asyncio.Queue[control_pb2.WorkerCommand | None]:
        """A worker's commands, in order. Raises LayoutMismatch when it serves another model."""
        worker = register.worker
        if register.fingerprint != self.identity.fingerprint:
            raise LayoutMismatch(
                f"fingerprint: worker {worker.name} has {register.fingerprint}, "
                f"this cluster {self.identity.fingerprint}"
            )
        commands: asyncio.Queue[control_pb2.WorkerCommand | None] = asyncio.Queue()
        self._links[worker.worker_id] = commands
        welcome = control_pb2.Welcome(scheduler_generation=1)
        commands.put_nowait(control_pb2.WorkerCommand(welcome=welcome))
        _logger.info("worker attached", name=worker.name, pid=worker.pid)
        self.run(self.state.worker_registered(time.monotonic(), register))
        return commands

    def detach(
        self, worker_id: str, commands: asyncio.Queue[control_pb2.WorkerCommand | None]
    ) -> None:
        if self._links.get(worker_id) is not commands:
            return
        del self._links[worker_id]
        self.failpoints.refresh()
        self.failpoints.hit("scheduler.worker_lost")
        _logger.warning("worker lost", name=self.state.names.get(worker_id, worker_id))
        self.run(self.state.worker_lost(time.monotonic(), worker_id))

    def heard(self, worker_id: str, event: control_pb2.WorkerEvent) -> None:
        now = time.monotonic()
        self.run(self.state.worker_heard(now, worker_id))
        kind = event.WhichOneof("event")
        if kind == "heartbeat":
            self.state.beat(worker_id, event.heartbeat)
        elif kind == "step":
            self.run(self.state.step_reported(now, worker_id, event.step))
        elif kind == "prefill_done":
            self.run(self.state.prefill_done(now, worker_id, event.prefill_done))
        elif kind == "decode_started":
            self.state.decode_started(worker_id, event.decode_started)
        elif kind == "stopped":
            self.run(self.state.stopped(now, worker_id, event.stopped))
        elif kind == "refused":
            self.run(self.state.refused(now, worker_id, event.refused))

    # --- stores and time ---

    def _store_replied(self, call: CallStore, reply: Any, code: str, message: str) -> None:
        self.run(self.state.store_replied(time.monotonic(), call, reply, code, message))

    def stores_changed(self, ingest: dict[str, str], returned: set[str]) -> None:
        self.run(self.state.stores_changed(ingest, returned))

    async def renew(self) -> None:
        """Keeps the leases of all streams that are open in the stores."""

        def lost(store: str, streams: dict[str, int]) -> None:
            _logger.warning(
                "streams are not known to their store", store=store, requests=[*streams]
            )
            self.run(self.state.streams_lost(time.monotonic(), store, streams))

        def awaited(writers: Sequence[store_pb2.Awaited]) -> None:
            self.run(self.state.writers_awaited(writers))

        await self.stores.renew(self.state.open_streams, lost, awaited)

    async def tick(self) -> None:
        """The clock of everything that waits for time to pass."""
        while True:
            self.run(self.state.tick(time.monotonic()))
            self._compact(time.monotonic())
            if not self.state.idle:
                await asyncio.sleep(TICK_S)
                continue
            self._accepted.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(IDLE_TICK_S):
                    await self._accepted.wait()

    def _compact(self, now: float) -> None:
        """Drops the rows of forgotten requests, as soon as these outnumber the known ones: the journal
        stays within twice what is known, and empties when nothing is."""
        if not self.state.forgotten:
            return
        if "journal" in self.config.unsafe:
            return  # control: rows stay
        outnumber = self.state.forgotten > len(self.state.requests)
        big = self._journal.path.stat().st_size > JOURNAL_COMPACT_BYTES
        if (outnumber or big) and now - self._compacted_at >= COMPACT_S_MIN:
            self._compacted_at = now
            self._journal.rewrite(self.state.journal())
            self.state.forgotten = 0

    def run(self, instructions: Iterable[Instruction]) -> None:
        """Carries out instructions: first everything is journaled, then the rest happens."""
        todo = list(instructions)
        self._journal.append(i.record for i in todo if isinstance(i, Write))
        for instruction in todo:
            if isinstance(instruction, Send):
                commands = self._links.get(instruction.worker_id)
                if commands is not None:
                    commands.put_nowait(instruction.command)
            elif isinstance(instruction, CallStore):
                self.stores.call(instruction)
            elif isinstance(instruction, Notify):
                for changed in self._readers.get(instruction.request_id, ()):
                    changed.set()

    async def view(self, pid: int) -> cluster_pb2.ClusterView:
        view = self.state.cluster_view(await self.stores.pages())
        view.requests.readers = sum(map(len, self._readers.values()))
        view.model, view.scheduler_pid, view.scheduler_address = self.model, pid, self.address
        return view

    async def close(self) -> None:
        await self.stores.close()
        self._journal.close()


def _unix_ms() -> int:
    return int(time.time() * 1000)
