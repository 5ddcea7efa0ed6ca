"""The tiers below a store's arena in tests: a real directory, and threads that work when they are told
to, so that anything can happen while a block is being read or written."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any, TypeVar

from baton.v1 import store_pb2
from services.kv_store.blockfile import BlockFiles
from services.kv_store.disk import DiskTier
from services.kv_store.prefetch import Prefetcher
from services.kv_store.runtime import KvStore
from services.kv_store.writeback import WriteBack

R = TypeVar("R")
WAIT_S = 60.0
TURNS = 12  # of the loop, until everything that can go on has gone on


class ByHand(Executor):
    """Jobs lie in a queue until somebody does them."""

    def __init__(self) -> None:
        self.jobs: deque[tuple[Future[Any], Callable[[], Any]]] = deque()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.jobs.append((future, lambda: fn(*args, **kwargs)))
        return future

    def do_one(self) -> None:
        future, job = self.jobs.popleft()
        try:
            future.set_result(job())
        except Exception as error:  # noqa: BLE001
            future.set_exception(error)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self.jobs.clear()


class StoreTiers:
    """A disk tier, its write-back and its prefetch, over one store and a loop of their own."""

    def __init__(
        self, store: KvStore, directory: Path, blocks: int, wait_s: float = WAIT_S
    ) -> None:
        self.store, self.threads, self.loop = store, ByHand(), asyncio.new_event_loop()
        room = blocks * BlockFiles(directory, store.arena).file_bytes
        self.disk = DiskTier(directory, store.arena, room, executor=self.threads, clock=store.clock)
        store.disk = self.disk
        self.prefetcher = Prefetcher(store, [self.disk], wait_s)
        self.writer = WriteBack(store, self.disk, cold_s=0.0)
        self.opening: set[asyncio.Task[Any]] = set()

    # --- one thing at a time ---

    def turn(self) -> None:
        """The store's loop goes on as far as it can without the disk."""

        async def turns() -> None:
            for _ in range(TURNS):
                await asyncio.sleep(0)

        self.loop.run_until_complete(turns())

    def work(self) -> None:
        """The disk does one of its jobs."""
        self.threads.do_one()
        self.turn()

    def begin_open(
        self, request: store_pb2.OpenStreamRequest
    ) -> asyncio.Task[store_pb2.OpenStreamResponse]:
        task = self.loop.create_task(self.prefetcher.open(request))
        self.opening.add(task)
        self.turn()
        return task

    def write_back(self) -> None:
        """Starts writing what is cold, which here is everything."""

        async def step() -> None:
            self.writer.step(self.store.clock())

        self.loop.run_until_complete(step())
        self.turn()

    # --- to the end ---

    def run(self, job: Coroutine[Any, Any, R]) -> R:
        """Runs it while the disk works."""
        task = self.loop.create_task(job)
        while not task.done():
            self.turn()
            if self.threads.jobs:
                self.work()
        return task.result()

    def open(self, request: store_pb2.OpenStreamRequest) -> store_pb2.OpenStreamResponse:
        return self.run(self.prefetcher.open(request))

    def flush(self) -> None:
        self.run(self.writer.flush(60.0))

    def settle(self) -> None:
        """The disk has nothing left to do."""
        self.turn()
        while self.threads.jobs:
            self.work()

    def die(self) -> None:
        """With the store: what has not been done will not be, and nobody tidies up in the arena."""
        arena = self.store.arena.buffer
        before = arena[:]
        tasks = asyncio.all_tasks(self.loop)
        for task in tasks:
            task.cancel()
        if tasks:
            self.loop.run_until_complete(asyncio.wait(tasks))
        arena[:] = before
        self.loop.close()
        self.disk.close()
