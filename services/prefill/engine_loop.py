"""The prefill engine: one thread that computes one prompt at a time, layer group by layer group."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from baton.v1 import control_pb2
from services.engine.backend import Backend, Rows
from services.engine.sampling import sample
from services.kv.arena import Arena
from services.kv.identity import RowIdentity
from services.kv.layout import PAGE_TOKENS, blocks_for
from services.kv.record import StreamRecord
from services.kv.verify import verify_rows
from services.ops import lifecycle, log
from services.ops.errors import BatonError, StaleEpoch
from services.ops.failpoints import Failpoints
from services.prefill.config import PrefillConfig
from services.prefill.handoff import Handoff, LocalHandoff, RemoteHandoff, Sockets
from services.prefill.state import Chunk, chunks
from services.wire.messages import finish_reason, refusal, sampling_params

_logger = log.get("prefill")


class Stopped(Exception):
    """The scheduler has taken the request away."""


@dataclass
class Job:
    """One ExecutePrefill and how it stands. The event loop sets `stop_epoch` and `announce`."""

    command: control_pb2.ExecutePrefill
    announce: str
    stop_epoch: int = 0  # not 0: told to let go of all up to this epoch
    ready: list[control_pb2.GroupTime] = field(default_factory=list)
    computed: int = 0


class PrefillEngine:
    """Takes jobs on any thread, runs them on its own; `report` must be safe to call from there."""

    def __init__(
        self, config: PrefillConfig, arena: Arena, backend: Backend,
        report: Callable[[control_pb2.WorkerEvent], None],
    ) -> None:  # fmt: skip
        self._config, self._arena, self._backend = config, arena, backend
        self._report = report
        self._fingerprint = bytes.fromhex(arena.plan.fingerprint)
        self._failpoints = Failpoints(config.failpoints, config.name)
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self.jobs: dict[tuple[str, int], Job] = {}  # (request, attempt), until it has ended
        self._thread = lifecycle.engine_thread(self._run, "prefill-engine")

    def start(self) -> None:
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
        return bool(mine)

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        sockets = Sockets(self._config.io_core)
        while job := self._jobs.get():
            self._failpoints.refresh()
            command = job.command
            try:
                self._prefill(job, sockets)
            except Stopped:
                pass
            except StaleEpoch as error:
                self._refuse(command, error)
            except BatonError as error:
                _logger.error("prefill failed", request_id=command.request_id, error=error.message)
                self._refuse(command, error)
            del self.jobs[command.request_id, command.attempt]
            stopped = control_pb2.Stopped(
                request_id=command.request_id, epoch=max(command.attempt, job.stop_epoch)
            )
            self._report(control_pb2.WorkerEvent(stopped=stopped))
        sockets.close()

    def _refuse(self, command: control_pb2.ExecutePrefill, error: BatonError) -> None:
        self._report(refusal(command.request_id, command.attempt, error))

    def _prefill(self, job: Job, sockets: Sockets) -> None:
        if job.stop_epoch:
            raise Stopped
        command = job.command
        record = StreamRecord(self._arena, command.slot)
        attempt, done = record.first()
        if attempt != command.attempt:
            raise StaleEpoch(f"attempt: {command.attempt} has been fenced by {attempt}")
        handoff = self._handoff(job, record, sockets)
        prompt = record.number("prompt_tokens")
        if done:
            self._hand_over_again(job, handoff, record)
            return
        tokens = np.array(record.tokens[:prompt])
        identity = RowIdentity(record.root, tokens, prompt)
        blocks = np.array(record.prefill_table[: blocks_for(prompt)])
        table = self._arena.table(blocks)
        start = record.ready_tokens()
        for group in range(self._arena.layout.groups):  # cached, or another attempt's
            verify_rows(self._arena, blocks, identity, group, 0, start)
        if isinstance(handoff, RemoteHandoff) and start:
            for group in range(self._arena.layout.groups):
                handoff.ready(group, start)  # what this arena had cached and the other lacks
        later: list[tuple[int, int]] = []
        for chunk in chunks(start, prompt, self._config.chunk_tokens):
            self._compute(job, handoff, chunk, tokens, table, identity, later)
        for group, upto in later:
            handoff.ready(group, upto)
        self._first_token(job, handoff, prompt, record)

    def _hand_over_again(self, job: Job, handoff: Handoff, record: StreamRecord) -> None:
        """This attempt had finished here; whoever asks again may lack its pages or its report."""
        prompt = record.number("prompt_tokens")
        for group in range(self._arena.layout.groups):
            handoff.ready(group, prompt)
        handoff.first(int(record.tokens[prompt]), float(record.logprobs[prompt]))
        self._report_done(job, record, already_done=True)
        handoff.finish()

    def _handoff(self, job: Job, record: StreamRecord, sockets: Sockets) -> Handoff:
        command = job.command
        local = LocalHandoff(record, command.attempt, self._fingerprint, sockets)
        if not command.ingest_address:
            local.announce = job.announce
            return local
        sent = [command.remote_tokens] * self._arena.layout.groups
        return RemoteHandoff(
            self._arena, local, command.remote_slot, command.remote_attempt,
            command.ingest_address, sent, job.announce,
        )  # fmt: skip

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
        handoff.finish()

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
            already_done=already_done,
        )  # fmt: skip
        self._report(control_pb2.WorkerEvent(prefill_done=done))

    def _last_rows(self, prompt: int, job: Job) -> range:
        """The rows of the last pass."""
        chunk = self._config.chunk_tokens
        begin = max(prompt - job.computed, (prompt - 1) // chunk * chunk)
        return range(begin, prompt)
