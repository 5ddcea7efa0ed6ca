"""A worker's link to its scheduler: nothing piles up while it is away, or while it takes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from baton.v1 import control_pb2, control_pb2_grpc
from services.wire import link as link_module
from services.wire.link import SchedulerLink
from services.wire.server import Server

EVENT = control_pb2.WorkerEvent(stopped=control_pb2.Stopped(request_id="r", epoch=1))


class Servicer(control_pb2_grpc.ControlServicer):  # type: ignore[misc]
    """Welcomes workers; from then on it reads only if `reads`."""

    def __init__(self, reads: bool) -> None:
        self.reads, self.attached = reads, 0
        self.heard: list[control_pb2.WorkerEvent] = []

    async def Attach(self, requests: Any, context: Any) -> AsyncIterator[control_pb2.WorkerCommand]:
        await anext(requests)
        self.attached += 1
        yield control_pb2.WorkerCommand(welcome=control_pb2.Welcome())
        if not self.reads:
            await asyncio.Event().wait()
        async for event in requests:
            self.heard.append(event)


async def serve(address: str, *, reads: bool) -> tuple[Server, Servicer]:
    servicer = Servicer(reads)
    server = Server(
        {"c": lambda s: control_pb2_grpc.add_ControlServicer_to_server(servicer, s)},
        None, frozenset(),
    )  # fmt: skip
    await server.start(address)
    return server, servicer


def link_to(address: str, heartbeat_s: float = 0.1) -> SchedulerLink:
    return SchedulerLink(
        address, heartbeat_s, control_pb2.Register, lambda _: None, "test-link", lambda: 0
    )


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 -- nothing announces it
            await asyncio.sleep(0.005)


def test_nothing_is_kept_for_a_scheduler_that_is_away(tmp_path: Any) -> None:
    """However long it stays away: the records hold the truth, and it asks for what it lacks."""

    async def away() -> None:
        link = link_to(f"unix:{tmp_path}/s.sock")
        running = asyncio.create_task(link.run())
        for _ in range(100_000):
            link.send(EVENT)
        assert link.waiting == 0
        server, servicer = await serve(f"unix:{tmp_path}/s.sock", reads=True)
        await until(link.attached.is_set)
        assert [event for event in servicer.heard if event.HasField("stopped")] == []
        running.cancel()
        await server.stop(0)

    asyncio.run(away())


def test_a_scheduler_that_takes_nothing_is_dialled_again(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A report is never dropped from a link that lives: what is full is cut, and registered anew."""
    monkeypatch.setattr(link_module, "OUTBOX_MAX", 8)

    async def stuck() -> None:
        server, servicer = await serve(f"unix:{tmp_path}/s.sock", reads=False)
        link = link_to(f"unix:{tmp_path}/s.sock", heartbeat_s=60)
        running = asyncio.create_task(link.run())
        await until(link.attached.is_set)
        while link.attached.is_set() and link.waiting < 8:
            link.send(EVENT)
        link.send(EVENT)
        await until(lambda: servicer.attached == 2)
        await until(link.attached.is_set)
        assert link.waiting == 0
        running.cancel()
        await server.stop(0)

    asyncio.run(stuck())
