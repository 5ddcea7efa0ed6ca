"""One stream in two arenas and a hand-off between them, over any medium: what the contract tests of the
KV stream run on. Memory has a virtual clock; sockets have the real one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

import numpy as np

from services.kv.arena import Arena
from services.kv.layout import PAGE_TOKENS, KvLayout, blocks_for
from services.kv.record import StreamRecord
from services.kv.verify import verify_rows
from services.kv_store.endpoint import Endpoint
from services.ops.errors import BatonError
from services.prefill.handoff import Destination, Handoff, LocalHandoff, RemoteHandoff, push_of
from services.prefill.transfer import Sender
from services.wire.client import Client
from services.wire.faulty_medium import Faults, FaultyMedium
from services.wire.medium import Listener, Medium
from services.wire.memory_medium import MemoryMedium
from services.wire.push import Push
from services.wire.session import hello_of
from services.wire.zmq_medium import ZmqMedium
from tests.support import arenas

ATTEMPT = 4
PATIENCE_S = 20.0
FAULTS = Faults(drop=0.03, duplicate=0.05, delay=0.1, corrupt=0.03, cut=0.005)


class NothingCached:
    """A store that lends nothing."""

    def borrow(self, keys: Sequence[bytes]) -> list[int]:
        return []

    def give_back(self, block: int) -> None:
        raise AssertionError("nothing was lent")


@dataclass
class Clock:
    """Virtual, or the real one."""

    virtual: bool
    now: float = 100.0

    def __call__(self) -> float:
        return self.now if self.virtual else time.monotonic()

    def tick(self, medium: Medium) -> None:
        if self.virtual:
            self.now += 0.001
        medium.wait(0.001)


@dataclass
class Link:
    """Prefill's arena `source`, decode's arena `target` (the same one for shm), the stream open in
    both, and what runs between them."""

    source: Arena
    target: Arena
    record: StreamRecord
    remote: StreamRecord
    clock: Clock
    mode: str
    stores: list[Endpoint] = field(default_factory=list)
    media: list[Medium] = field(default_factory=list)
    client: Client | None = None
    address: str = ""
    source_address: str = ""
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    push: Push | None = None
    setting: Setting | None = None
    patience_s: float = 0.0
    silent: bool = False  # decode's store is stopped

    @property
    def groups(self) -> range:
        return range(self.source.layout.groups)

    def handoff(self, attempt: int = ATTEMPT) -> Handoff:
        local = LocalHandoff(
            self.record, attempt, bytes.fromhex(self.source.plan.fingerprint), self.media[0].notify
        )
        if self.client is None:
            return local
        source = self.source_address if self.mode == "pull" else ""
        to = Destination(self.address, self.remote.slot, attempt, source)
        self.push = push_of(self.record, attempt, to)
        return RemoteHandoff(local, self.push, to, Sender(self.client, self.patience_s, self.clock))

    def compute(self, begin: int, end: int, groups: Sequence[int] | None = None) -> None:
        """K and V of these tokens, in prefill's pages, with their checksums."""
        identity = arenas.identity_of(self.tokens, self.record.root)
        for group in self.groups if groups is None else groups:
            for block in range(begin // PAGE_TOKENS, blocks_for(end)):
                first = max(begin, block * PAGE_TOKENS)
                last = min(end, (block + 1) * PAGE_TOKENS)
                page = int(self.record.prefill_table[block])
                seeds = identity.seeds[first:last]
                arenas.write_rows(self.source, page, group, seeds, first % PAGE_TOKENS)
                if last % PAGE_TOKENS == 0:
                    whole = self.source.page_id(page, group)
                    self.source.native.seal(whole, group, PAGE_TOKENS, identity.key(block))

    def pump(self) -> None:
        """One turn for everybody."""
        if self.client is not None:
            self.client.poll()
        for store in self.stores[: 1 if self.silent else None]:
            store.turn()
        self.clock.tick(self.media[0])

    def until(self, condition: Callable[[], bool], what: str = "the condition") -> None:
        deadline = self.clock() + PATIENCE_S
        while not condition():
            assert self.clock() < deadline, f"waited {PATIENCE_S} s for {what}"
            self.pump()

    def restart_store(self) -> None:
        """Decode's store dies and comes back at the same address, with the same arena."""
        assert self.setting is not None
        old, medium = self.stores.pop(), self.media[0]
        if isinstance(medium, MemoryMedium):
            medium.forget(self.address)
            old.client.close()
        else:
            old.close()
            medium = ZmqMedium()
        listener = medium.listen(self.address)
        self.stores.append(endpoint(self.target, medium, listener, self.clock, self.setting))

    def finish(self, handoff: Handoff) -> BatonError | None:
        """Ends a hand-off and gives what it ended with."""
        ended: list[BatonError | None] = []
        handoff.end(ended.append)
        self.until(lambda: bool(ended), "the hand-off to end")
        return ended[0]

    def deliver(self, handoff: Handoff, chunk: int = 128) -> BatonError | None:
        """A whole prefill: chunk by chunk, group by group, then the first token."""
        for begin in range(self.record.ready_tokens(), len(self.tokens), chunk):
            end = min(begin + chunk, len(self.tokens))
            for group in self.groups:
                self.compute(begin, end, [group])
                handoff.ready(group, end)
                self.pump()
        handoff.first(7, -0.5)
        return self.finish(handoff)

    def assert_delivered(self) -> None:
        """Every row is in decode's arena, verified, the complete blocks sealed, and the first token."""
        prompt = len(self.tokens)
        assert [self.remote.ready(g) for g in self.groups] == [(ATTEMPT, prompt)] * len(self.groups)
        assert self.remote.first() == (ATTEMPT, True)
        assert int(self.remote.tokens[prompt]) == 7
        self.assert_verified()

    def assert_verified(self) -> None:
        """What decode's arena announces is what it holds."""
        identity = arenas.identity_of(self.tokens, self.record.root)
        table = np.array(self.remote.prefill_table[: blocks_for(len(self.tokens))])
        for group in self.groups:
            verify_rows(self.target, table, identity, group, 0, self.remote.ready(group)[1])
            for block in range(self.remote.ready(group)[1] // PAGE_TOKENS):
                header = self.target.headers[self.target.page_id(int(table[block]), group)]
                if self.client is not None:
                    assert header["key"].tobytes() == identity.key(block)


def endpoint(
    arena: Arena, medium: Medium, listener: Listener, clock: Clock, setting: Setting
) -> Endpoint:
    """A store's end of the stream, without the store."""
    return Endpoint(
        arena, NothingCached(), medium, listener, clock=clock, verify=setting.verify,
        inflight_bytes_max=setting.inflight_bytes_max,
    )  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """Which world to build."""

    medium: str = "memory"
    mode: str = "push"
    layers_per_group: int = 2
    prompt: int = 300
    inflight_bytes_max: int = 1 << 20
    faults: Faults = FAULTS
    seed: int = 1
    verify: bool = True

    def __str__(self) -> str:
        return f"{self.medium}-{self.mode}"


def open_both(
    arena: Arena, tokens: np.ndarray, blocks: Sequence[int], slot: int, attempt: int = ATTEMPT
) -> StreamRecord:
    """A record as a store leaves it when it has opened a stream of these tokens in these blocks."""
    record = StreamRecord(arena, slot)
    record.tokens[: len(tokens)] = tokens
    record.fixed["root"] = np.void(arenas.ROOT)
    record.fixed["generation"] = int(record.fixed["generation"]) + 1
    arenas.open_record(arena, slot, prompt=len(tokens), attempt=attempt)
    record.write_plan(prefill_table=list(blocks))
    return record


@contextmanager
def link(directory: Path, setting: Setting) -> Iterator[Link]:
    """A world to hand a stream over in; closes all it has opened."""
    layout = replace(arenas.LAYOUT, layers_per_group=setting.layers_per_group)
    tokens = arenas.some_tokens(setting.prompt)
    count = blocks_for(setting.prompt)
    source = _arena(directory / "a", layout)
    target = source if setting.medium == "shm" else _arena(directory / "b", layout)
    record = open_both(source, tokens, [*range(1, count), 0][:count], 0)
    blocks = [*range(count - 2), count + 1, count][:count]
    remote = record if target is source else open_both(target, tokens, blocks, 2)
    virtual = setting.medium in ("shm", "memory", "faulty")
    world = Link(source, target, record, remote, Clock(virtual), setting.mode, tokens=tokens)
    world.setting = setting
    try:
        _connect(world, setting, directory)
        yield world
    finally:
        if world.client is not None:
            world.client.close()
        for store in world.stores:
            store.close()
        for medium in world.media:
            medium.close()


def _arena(directory: Path, layout: KvLayout) -> Arena:
    return arenas.small_arena(directory, layout=layout, arena_bytes=1 << 20)


def _connect(world: Link, setting: Setting, directory: Path) -> None:
    memory = MemoryMedium()
    sockets = setting.medium.removeprefix("faulty-") in ("tcp", "ipc")
    if setting.medium == "shm":
        world.media.append(memory)
        return
    for n, arena in enumerate((world.source, world.target)):
        inner: Medium = ZmqMedium() if sockets else memory
        medium: Medium = inner
        if setting.medium.startswith("faulty"):
            medium = FaultyMedium(inner, Random(setting.seed + n), setting.faults)
        address = f"ipc://{directory}/{n}" if "ipc" in setting.medium else f"store-{n}"
        address = "tcp://127.0.0.1:*" if "tcp" in setting.medium else address
        listener = medium.listen(address)
        world.stores.append(endpoint(arena, medium, listener, world.clock, setting))
        world.source_address = world.source_address or listener.address
        world.address = listener.address
    inner = ZmqMedium() if sockets else memory
    medium = inner
    if setting.medium.startswith("faulty"):
        medium = FaultyMedium(inner, Random(setting.seed + 7), setting.faults)
    world.media.append(medium)
    world.client = Client(medium, hello_of(world.source.plan), clock=world.clock)
