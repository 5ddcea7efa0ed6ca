"""The decode engine: one thread that runs the batch, step by step, and polls what is still arriving.

Nothing else of weight runs in this process: the event loop only moves small messages, so the
interpreter lock is free whenever a step needs it.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

import numpy as np

from baton.v1 import control_pb2
from services.decode.config import DecodeConfig
from services.decode.state import BatchState
from services.decode.stream import DecodeStream, Known, Report
from services.engine.backend import Backend, OneCallBackend, Rows
from services.engine.errors import NumericsError
from services.engine.sampling import sample
from services.kv.arena import Arena
from services.kv.layout import PAGE_TOKENS
from services.ops import lifecycle, log
from services.ops.errors import BatonError, StaleEpoch
from services.ops.failpoints import Failpoints
from services.wire.messages import refusal

_logger = log.get("decode")
POLL_S = 0.05  # a lost announcement costs at most this

Command = control_pb2.PrepareDecode | control_pb2.StopRequest | None


class DecodeEngine:
    """Takes commands on any thread; `report` must be safe to call from the engine's."""

    def __init__(
        self, config: DecodeConfig, arena: Arena, backend: Backend,
        report: Callable[[Report], None],
    ) -> None:  # fmt: skip
        self._config, self._arena, self._backend = config, arena, backend
        # Asked once: a look at a protocol takes longer than all else before a step.
        self._step_backend = backend if isinstance(backend, OneCallBackend) else None
        self._report = report
        self._unsafe = frozenset(config.unsafe)
        self._failpoints = Failpoints(config.failpoints, config.name)
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._wake = threading.Event()
        self._batch: BatchState[DecodeStream] = BatchState(config.batch_max)
        self._tables = np.zeros(
            (config.batch_max, arena.plan.max_blocks, arena.layout.groups), np.uint32
        )
        self._rows: dict[str, int] = {}  # request -> row of `_tables`
        self.steps = 0
        self.fenced = 0  # commits refused: the stream had moved
        # request -> epoch, from the moment it is told: what a registration leaves out, this worker
        # has let go of. Written by whoever submits, read by the event loop.
        self.running: dict[str, int] = {}
        self._thread = lifecycle.engine_thread(self._run, "decode-engine")

    def start(self) -> None:
        self._thread.start()

    def submit(self, command: Command) -> None:
        """None ends the engine after the step in flight."""
        if isinstance(command, control_pb2.PrepareDecode):
            self.running[command.request_id] = command.epoch
        self._commands.put(command)
        self._wake.set()

    def announced(self) -> None:
        """Some layer group of some stream is complete."""
        self._wake.set()

    def close(self) -> None:
        self.submit(None)
        self._thread.join()

    def _run(self) -> None:
        while self._take_commands():
            self._poll_pending()
            self._admit()
            if self._batch.active:
                self._step()
            elif not self._batch.waiting:
                self._wake.wait(POLL_S if self._batch.pending else None)
                self._wake.clear()

    # --- commands ---

    def _take_commands(self) -> bool:
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return True
            if command is None:
                return False
            if isinstance(command, control_pb2.StopRequest):
                self._stop(command)
            else:
                self._prepare(command)

    def _prepare(self, command: control_pb2.PrepareDecode) -> None:
        """Takes a stream on. The same epoch again only asks for its tokens once more."""
        self._failpoints.refresh()
        held = self._batch.get(command.request_id)
        if held and held.epoch == command.epoch:
            held.command.report_from = command.report_from
            if command.request_id in self._batch.active:
                self._report([held.known_from(command.report_from)])
            return
        if held:
            self._forget(held)
        try:
            stream = DecodeStream(command, self._arena, self._unsafe)
        except BatonError as error:
            self._left(command.request_id, command.epoch)
            self._refuse(command.request_id, command.epoch, error)
            return
        self._batch.add(command.request_id, stream)
        self.running[command.request_id] = command.epoch  # again: the same epoch may have ended

    def _stop(self, command: control_pb2.StopRequest) -> None:
        stream = self._batch.get(command.request_id)
        if stream and stream.epoch <= command.epoch:
            self._forget(stream)
        stopped = control_pb2.Stopped(request_id=command.request_id, epoch=command.epoch)
        self._report(control_pb2.WorkerEvent(stopped=stopped))

    def _forget(self, stream: DecodeStream) -> None:
        self._batch.remove(stream.request_id)
        self._rows.pop(stream.request_id, None)
        self._left(stream.request_id, stream.epoch)

    def _left(self, request_id: str, epoch: int) -> None:
        if self.running.get(request_id) == epoch:  # a later one may be waiting in the queue
            del self.running[request_id]

    def _refuse(self, request_id: str, epoch: int, error: BatonError) -> None:
        _logger.warning("stream refused", request_id=request_id, reason=error.message)
        self._report(refusal(request_id, epoch, error))

    # --- streams on their way in ---

    def _poll_pending(self) -> None:
        for stream in list(self._batch.pending.values()):
            try:
                if stream.poll():
                    self._batch.runnable(stream.request_id)
            except BatonError as error:
                self._forget(stream)
                self._refuse(stream.request_id, stream.epoch, error)

    def _admit(self) -> None:
        for stream in self._batch.admit():
            self._failpoints.hit("decode.attaching")
            try:
                stream.attach(self._backend)
            except BatonError as error:
                self._forget(stream)
                self._refuse(stream.request_id, stream.epoch, error)
                continue
            row = next(r for r in range(self._config.batch_max) if r not in self._rows.values())
            self._rows[stream.request_id] = row
            self._tables[row, : len(stream.table)] = stream.table
            self._started(stream)
            self._failpoints.hit("decode.attached")

    def _started(self, stream: DecodeStream) -> None:
        started = control_pb2.DecodeStarted(
            request_id=stream.request_id, epoch=stream.epoch,
            runnable_at=time.monotonic(),
            verified=stream.verified_at, resumed_at=stream.steps,
            repaired_blocks=len(stream.repaired), repaired_tokens=sum(stream.repaired),
        )  # fmt: skip
        self._report(control_pb2.WorkerEvent(decode_started=started))
        from_index = stream.command.report_from
        if "record" in self._unsafe:  # control: trust the memory of the dead instead of the record
            from_index = stream.first_index + stream.steps + 1
        known = stream.known_from(from_index)
        self._report([known])
        if known.finish:
            self._forget(stream)

    # --- the step ---

    def _step(self) -> None:
        """One token for every active stream: compute, seal, commit, and only then report."""
        streams = list(self._batch.active.values())
        logits = self._compute(streams)
        reports: list[Known] = []
        for i, stream in enumerate(streams):
            stream.seal_if_full()
            self._failpoints.hit("decode.kv_written", stream.next_index)
            index = stream.next_index
            try:
                token, logprob = sample(logits[i], stream.params, stream.position + 1)
            except NumericsError as error:
                self._forget(stream)
                self._refuse(stream.request_id, stream.epoch, BatonError(str(error)))
                continue
            if not stream.commit(token, logprob):
                self._forget(stream)
                self.fenced += 1
                fenced = StaleEpoch(f"epoch: {stream.epoch} has been fenced")
                self._refuse(stream.request_id, stream.epoch, fenced)
                continue
            self._failpoints.hit("decode.committed", index)
            reports.append(stream.known_from(index))
            if reports[-1].finish:
                self._forget(stream)
        self.steps += 1
        if reports:
            self._report(reports)

    def _compute(self, streams: list[DecodeStream]) -> np.ndarray:
        """Runs the batch through all layer groups; K and V of each row are in its page, checksummed."""
        tokens = np.array([s.next_token for s in streams], np.int32)
        positions = np.array([s.position for s in streams], np.int32)
        sequence = np.array([self._rows[s.request_id] for s in streams], np.int32)
        for stream, token in zip(streams, tokens, strict=True):
            stream.identity.extend(np.array([token], np.int32))
        seeds = np.array([s.identity.seeds[s.position] for s in streams], np.uint32)
        rows = Rows(tokens, positions, sequence, self._tables)
        if self._step_backend is not None and not self._failpoints.armed:
            return self._step_backend.step(rows, seeds)
        self._backend.begin(rows)
        blocks = positions // PAGE_TOKENS
        for group in range(self._arena.layout.groups):
            self._backend.run_group(group)
            pages = self._tables[sequence, blocks, group]
            self._arena.native.stamp_rows(pages, positions % PAGE_TOKENS, seeds, group)
            if group == 0:
                for stream in streams:
                    self._failpoints.hit("decode.mid_layer", stream.next_index)
        return self._backend.logits(np.arange(len(streams), dtype=np.int32))
