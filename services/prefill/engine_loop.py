"""The prefill engine: one thread that computes one prompt at a time, layer group by layer group."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from baton.v1 import control_pb2
from services.engine.backend import Backend, Rows
from services.engine.repair import open_repairs, repair
from services.engine.sampling import sample
from services.kv.arena import Arena
from services.kv.identity import RowIdentity
from services.kv.layout import PAGE_TOKENS, blocks_for
from services.kv.record import StreamRecord
from services.kv.verify import verify_groups
from services.ops import lifecycle, log
from services.ops.errors import BatonError, CorruptKv, LayoutMismatch, StaleEpoch, Unavailable
from services.ops.failpoints import Failpoints
from services.ops.keys import Keys
from services.prefill.config import PrefillConfig
from services.prefill.handoff import (
    Destination,
    Handoff,
    LocalHandoff,
    RemoteHandoff,
    push_of,
)
from services.prefill.state import Chunk, chunks
from services.prefill.transfer import Transfers
from services.wire.messages import finish_reason, refusal, sampling_params
from services.wire.session import hello_of
from services.wire.zmq_medium import ZmqMedium

_logger = log.get("prefill")


class Stopped(Exception):
    """The scheduler has taken the request away."""


@dataclass
class Job:
    """One ExecutePrefill and how it stands. The event loop sets `stop_epoch` and `announce`."""

    command: control_pb2.ExecutePrefill
    announce: str
    stop_epoch: int = 0  # not 0: told to let go of all up to this epoch
    handoff: Handoff | None = None
    ready: list[control_pb2.GroupTime] = field(default_factory=list)
    computed: int = 0
    repaired: list[int] = field(default_factory=list)  # rows of each repaired block


class PrefillEngine:
    """Takes jobs on any thread, runs them on its own; `report` must be safe to call from there."""

    def __init__(
        self, config: PrefillConfig, arena: Arena, backend: Backend,
        report: Callable[[control_pb2.WorkerEvent], None], keys: Keys | None = None,
    ) -> None:  # fmt: skip
        self._keys = keys
        self._config, self._arena, self._backend = config, arena, backend
        self._report = report
        self._fingerprint = bytes.fromhex(arena.plan.fingerprint)
        self._failpoints = Failpoints(config.failpoints, config.name)
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self.jobs: dict[tuple[str, int], Job] = {}  # (request, attempt), until it has ended
        self._announcements = ZmqMedium(config.io_core, keys=keys)
        self._transfers = Transfers(
            ZmqMedium(config.io_core, keys=keys), hello_of(arena.plan), config.io_core,
            config.transfer_patience_ms / 1e3,
        )  # fmt: skip
        self._thread = lifecycle.engine_thread(self._run, "prefill-engine")

    def start(self) -> None:
        self._transfers.start()
        self._thread.start()

    def submit(self, command: control_pb2.ExecutePrefill) -> None:
        """Queues a prefill; a second one for the same attempt is ignored."""
        if any(job.command.attempt >= command.attempt for job in self.of(command.request_id)):
            return
        job = Job(command, command.announce_address)
        self.jobs[command.request_id, command.attempt] = job
        self._jobs.put(job)

    def of(self, request_id: str) -> list[Job]:
        """The jobs of one request that have not ended, oldest first."""
        return [job for (name, _), job in list(self.jobs.items()) if name == request_id]

    def stop(self, request_id: str, epoch: int) -> bool:
        """Ends what this worker does for a request up to `epoch`; the end of it is reported. False
        when there is nothing."""
        mine = [job for job in self.of(request_id) if job.command.attempt <= epoch]
        for job in mine:
            job.stop_epoch = max(job.stop_epoch, epoch)
            if job.handoff is not None:
                job.handoff.cancel()
        return bool(mine)

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join()
        self._transfers.close()
        self._announcements.close()

    def _run(self) -> None:
        while job := self._jobs.get():
            self._failpoints.refresh()
            try:
                self._prefill(job)
            except Stopped:
                self._end(job, None, cancel=True)
            except BatonError as error:
                self._end(job, None if job.stop_epoch else error, cancel=True)
            else:
                self._end(job, None, cancel=False)

    def _end(self, job: Job, error: BatonError | None, *, cancel: bool) -> None:
        """This worker is done with a job once its transfer has ended too; the next one is computed
        meanwhile."""
        if job.handoff is None:
            self._ended(job, error)
        else:
            job.handoff.end(lambda failed: self._ended(job, error or failed), cancel=cancel)
            if job.stop_epoch:  # it came while there was no handoff to cancel
                job.handoff.cancel()

    def _ended(self, job: Job, error: BatonError | None) -> None:
        """On the engine's thread or the transfers'."""
        command = job.command
        if error is not None:
            if not isinstance(error, StaleEpoch):
                _logger.error("prefill failed", request_id=command.request_id, error=error.message)
            self._refuse(command, error)
        del self.jobs[command.request_id, command.attempt]
        stopped = control_pb2.Stopped(
            request_id=command.request_id, epoch=max(command.attempt, job.stop_epoch)
        )
        self._report(control_pb2.WorkerEvent(stopped=stopped))

    def _refuse(self, command: control_pb2.ExecutePrefill, error: BatonError) -> None:
        if isinstance(error, LayoutMismatch):  # no other worker could do better
            error = BatonError(error.message)
        self._report(refusal(command.request_id, command.attempt, error))

    def _prefill(self, job: Job) -> None:
        if job.stop_epoch:
            raise Stopped
        command = job.command
        record = StreamRecord(self._arena, command.slot)
        attempt, done = record.first()
        if attempt != command.attempt:
            raise StaleEpoch(f"attempt: {command.attempt} has been fenced by {attempt}")
        job.handoff = handoff = self._handoff(job, record)
        prompt = record.number("prompt_tokens")
        if done:
            self._hand_over_again(job, handoff, record)
            return
        tokens = np.array(record.tokens[:prompt])
        identity = RowIdentity(record.root, tokens, prompt)
        blocks = np.array(record.prefill_table[: blocks_for(prompt)])
        table = self._arena.table(blocks)
        start = self._inherit(job, record, tokens, identity, blocks)
        if start > record.ready_tokens() or isinstance(handoff, RemoteHandoff):
            for group in range(self._arena.layout.groups if start else 0):
                handoff.ready(group, start)  # repaired, or cached here and lacking over there
        later: list[tuple[int, int]] = []
        for chunk in chunks(start, prompt, self._config.chunk_tokens):
            self._compute(job, handoff, chunk, tokens, table, identity, later)
        for group, upto in later:
            handoff.ready(group, upto)
        self._check(blocks, identity, start, prompt)
        self._first_token(job, handoff, prompt, record)

    def _inherit(
        self, job: Job, record: StreamRecord, tokens: np.ndarray, identity: RowIdentity,
        blocks: np.ndarray,
    ) -> int:  # fmt: skip
        """Verifies what is cached or another attempt's, and computes again which of these blocks were
        found damaged before. Gives the token from which this attempt computes."""
        plan = record.plan().copy()
        start = max(record.ready_tokens(), int(plan["prefill_start"]))
        todo = open_repairs(self._arena, plan["repair_source"], blocks, start)
        skip = frozenset(part.index for part in todo)
        verify_groups(self._arena, blocks, identity, 0, start, skip=skip)
        for part in todo:
            rows = repair(self._backend, self._arena, identity, tokens, blocks, part)
            job.repaired.append(rows)
        return start

    def _check(self, blocks: np.ndarray, identity: RowIdentity, start: int, end: int) -> None:
        """Before anything is said about the prompt: what attention has read is still what was stored.
        Rows that this attempt has computed after a damaged one may come of it."""
        try:
            verify_groups(self._arena, blocks, identity, 0, end)
        except CorruptKv as error:
            inherited = [block for block in error.blocks if block * PAGE_TOKENS < start]
            resume_at = start if inherited else error.blocks[0] * PAGE_TOKENS
            raise CorruptKv(error.message, inherited, resume_at) from None

    def _hand_over_again(self, job: Job, handoff: Handoff, record: StreamRecord) -> None:
        """This attempt had finished here; whoever asks again may lack its pages or its report."""
        prompt = record.number("prompt_tokens")
        for group in range(self._arena.layout.groups):
            handoff.ready(group, prompt)
        handoff.first(int(record.tokens[prompt]), float(record.logprobs[prompt]))
        self._report_done(job, record, already_done=True)

    def _handoff(self, job: Job, record: StreamRecord) -> Handoff:
        command = job.command
        local = LocalHandoff(record, command.attempt, self._fingerprint, self._announcements.notify)
        if not command.ingest_address:
            if command.remote_attempt:  # announced here, it would never be seen there
                raise Unavailable(
                    "ingest_address: decode's store is not known to the scheduler yet"
                )
            local.announce = job.announce
            return local
        source = command.source_address if self._config.transfer == "pull" else ""
        to = Destination(
            command.ingest_address, command.remote_slot, command.remote_attempt, source
        )
        push = push_of(record, command.attempt, to)
        handoff = RemoteHandoff(local, push, to, self._transfers)
        handoff.announce = job.announce
        return handoff

    def _compute(
        self, job: Job, handoff: Handoff, chunk: Chunk, tokens: np.ndarray, table: np.ndarray,
        identity: RowIdentity, later: list[tuple[int, int]],
    ) -> None:  # fmt: skip
        """One chunk through all layer groups; each group's pages are complete and announced before
        the next one starts."""
        positions = np.arange(chunk.begin, chunk.end, dtype=np.int32)
        rows = Rows(
            tokens[chunk.begin : chunk.end], positions, np.zeros(len(positions), np.int32),
            table[None],
        )  # fmt: skip
        self._backend.begin(rows)
        job.computed += len(positions)
        seeds = identity.seeds[chunk.begin : chunk.end]
        in_page = positions % PAGE_TOKENS
        for group in range(self._arena.layout.groups):
            self._backend.run_group(group)
            job.ready.append(
                control_pb2.GroupTime(group=group, tokens=chunk.end, at=time.monotonic())
            )
            pages = table[positions // PAGE_TOKENS, group]
            self._arena.native.stamp_rows(pages, in_page, seeds, group)
            self._seal(chunk, table, group, identity)
            if job.stop_epoch:
                raise Stopped
            self._failpoints.hit("prefill.mid_layer", group)
            if group == self._arena.layout.groups // 2:
                self._failpoints.hit("prefill.mid_chunk", chunk.begin)
            handoff.announce = job.announce
            if self._config.stream == "layers":
                handoff.ready(group, chunk.end)
            elif chunk.end == len(tokens):
                later.append((group, chunk.end))

    def _seal(self, chunk: Chunk, table: np.ndarray, group: int, identity: RowIdentity) -> None:
        for block in range(chunk.begin // PAGE_TOKENS, chunk.end // PAGE_TOKENS):
            page = int(table[block, group])
            self._arena.native.seal(page, group, PAGE_TOKENS, identity.key(block))

    def _first_token(self, job: Job, handoff: Handoff, prompt: int, record: StreamRecord) -> None:
        command = job.command
        last = np.array([len(self._last_rows(prompt, job)) - 1], np.int32)
        logits = self._backend.logits(last)[0]
        token, logprob = sample(logits, sampling_params(command.sampling), prompt)
        self._failpoints.hit("handoff.before_first")
        handoff.first(token, logprob)
        self._failpoints.hit("handoff.after_first")
        self._report_done(job, record, already_done=False)

    def _report_done(self, job: Job, record: StreamRecord, already_done: bool) -> None:
        command, prompt = job.command, record.number("prompt_tokens")
        first = control_pb2.Token(
            index=record.number("first_index"), token_id=int(record.tokens[prompt]),
            logprob=float(record.logprobs[prompt]),
        )  # fmt: skip
        done = control_pb2.PrefillDone(
            request_id=command.request_id, attempt=command.attempt, first=first,
            computed_tokens=job.computed, kv_bytes=job.computed * self._arena.layout.token_bytes,
            last_layer_at=job.ready[-1].at if job.ready else time.monotonic(),
            finish=finish_reason(first.token_id, first.index, command.sampling), ready=job.ready,
            already_done=already_done, repaired_blocks=len(job.repaired),
            repaired_tokens=sum(job.repaired),
        )  # fmt: skip
        self._report(control_pb2.WorkerEvent(prefill_done=done))

    def _last_rows(self, prompt: int, job: Job) -> range:
        """The rows of the last pass."""
        chunk = self._config.chunk_tokens
        begin = max(prompt - job.computed, (prompt - 1) // chunk * chunk)
        return range(begin, prompt)
