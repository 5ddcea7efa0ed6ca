"""What works on a real arena in the store's tests: the store itself, and workers that write the rows
that their text gives. All requests of one family have the same endless text."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from services.decode.stream import DecodeStream
from services.engine.identity import ModelIdentity, identify
from services.kv import locks
from services.kv.arena import Arena
from services.kv.identity import RowIdentity, block_keys, root_key
from services.kv.layout import PAGE_TOKENS, KvLayout, blocks_for
from services.kv.record import StreamRecord
from services.kv_store.config import KvStoreConfig
from services.kv_store.runtime import KvStore
from tests.support import arenas

LAYOUT = KvLayout(layers=3, layers_per_group=2, kv_heads=2, head_dim=32, kv_dtype="bf16")
GROUPS = range(LAYOUT.groups)
FAMILIES = (0, 1)
TEXT_TOKENS = 512


@cache
def identity() -> ModelIdentity:
    """The model that ships, with smaller pages."""
    pico = identify(
        "models/pico", kv_dtype="auto", layers_per_group=2, prefill_device="cpu",
        decode_device="cpu",
    )  # fmt: skip
    return replace(pico, layout=LAYOUT)


@cache
def whole_text(family: int) -> NDArray[np.int32]:
    return arenas.some_tokens(TEXT_TOKENS, seed=100 + family)


@cache
def text(family: int) -> RowIdentity:
    """All that a family's requests can ever say."""
    tokens = whole_text(family)
    return RowIdentity(root_key(identity().fingerprint, ""), tokens, TEXT_TOKENS)


def tokens_of(family: int, count: int) -> NDArray[np.int32]:
    return whole_text(family)[:count]


@cache
def places() -> dict[bytes, tuple[int, int]]:
    """key -> (family, block)."""
    return {
        key: (family, at)
        for family in FAMILIES
        for at, key in enumerate(
            block_keys(text(family).parents[0], tokens_of(family, TEXT_TOKENS))
        )
    }


def new_store(
    directory: Path, arena_bytes: int = 1 << 20, clock: Callable[[], float] = time.monotonic,
    one_class: bool = True,
) -> KvStore:  # fmt: skip
    """Goes on with the arena in `directory`, if there is one."""
    config = KvStoreConfig(arena_dir=str(directory), arena_bytes=arena_bytes, streams_max=4)
    return KvStore(config, replace(identity(), one_class=one_class), clock)


def end_store(store: KvStore) -> None:
    """As its death would: nothing is written, its lock is free."""
    os.close(store._own_lock)


@dataclass
class Worker:
    """A process as the store sees it: a lock that is held while it lives."""

    name: str
    number: int
    directory: Path
    lock: int = -1

    def __post_init__(self) -> None:
        self.lock = locks.hold(self.directory, self.id)

    @property
    def id(self) -> str:
        return f"{self.number:032x}"

    @property
    def alive(self) -> bool:
        return self.lock >= 0

    def die(self) -> None:
        if self.alive:
            os.close(self.lock)
            self.lock = -1


@dataclass
class Prefilling:
    """One attempt of one prefill. It knows its table from when it began, as the engine does."""

    arena: Arena
    slot: int
    family: int
    prompt: int
    attempt: int
    table: list[int] = field(default_factory=list)
    at: int = 0

    def __post_init__(self) -> None:
        record = StreamRecord(self.arena, self.slot)
        self.table = record.prefill_table[: blocks_for(self.prompt)].tolist()
        self.at = record.ready_tokens()

    def blocks(self) -> set[int]:
        """What it may still write: nothing once all rows are there."""
        return set(self.table[self.at // PAGE_TOKENS :]) if self.at < self.prompt else set()

    def compute(self, upto: int) -> bool:
        """Rows up to `upto`, announced group by group; False when it has been fenced."""
        record, identity = StreamRecord(self.arena, self.slot), text(self.family)
        end = min(upto, self.prompt)
        for group in GROUPS:
            for at in range(self.at // PAGE_TOKENS, blocks_for(end)):
                first, last = max(self.at, at * PAGE_TOKENS), min(end, (at + 1) * PAGE_TOKENS)
                rows = identity.seeds[first:last]
                arenas.write_rows(self.arena, self.table[at], group, rows, first % PAGE_TOKENS)
                if last % PAGE_TOKENS == 0:
                    page = self.arena.page_id(self.table[at], group)
                    self.arena.native.seal(page, group, PAGE_TOKENS, identity.key(at))
            if not record.set_ready(group, self.attempt, end):
                return False
        self.at = max(self.at, end)
        return True

    def first(self) -> bool:
        """The first token; False when it has been fenced."""
        token = int(tokens_of(self.family, self.prompt + 1)[-1])
        return StreamRecord(self.arena, self.slot).publish_first(self.attempt, token, -1.0)


@dataclass
class Decoding:
    """One epoch of one decode: the real stream, with a model that knows the text."""

    stream: DecodeStream
    family: int
    attached: bool = False
    left: set[int] = field(default_factory=set)  # before it attaches

    def blocks(self) -> set[int]:
        if not self.attached:
            return self.left
        return set(self.stream.table[self.stream.position // PAGE_TOKENS :, 0].tolist())

    def attach(self) -> bool:
        """False while prefill has not finished. Raises StaleEpoch, CorruptKv."""
        if not self.attached and self.stream.poll():
            self.stream.attach(None)
            self.attached = True
        return self.attached

    def step(self) -> bool:
        """One token; False when this epoch has been fenced. Its row is written all the same."""
        stream, position = self.stream, self.stream.position
        seeds = text(self.family).seeds[position : position + 1]
        block = int(stream.table[position // PAGE_TOKENS, 0])
        if stream.identity.length == position:  # not, when it has been here before and was fenced
            stream.identity.extend(np.array([stream.next_token], np.int32))
        assert stream.identity.seeds[position] == seeds[0], "another token than the text's"
        for group in GROUPS:
            arenas.write_rows(stream.arena, block, group, seeds, position % PAGE_TOKENS)
        stream.seal_if_full()
        return stream.commit(int(tokens_of(self.family, position + 2)[-1]), -1.0)
