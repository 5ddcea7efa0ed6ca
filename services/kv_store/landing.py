"""How pages from another arena come down in this one: checked for their place, copied once, verified
row by row against the tokens they belong to, and only then announced.

    | ready: never written again | rows of this message, verified here | not yet |
                                 ^ `ready` moves behind them, or not at all
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from services.kv.arena import Arena
from services.kv.identity import RowIdentity
from services.kv.layout import PAGE_TOKENS, blocks_for
from services.kv.record import StreamRecord
from services.kv.runs import ROW_SUMS_BYTES, slices
from services.kv.verify import NONE, bad_rows
from services.ops.errors import LayoutMismatch, StaleEpoch
from services.wire.stream import Code

_NO_SEEDS = np.zeros(0, np.uint32)


class NotTaken(Exception):
    """A message that has to come again, from `tokens` of `group` on; `block` is the one at fault."""

    def __init__(self, code: Code, group: int, tokens: int, words: str, block: int = 0) -> None:
        super().__init__(words)
        self.code, self.group, self.tokens, self.words = code, group, tokens, words
        self.block = block


class Landing:
    """Writes into the tables of open streams, for the attempt that owns them. Runs on the store's one
    thread, so nobody is fenced between the check and the copy."""

    def __init__(self, arena: Arena, *, verify: bool = True) -> None:
        self._arena, self._verify = arena, verify
        self._records: dict[int, StreamRecord] = {}  # by slot: places, whoever is in them
        self._identities: dict[int, tuple[int, RowIdentity]] = {}  # slot -> (generation, identity)
        self.repeated = 0  # messages that had come before
        self.damaged = 0  # messages whose rows failed their checksums

    def record(self, slot: int, attempt: int) -> StreamRecord:
        """The record that this attempt may fill. Raises LayoutMismatch, StaleEpoch."""
        if slot >= self._arena.plan.streams:
            raise LayoutMismatch(f"slot: {slot} is outside this arena")
        record = self._records.get(slot)
        if record is None:
            record = self._records[slot] = StreamRecord(self._arena, slot)
        owner = record.first()[0]
        if owner != attempt:
            raise StaleEpoch(f"attempt: {attempt} does not own slot {slot}, {owner} does")
        return record

    def pages(
        self, record: StreamRecord, attempt: int, group: int, first_block: int, tokens: int,
        frames: Sequence[memoryview],
    ) -> None:  # fmt: skip
        """Tokens up to `tokens` of one layer group, whole pages from `first_block` on. `frames`: row
        checksums uint32[blocks, 64], then pages, cut anywhere.

        Raises LayoutMismatch for what lies outside the stream, NotTaken when it has to come again.
        """
        blocks = blocks_for(tokens) - first_block
        self._check(record, group, blocks, tokens, frames)
        have = record.ready(group)[1]
        if tokens <= have:
            self.repeated += 1
            return  # it came before: what others may be reading is not touched
        if first_block * PAGE_TOKENS > have:
            words = f"group {group}: tokens {have} to {first_block * PAGE_TOKENS} have not come"
            raise NotTaken(Code.GAP, group, have, words)
        table = np.array(record.prefill_table[: blocks_for(tokens)])
        identity = self._identity(record)
        bad = self._land(table, identity, group, first_block, have, tokens, frames)
        if bad is not None:
            self.damaged += 1
            words = f"block {bad}, layer group {group}: not what its checksums say"
            raise NotTaken(Code.CORRUPT, group, have, words, bad)
        begin, end = have // PAGE_TOKENS, tokens // PAGE_TOKENS
        self._arena.native.seal_blocks(table[begin:end], group, identity.keys(begin, end))
        if not record.set_ready(group, attempt, tokens):
            raise StaleEpoch(f"attempt: {attempt} has been fenced")

    def first(self, record: StreamRecord, attempt: int, token: int, logprob: float) -> None:
        """The first token, once every group is complete."""
        for group in range(self._arena.layout.groups):
            have = record.ready(group)[1]
            if have < record.number("prompt_tokens"):
                words = f"group {group}: tokens from {have} on have not come"
                raise NotTaken(Code.GAP, group, have, words)
        if not record.publish_first(attempt, token, logprob):
            raise StaleEpoch(f"attempt: {attempt} has been fenced")

    def check_place(self, record: StreamRecord, group: int, tokens: int) -> None:
        """Raises LayoutMismatch for what lies outside the stream."""
        if group >= self._arena.layout.groups or not 0 < tokens <= record.number("prompt_tokens"):
            raise LayoutMismatch(f"pages: group {group}, tokens {tokens} are outside the stream")

    def _check(
        self, record: StreamRecord, group: int, blocks: int, tokens: int,
        frames: Sequence[memoryview],
    ) -> None:  # fmt: skip
        self.check_place(record, group, tokens)
        layout = self._arena.layout
        if blocks < 1:
            raise LayoutMismatch(f"pages: {blocks} blocks end at tokens {tokens}")
        sizes = [len(frame) for frame in frames]
        want = [blocks * ROW_SUMS_BYTES, blocks * layout.page_bytes]
        if not sizes or [sizes[0], sum(sizes[1:])] != want:
            raise LayoutMismatch(f"pages: frames of {sizes} bytes do not carry {blocks} pages")

    def _land(
        self, table: NDArray[np.uint32], identity: RowIdentity, group: int, first_block: int,
        have: int, tokens: int, frames: Sequence[memoryview],
    ) -> int | None:  # fmt: skip
        """Copies and verifies. Blocks that are complete here are left alone; of one that is begun, the
        rows that follow. The first block that is not what it was stored as, if there is one."""
        block, row = divmod(have, PAGE_TOKENS)
        sums = np.frombuffer(frames[0], np.uint32).reshape(-1, PAGE_TOKENS)
        if row:
            self._copy_rows(int(table[block]), group, block - first_block, row, sums, frames[1:])
            block += 1
            begun_until = min(tokens, block * PAGE_TOKENS)
            if self._verify and bad_rows(
                self._arena, table, identity, group, have, begun_until, NONE
            ):
                return block - 1
        skip = block - first_block
        seeds = identity.seeds[block * PAGE_TOKENS : tokens] if self._verify else _NO_SEEDS
        bad: int = self._arena.native.land(
            table[block:], group, frames[1:], skip, sums[skip:], seeds
        )
        return None if bad < 0 else block + bad // PAGE_TOKENS

    def _copy_rows(
        self, block: int, group: int, index: int, row: int, sums: NDArray[np.uint32],
        frames: Sequence[memoryview],
    ) -> None:  # fmt: skip
        layout, page = self._arena.layout, self._arena.page_id(block, group)
        pieces = list(slices(frames, index * layout.page_bytes, layout.page_bytes))
        came = np.frombuffer(b"".join(pieces), layout.dtype).reshape(layout.page_shape)
        self._arena.page(page)[..., row:, :] = came[..., row:, :]
        self._arena.headers["row_crc"][page, row:] = sums[index, row:]

    def _identity(self, record: StreamRecord) -> RowIdentity:
        """Of the whole prompt; made once for each stream that a slot holds."""
        generation = record.number("generation")
        known = self._identities.get(record.slot)
        if known is None or known[0] != generation:
            tokens = np.array(record.tokens[: record.number("prompt_tokens")])
            known = (generation, RowIdentity(record.root, tokens, len(tokens)))
            self._identities[record.slot] = known
        return known[1]
