"""The scheduler's calls to stores: none is called gone before every store has said who it is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from baton.v1 import cluster_pb2, store_pb2, store_pb2_grpc
from services.scheduler.request import CallStore
from services.scheduler.stores import Stores
from services.wire.server import Server


class Answering(store_pb2_grpc.KvStoreServicer):  # type: ignore[misc]
    """A store that says who it is once it is allowed to."""

    def __init__(self, store_id: str, allowed: asyncio.Event) -> None:
        self._id, self._allowed = store_id, allowed

    async def Describe(self, request: Any, context: Any) -> store_pb2.DescribeResponse:
        await self._allowed.wait()
        pages = cluster_pb2.StorePages(store_id=self._id, reachable=True)
        return store_pb2.DescribeResponse(pages=pages, fingerprint="f")

    async def Publish(self, request: Any, context: Any) -> store_pb2.PublishResponse:
        return store_pb2.PublishResponse(blocks=3)


def server(store_id: str, answers: asyncio.Event) -> Server:
    servicer = Answering(store_id, answers)

    def add(to: Any) -> None:
        store_pb2_grpc.add_KvStoreServicer_to_server(servicer, to)

    return Server({"baton.v1.KvStore": add}, None, frozenset())


Replies = asyncio.Queue[tuple[str, str]]


@asynccontextmanager
async def two_stores(
    directory: Path, second_answers: asyncio.Event
) -> AsyncIterator[tuple[Stores, Replies]]:
    """Stores `a` and `b`, and the replies as they come: request id and code."""
    now = asyncio.Event()
    now.set()
    servers = {"a": server("a", now), "b": server("b", second_answers)}
    for name, each in servers.items():
        await each.start(f"unix:{directory}/{name}")
    replies: Replies = asyncio.Queue()
    addresses = tuple(f"unix:{directory}/{name}" for name in servers)
    stores = Stores(
        addresses,
        "f",
        lambda call, reply, code, message: replies.put_nowait((call.request_id, code)),
    )
    watching = asyncio.create_task(stores.watch(lambda ingest, returned: None))
    try:
        async with asyncio.timeout(30):
            yield stores, replies
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await stores.close()
        for each in servers.values():
            await each.stop(0)


def test_a_store_that_has_not_answered_yet_is_not_gone(tmp_path: Path) -> None:
    """A worker may know its store before the scheduler does; one that none of them is, is gone."""

    async def scene() -> None:
        second_answers = asyncio.Event()
        async with two_stores(tmp_path, second_answers) as (stores, replies):
            stores.call(CallStore("early", "b", "Publish", store_pb2.PublishRequest()))
            stores.call(CallStore("first", "a", "Publish", store_pb2.PublishRequest()))
            assert await replies.get() == ("first", "OK")
            second_answers.set()
            assert await replies.get() == ("early", "OK")
            stores.call(CallStore("never", "c", "Publish", store_pb2.PublishRequest()))
            assert await replies.get() == ("never", "NOT_FOUND")

    asyncio.run(scene())
