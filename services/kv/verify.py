"""Whether stored K and V are what their writer stored, for these very tokens. Fails closed.

Rows are checked against their checksums, which are bound to the tokens; a complete block's headers
against the seal: state, key, group, count and the checksum over the row checksums.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from services.kv.arena import PAGE_MAGIC, SEALED, Arena
from services.kv.identity import RowIdentity
from services.kv.layout import PAGE_TOKENS
from services.ops.errors import CorruptKv

NONE: frozenset[int] = frozenset()


def verify_rows(
    arena: Arena,
    blocks: NDArray[np.uint32],
    identity: RowIdentity,
    group: int,
    begin: int,
    end: int,
    *,
    skip: frozenset[int] = NONE,
    seals: bool = True,
) -> None:
    """Checks the rows of tokens [begin, end) of one layer group, and with `seals` those of the blocks
    that end there. `blocks` is the sequence's table; blocks in `skip` are not looked at.

    Raises CorruptKv with all blocks at fault.
    """
    bad = bad_rows(arena, blocks, identity, group, begin, end, skip)
    if seals:
        bad |= bad_seals(arena, blocks, identity, group, begin, end, skip)
    if bad:
        raise CorruptKv(f"blocks {sorted(bad)}, layer group {group}: not what was stored", [*bad])


def verify_groups(
    arena: Arena, blocks: NDArray[np.uint32], identity: RowIdentity, begin: int, end: int,
    *, skip: frozenset[int] = NONE, seals: bool = True,
) -> None:  # fmt: skip
    """`verify_rows` of all layer groups. Raises CorruptKv with all blocks at fault in any of them."""
    bad: set[int] = set()
    for group in range(arena.layout.groups):
        try:
            verify_rows(arena, blocks, identity, group, begin, end, skip=skip, seals=seals)
        except CorruptKv as error:
            bad.update(error.blocks)
    if bad:
        raise CorruptKv(f"blocks {sorted(bad)}: not what was stored", [*bad])


def bad_rows(
    arena: Arena, blocks: NDArray[np.uint32], identity: RowIdentity, group: int, begin: int,
    end: int, skip: frozenset[int],
) -> set[int]:  # fmt: skip
    """Blocks with a row in [begin, end) whose K and V are not what its checksum says."""
    bad: set[int] = set()
    for first, last in _spans(begin, end, skip):
        while first < last:
            seeds = identity.seeds[first:last]
            token = int(arena.native.verify_tokens(blocks, first, seeds, group))
            if token < 0:
                break
            bad.add(token // PAGE_TOKENS)
            first = (token // PAGE_TOKENS + 1) * PAGE_TOKENS
    return bad


def _spans(begin: int, end: int, skip: frozenset[int]) -> Iterator[tuple[int, int]]:
    """[begin, end) without the tokens of the blocks in `skip`."""
    for block in sorted(skip):
        if begin < block * PAGE_TOKENS < end:
            yield begin, block * PAGE_TOKENS
        if block * PAGE_TOKENS < end:
            begin = max(begin, (block + 1) * PAGE_TOKENS)
    if begin < end:
        yield begin, end


def bad_seals(
    arena: Arena, blocks: NDArray[np.uint32], identity: RowIdentity, group: int, begin: int,
    end: int, skip: frozenset[int],
) -> set[int]:  # fmt: skip
    """Blocks that end in (begin, end] and are not sealed for these tokens in this layer group."""
    whole = [b for b in range(begin // PAGE_TOKENS, end // PAGE_TOKENS) if b not in skip]
    if not whole:
        return set()
    pages = blocks[whole] + np.uint32(group * arena.plan.blocks)
    headers = arena.headers[pages]
    keys = np.frombuffer(b"".join(identity.key(block) for block in whole), "V16")
    seals = arena.native.seal_checksums(pages.astype(np.uint32))
    good = (headers["state"] == SEALED) & (headers["group"] == group) & (headers["key"] == keys)
    good &= (headers["magic"] == PAGE_MAGIC) & (headers["tokens"] == PAGE_TOKENS)
    good &= headers["checksum"] == seals
    return {block for block, fine in zip(whole, good, strict=True) if not fine}


def sealed(arena: Arena, block: int) -> bool:
    """Whether every page of a block is sealed: its writer has come to its end."""
    return bool((arena.headers["state"][block :: arena.plan.blocks] == SEALED).all())
