"""Single bytes of pages and files at rest, changed behind everybody's back. Knows where a page's bytes
lie and which of them its readers rely on; it starts nothing and waits for nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np

from services.kv.arena import HEADER, SEALED, Arena
from services.kv.identity import block_keys, root_key
from services.kv.layout import PAGE_TOKENS
from services.kv.record import ACTIVE, StreamRecord

# What a reader of a sealed page checks beside its rows, and what nobody reads while a page is at rest.
SEAL_FIELDS = ("magic", "group", "state", "key", "tokens", "checksum")
OWN_FIELDS = ("magic", "group")  # of them, those that the store writes, again and again
INERT_FIELDS = ("version", "epoch", "block", "stamp", "padding")
PAYLOAD_SHARE, ROW_CRC_SHARE, SEAL_SHARE = 0.6, 0.15, 0.15  # the rest: inert fields


@dataclass(frozen=True)
class Held:
    """A block with `rows` rows that somebody will read."""

    block: int
    rows: int


@dataclass(frozen=True)
class Flip:
    """One byte of one page that has been changed. `part`: payload, row_crc or a header field, or, of a
    block's file, file_head, file_content or file_checksum."""

    page: int  # -1: a file
    part: str
    offset: int  # within the part
    matters: bool  # whether a reader relies on this byte


def open_arena(directory: str) -> Arena:
    """A mapping of its own, which outlives the processes that are killed."""
    return Arena(Path(directory))


def find_stream(arena: Arena, request_id: str) -> StreamRecord | None:
    """The record of an open request."""
    for slot in range(arena.plan.streams):
        record = StreamRecord(arena, slot)
        if record.number("state") == ACTIVE and record.text("request_id") == request_id:
            return record
    return None


def announced(record: StreamRecord) -> list[Held]:
    """What prefill has handed over: all blocks of the prompt."""
    return _held(record.prefill_table, record.number("prompt_tokens"))


def committed(record: StreamRecord) -> list[Held]:
    """What a decode holds: the prompt and every committed row of its own, the open tail included."""
    return _held(record.decode_table, record.number("prompt_tokens") + record.commit()[1])


def _held(table: np.ndarray, tokens: int) -> list[Held]:
    starts = range(0, tokens, PAGE_TOKENS)
    return [
        Held(int(table[start // PAGE_TOKENS]), min(PAGE_TOKENS, tokens - start)) for start in starts
    ]


def cached(arena: Arena, tenant: str, tokens: Sequence[int]) -> list[Held]:
    """The blocks that the prefix cache would serve this prompt from."""
    root = root_key(arena.plan.fingerprint, tenant)
    headers = arena.headers[: arena.plan.blocks]  # of the first layer group
    found = []
    for key in block_keys(root, tokens)[: (len(tokens) - 1) // PAGE_TOKENS]:
        same = (headers["key"] == np.void(key)) & (headers["state"] == SEALED)
        blocks = np.flatnonzero(same & (headers["quarantined"] == 0))
        if not len(blocks):
            break  # the chain ends with the first block that is missing
        found.append(Held(int(blocks[0]), PAGE_TOKENS))
    return found


def flip(arena: Arena, held: Held, rng: Random) -> Flip:
    """Changes one byte of one of the block's pages, drawn over layer groups, header and payload."""
    page = arena.page_id(held.block, rng.randrange(arena.layout.groups))
    sealed = held.rows == PAGE_TOKENS and arena.headers["state"][page] == SEALED
    draw = rng.random()
    if draw < PAYLOAD_SHARE:
        return _flip_payload(arena, page, rng.randrange(held.rows), rng)
    if draw < PAYLOAD_SHARE + ROW_CRC_SHARE:
        target = arena.headers["row_crc"][page].view(np.uint8)
        offset = rng.randrange(4 * held.rows)
        return _change(target, page, "row_crc", offset, True, rng)
    matters = sealed and draw < PAYLOAD_SHARE + ROW_CRC_SHARE + SEAL_SHARE
    field = rng.choice(SEAL_FIELDS if matters else INERT_FIELDS)
    dtype, begin = HEADER.fields[field][:2]  # type: ignore[index]
    whole = arena.headers[page : page + 1].view(np.uint8)
    offset = rng.randrange(dtype.itemsize)
    _change(whole[begin : begin + dtype.itemsize], page, field, offset, matters, rng)
    return Flip(page, field, offset, matters)


def flip_file(path: Path, rng: Random) -> Flip:
    """Changes one byte of a block's file: of its head or its checksum as likely as of its content,
    which is far longer. Readers rely on all of them."""
    size = path.stat().st_size
    begin, end, part = rng.choice(
        ((0, 64, "file_head"), (64, size - 4, "file_content"), (size - 4, size, "file_checksum"))
    )
    offset = rng.randrange(begin, end)
    with path.open("r+b") as file:
        file.seek(offset)
        [byte] = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ rng.randrange(1, 256)]))
    return Flip(-1, part, offset - begin, matters=True)


def _flip_payload(arena: Arena, page: int, row: int, rng: Random) -> Flip:
    """page = [layer][K, V][head][row][byte]"""
    bytes_of = arena.page(page).view(np.uint8)
    _, kv, head, _, byte = (rng.randrange(n) for n in bytes_of.shape)
    layer = rng.randrange(len(arena.layout.layers_of(int(page // arena.plan.blocks))))
    bytes_of[layer, kv, head, row, byte] ^= rng.randrange(1, 256)
    offset = int(np.ravel_multi_index((layer, kv, head, row, byte), bytes_of.shape))
    return Flip(page, "payload", offset, matters=True)


def _change(
    target: np.ndarray, page: int, part: str, offset: int, matters: bool, rng: Random
) -> Flip:
    target[offset] ^= rng.randrange(1, 256)
    return Flip(page, part, offset, matters)
