"""A worker's end of the Control stream: dials the scheduler, registers, reports, takes commands.

When the stream breaks the worker goes on working and dials again; what it could not report lies in the
stream records, and the scheduler asks for it after the next registration.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import grpc

from baton.v1 import control_pb2, control_pb2_grpc
from services.ops import log
from services.ops.keys import Keys
from services.wire import rpc

_logger = log.get("link")
_RETRY_S = (0.02, 0.05, 0.1, 0.2)
OUTBOX_MAX = 4096
SAY_AGAIN = 50  # attempts between two words on a scheduler that cannot be reached


def alive_file(name: str) -> Path:
    """Touched at each heartbeat of an attached worker: what its health check looks at."""
    return Path(tempfile.gettempdir()) / f"baton-{name}.alive"


class OutboxFull(Exception):
    """The scheduler holds the stream and does not read it."""


class SchedulerLink:
    """`register` gives the current Register message, `streams` how many streams the worker holds;
    `on_command` takes what the scheduler sends."""

    def __init__(
        self, address: str, heartbeat_s: float,
        register: Callable[[], control_pb2.Register],
        on_command: Callable[[control_pb2.WorkerCommand], None],
        name: str, streams: Callable[[], int],
        keys: Keys | None = None,
    ) -> None:  # fmt: skip
        self._address, self._heartbeat_s, self._keys = address, heartbeat_s, keys
        self._register, self._on_command, self._streams = register, on_command, streams
        self._outbox: asyncio.Queue[control_pb2.WorkerEvent] = asyncio.Queue(OUTBOX_MAX)
        self._alive = alive_file(name)
        self.attached = asyncio.Event()
        self.steps = 0
        self.fenced = 0  # commits refused because the epoch was not this worker's any more
        self._overflowed = asyncio.Event()

    def send(self, event: control_pb2.WorkerEvent) -> None:
        """Queues an event; without a scheduler it is dropped, since the records hold the truth. A
        scheduler that takes nothing is left and dialled again: then it asks for what it lacks."""
        if not self.attached.is_set():
            return
        if self._outbox.full():
            self._overflowed.set()
            return
        self._outbox.put_nowait(event)

    @property
    def waiting(self) -> int:
        """Events that have not gone out yet; at most OUTBOX_MAX."""
        return self._outbox.qsize()

    async def run(self) -> None:
        """Keeps the stream up until cancelled."""
        failures = 0
        while True:
            async with rpc.channel(self._address, self._keys, "scheduler") as channel:
                stub = control_pb2_grpc.ControlStub(channel)
                try:
                    await self._serve(stub.Attach())
                    failures = 0
                except grpc.aio.AioRpcError as error:
                    if self.attached.is_set():
                        _logger.warning("scheduler lost", status=error.code().name)
                        failures = 0
                    elif failures % SAY_AGAIN == 0:
                        status, reason = error.code().name, error.details()
                        _logger.warning("scheduler not reached", status=status, reason=reason)
                except OutboxFull:
                    _logger.warning("scheduler takes nothing", events=OUTBOX_MAX)
                finally:
                    self.attached.clear()
                    self._alive.unlink(missing_ok=True)
            await asyncio.sleep(_RETRY_S[min(failures, len(_RETRY_S) - 1)])
            failures += 1

    async def _serve(self, call: grpc.aio.StreamStreamCall) -> None:
        while not self._outbox.empty():
            self._outbox.get_nowait()
        self._overflowed.clear()
        await call.write(control_pb2.WorkerEvent(register=self._register()))
        sender = asyncio.create_task(self._send(call))
        guard = asyncio.create_task(self._cut_when_full(call))
        try:
            async for command in call:
                if command.WhichOneof("command") == "welcome":
                    self.attached.set()
                    self._alive.touch()
                else:
                    self._on_command(command)
        except asyncio.CancelledError:
            if self._overflowed.is_set():
                raise OutboxFull from None
            raise
        finally:
            sender.cancel()
            guard.cancel()

    async def _cut_when_full(self, call: grpc.aio.StreamStreamCall) -> None:
        await self._overflowed.wait()
        call.cancel()

    async def _send(self, call: grpc.aio.StreamStreamCall) -> None:
        due = 0.0
        while True:
            if time.monotonic() >= due:
                due = time.monotonic() + self._heartbeat_s
                if self.attached.is_set():
                    self._alive.touch()
                heartbeat = control_pb2.Heartbeat(
                    steps=self.steps, streams=self._streams(), fenced=self.fenced
                )
                await call.write(control_pb2.WorkerEvent(heartbeat=heartbeat))
            try:
                async with asyncio.timeout(max(0.001, due - time.monotonic())):
                    event = await self._outbox.get()
            except TimeoutError:
                continue
            await call.write(event)
