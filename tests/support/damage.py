"""Flips single bytes of pages at rest: in K and V, in row checksums, in the fields that a seal vouches
for. Every flip changes something that a reader relies on."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np

from baton.handle import SupervisorHandle
from services.kv.arena import Arena
from services.kv.layout import PAGE_TOKENS, blocks_for
from services.kv.record import ACTIVE, StreamRecord

SEAL_FIELDS = ("magic", "group", "state", "key", "tokens", "checksum")
PLACES = ("payload", "row_crc", *SEAL_FIELDS)


def arena_of(cluster: SupervisorHandle, store: int) -> Arena:
    return Arena(Path(cluster.spec.arena_dir(store)))


def flip(arena: Arena, page: int, place: str, draw: random.Random, row: int | None = None) -> None:
    """Changes one byte of one page; of the given row, if the place has rows."""
    if place == "payload":
        layers = len(arena.layout.layers_of(int(arena.headers["group"][page])))
        row = draw.randrange(PAGE_TOKENS) if row is None else row
        where = (draw.randrange(layers), draw.randrange(2), draw.randrange(arena.layout.kv_heads))
        target = arena.page(page)[(*where, row)].view(np.uint8)
    elif place == "row_crc":
        row = draw.randrange(PAGE_TOKENS) if row is None else row
        target = arena.headers["row_crc"][page][row : row + 1].view(np.uint8)
    else:
        target = arena.headers[place][page : page + 1].view(np.uint8)
    target[draw.randrange(len(target))] ^= 1 << draw.randrange(8)


def only_record(arena: Arena) -> StreamRecord:
    """The one stream that is open."""
    records = [StreamRecord(arena, slot) for slot in range(arena.plan.streams)]
    (record,) = [record for record in records if record.number("state") == ACTIVE]
    return record


def prompt_page(arena: Arena, record: StreamRecord, index: int, group: int) -> int:
    return arena.page_id(int(record.prefill_table[index]), group)


def decode_page(arena: Arena, record: StreamRecord, index: int, group: int) -> int:
    """A page of decode's own table; `index` counts from the sequence's first block."""
    steps = record.commit()[1]
    assert index < blocks_for(record.number("prompt_tokens") + steps)
    return arena.page_id(int(record.decode_table[index]), group)
