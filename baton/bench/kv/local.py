"""One host: a producer that writes pages and announces them, a consumer that verifies them in place,
and, in the producer's process alone, memcpy and the same checksums to compare with.

============================  ====================================================================
`memcpy`                      between two private buffers, run by run
`stamp`, `verify`             what a writer and a reader do with pages in the arena: row checksums
                              and seals, made and compared
`memcpy + checksums`          into the arena's pages, stamped and verified, by one process
`shm`                         written into the arena and announced by one process, until the other
                              has seen the last announcement; without checksums
`shm + checksums`             the same, stamped before they are announced, until the other process
                              has verified the last row in place
`shm read in place`           what another process has written, verified where it lies
============================  ====================================================================
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import zmq

from baton.bench.kv.world import World
from services.kv.arena import Arena
from services.kv.identity import RowIdentity
from services.kv.layout import PAGE_TOKENS
from services.kv.record import StreamRecord
from services.kv.verify import verify_rows
from services.prefill.handoff import LocalHandoff
from services.wire import sockets
from services.wire.zmq_medium import ZmqMedium

POLL_MS = 50  # a lost announcement costs at most this, as at a decode


class Worker:
    """A process that has mapped an arena, with the stream it works on."""

    def __init__(self, arena_dir: Path, world: World) -> None:
        self.world, self.arena = world, Arena(arena_dir)
        self.identity: RowIdentity | None = None

    def prepare(self, slot: int, attempt: int) -> None:
        """Everything that is known before the first page: part of opening, not of moving."""
        self.record = StreamRecord(self.arena, slot)
        self.attempt = attempt
        self.blocks = np.array(self.record.prefill_table[: self.world.blocks])
        assert (np.diff(self.blocks) == 1).all(), "the arena's pages are not one run"
        if self.identity is None:
            tokens = self.world.token_ids()
            self.identity = RowIdentity(self.record.root, tokens, len(tokens))

    def run(self, group: int, begin: int, end: int) -> memoryview:
        """The bytes of blocks [begin, end) of a group in the arena."""
        return self.arena.run(group, int(self.blocks[begin]), end - begin)

    def stamp_run(self, group: int, begin: int, end: int) -> None:
        assert self.identity is not None
        first, last = begin * PAGE_TOKENS, end * PAGE_TOKENS
        seeds = self.identity.seeds[first:last]
        self.arena.native.stamp_tokens(self.blocks, first, seeds, group)
        for block in range(begin, end):
            page = self.arena.page_id(int(self.blocks[block]), group)
            self.arena.native.seal(page, group, PAGE_TOKENS, self.identity.key(block))

    def verify_run(self, group: int, begin: int, end: int) -> None:
        """Raises CorruptKv."""
        assert self.identity is not None
        first, last = begin * PAGE_TOKENS, end * PAGE_TOKENS
        verify_rows(self.arena, self.blocks, self.identity, group, first, last)

    def verify(self, run_bytes: int) -> float:
        """Seconds to verify everything."""
        start = time.monotonic()
        for group, begin, end in self.world.steps(run_bytes):
            self.verify_run(group, begin, end)
        return time.monotonic() - start


class Producer(Worker):
    """Writes from a private buffer, as an accelerator's results would come."""

    def __init__(self, arena_dir: Path, world: World, announce: str) -> None:
        super().__init__(arena_dir, world)
        self._announce, self._medium = announce, ZmqMedium()
        self._source = np.random.default_rng(1).integers(0, 256, world.total_bytes, np.uint8)
        self._target = np.zeros_like(self._source) + np.uint8(1)
        self._source_of = self._source.reshape(world.groups, world.blocks, world.page_bytes)
        self._target_of = self._target.reshape(world.groups, world.blocks, world.page_bytes)

    def memcpy(self, run_bytes: int) -> float:
        start = time.monotonic()
        for group, begin, end in self.world.steps(run_bytes):
            np.copyto(self._target_of[group, begin:end], self._source_of[group, begin:end])
        return time.monotonic() - start

    def _write_run(self, group: int, begin: int, end: int) -> None:
        run = np.frombuffer(self.run(group, begin, end), np.uint8)
        np.copyto(run.reshape(end - begin, -1), self._source_of[group, begin:end])

    def memcpy_and_checksums(self, run_bytes: int) -> float:
        start = time.monotonic()
        for group, begin, end in self.world.steps(run_bytes):
            self._write_run(group, begin, end)
            self.stamp_run(group, begin, end)
            self.verify_run(group, begin, end)
        return time.monotonic() - start

    def stamp(self, run_bytes: int) -> float:
        start = time.monotonic()
        for group, begin, end in self.world.steps(run_bytes):
            self.stamp_run(group, begin, end)
        return time.monotonic() - start

    def write(self, run_bytes: int, checksums: bool) -> float:
        """When, on the shared clock, the first byte was about to be written."""
        handoff = LocalHandoff(
            self.record, self.attempt, bytes.fromhex(self.arena.plan.fingerprint), self._medium.notify,
            self._announce,
        )  # fmt: skip
        start = time.monotonic()
        for group, begin, end in self.world.steps(run_bytes):
            self._write_run(group, begin, end)
            if checksums:
                self.stamp_run(group, begin, end)
            handoff.ready(group, end * PAGE_TOKENS)
        return start

    def close(self) -> None:
        self._medium.close()


class Consumer(Worker):
    """Woken by announcements; reads pages where they lie, as a decode does."""

    def __init__(self, arena_dir: Path, world: World, announce: str) -> None:
        super().__init__(arena_dir, world)
        self._context = sockets.context()
        self._socket = sockets.listener(self._context, zmq.PULL, frozenset({"prefill"}))
        self._socket.bind(announce)

    def follow(self, checksums: bool) -> float:
        """When, on the shared clock, the last row had been announced, and verified if asked for."""
        seen = [0] * self.world.groups
        while min(seen) < self.world.tokens:
            for group in range(self.world.groups):
                ready = self.record.ready(group)[1]
                if ready > seen[group] and checksums:
                    self.verify_run(group, seen[group] // PAGE_TOKENS, ready // PAGE_TOKENS)
                seen[group] = ready
            if min(seen) < self.world.tokens:
                self._sleep()
        return time.monotonic()

    def _sleep(self) -> None:
        """Until the next announcement; those that have come together are one."""
        if self._socket.poll(POLL_MS):
            while self._socket.poll(0):
                self._socket.recv()

    def close(self) -> None:
        self._context.destroy(linger=0)
