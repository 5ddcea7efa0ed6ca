"""Whether stored K and V are what their writer stored, for these very tokens. Fails closed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from services.kv.arena import Arena
from services.kv.identity import RowIdentity
from services.kv.layout import PAGE_TOKENS
from services.ops.errors import CorruptKv


def verify_rows(
    arena: Arena,
    blocks: NDArray[np.uint32],
    identity: RowIdentity,
    group: int,
    begin: int,
    end: int,
) -> None:
    """Checks the rows of tokens [begin, end) of one layer group. `blocks` is the sequence's table.

    Raises CorruptKv with the block at fault.
    """
    if begin >= end:
        return
    positions = np.arange(begin, end, dtype=np.int32)
    pages = blocks[positions // PAGE_TOKENS] + np.uint32(group * arena.plan.blocks)
    bad = int(
        arena.native.verify_rows(
            pages.astype(np.uint32), positions % PAGE_TOKENS, identity.seeds[begin:end], group
        )
    )
    if bad >= 0:
        token = begin + bad
        raise CorruptKv(
            f"token {token}, layer group {group}: checksum differs", block=token // PAGE_TOKENS
        )
