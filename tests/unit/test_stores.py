"""The scheduler's calls to stores: one that is away holds up nobody, and does not pile up calls."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from baton.v1 import store_pb2, store_pb2_grpc
from services.scheduler import stores as stores_module
from services.scheduler.request import CallStore
from services.scheduler.stores import Stores
from services.wire.server import Server

FINGERPRINT = "f" * 32


class Servicer(store_pb2_grpc.KvStoreServicer):  # type: ignore[misc]
    """A store of which only the name and the calls are real."""

    def __init__(self, store_id: str) -> None:
        self.store_id, self.released = store_id, list[str]()

    async def Describe(self, request: Any, context: Any) -> store_pb2.DescribeResponse:
        answer = store_pb2.DescribeResponse(fingerprint=FINGERPRINT, ingest_address="tcp://x:1")
        answer.pages.store_id, answer.pages.reachable = self.store_id, True
        return answer

    async def Release(self, request: Any, context: Any) -> store_pb2.ReleaseResponse:
        self.released.append(request.request_id)
        return store_pb2.ReleaseResponse(found=True)


async def serve(address: str, store_id: str) -> tuple[Server, Servicer]:
    servicer = Servicer(store_id)
    server = Server(
        {"s": lambda s: store_pb2_grpc.add_KvStoreServicer_to_server(servicer, s)},
        None,
        frozenset(),
    )
    await server.start(address)
    return server, servicer


def release(store_id: str, request_id: str) -> CallStore:
    message = store_pb2.ReleaseRequest(request_id=request_id)
    return CallStore(request_id, store_id, "Release", message)


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 -- nothing announces it
            await asyncio.sleep(0.005)


def test_a_store_that_is_away_holds_up_nobody_and_is_reconciled(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other store answers at once; what waits for the first is bounded, and it is named as returned
    when it is back, after which its calls are made."""
    monkeypatch.setattr(stores_module, "PENDING_MAX", 3)
    asyncio.run(away(f"unix:{tmp_path}/a.sock", f"unix:{tmp_path}/b.sock"))


async def away(a: str, b: str) -> None:
    replies: list[tuple[str, str, str]] = []
    returned: list[str] = []
    here, _ = await serve(a, "A")
    there, _ = await serve(b, "B")
    stores = Stores(
        (a, b), FINGERPRINT, lambda call, _, code, why: replies.append((call.request_id, code, why))
    )
    watching = asyncio.create_task(stores.watch(lambda _, back: returned.extend(back)))
    await until(lambda: len(stores.described) == 2)
    await here.stop(0)
    await until(lambda: not stores.described[a].pages.reachable)
    for n in range(5):
        stores.call(release("A", f"a{n}"))
    stores.call(release("B", "b"))
    await until(lambda: ("b", "OK", "") in replies)
    refused = [request_id for request_id, code, _ in replies if code == "UNAVAILABLE"]
    assert refused == ["a3", "a4"]
    assert returned == []
    again, servicer = await serve(a, "A")
    await until(lambda: returned == ["A"] and len(servicer.released) == 3)
    assert sorted(servicer.released) == ["a0", "a1", "a2"]
    watching.cancel()
    await stores.close()
    await again.stop(0)
    await there.stop(0)


def test_a_store_in_the_place_of_another_is_looked_for(tmp_path: Any) -> None:
    """A worker of it may be here before the scheduler has looked, or before it answers: that is not
    "gone". The other is, also while a third does not answer."""

    async def replaced() -> None:
        a, b = f"unix:{tmp_path}/a.sock", f"unix:{tmp_path}/b.sock"
        replies, ingest = dict[str, str](), set[str]()
        stores = Stores(
            (a, b), FINGERPRINT, lambda call, _, code, __: replies.update({call.request_id: code})
        )
        old, _ = await serve(a, "old")
        third, _ = await serve(b, "third")
        watching = asyncio.create_task(stores.watch(lambda now, _: ingest.update(now)))
        await until(lambda: len(ingest) == 2)
        watching.cancel()
        await old.stop(0)
        stores.call(release("new", "early"))
        await until(lambda: not stores.described[a].pages.reachable)
        new, servicer = await serve(a, "new")
        await until(lambda: replies)
        assert "new" in ingest  # what is placed on it needs its address
        await third.stop(0)
        await stores.refresh(b)
        stores.call(release("old", "late"))
        await until(lambda: len(replies) == 2)
        assert replies == {"early": "OK", "late": "NOT_FOUND"}
        assert servicer.released == ["early"]
        await stores.close()
        await new.stop(0)

    asyncio.run(replaced())


def test_a_store_that_nobody_has_seen_yet_is_waited_for(tmp_path: Any) -> None:
    """A worker of it may be here before it is: that is not "gone"."""

    async def late() -> None:
        address, codes = f"unix:{tmp_path}/a.sock", list[str]()
        stores = Stores((address,), FINGERPRINT, lambda _, __, code, ___: codes.append(code))
        watching = asyncio.create_task(stores.watch(lambda _, __: None))
        stores.call(release("A", "r"))
        server, servicer = await serve(address, "A")
        await until(lambda: codes)
        assert (codes, servicer.released) == (["OK"], ["r"])
        watching.cancel()
        await stores.close()
        await server.stop(0)

    asyncio.run(late())
