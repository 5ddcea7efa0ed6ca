"""What the kv-store decides: which stream holds which blocks, and who may write them. Pure.

It knows no token's meaning, no socket and no memory: methods take facts and give back plans, which
`runtime.py` writes into the arena. See design.md section 4 for the rules; every decode epoch starts
the same way, by copying the open tail into a block of its own, so no block ever has two writers:

    prompt     | sealed ... | tail (prefill's) |
    epoch 1    | sealed ... | own tail | own ... |
    takeover   | sealed ........... | own tail | own ... |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from services.kv.layout import PAGE_TOKENS, blocks_for
from services.kv_store.index import PrefixIndex
from services.kv_store.pool import BlockPool
from services.ops.errors import Overloaded, RequestConflict, StaleEpoch, UnknownRequest

MayWrite = Callable[[str], bool]
MAX_EPOCH = 0xFFFFFFFF


@dataclass
class Stream:
    """One open request: its slot, its blocks and its writers."""

    request_id: str
    slot: int
    prompt_tokens: int
    max_new: int
    epoch: int
    attempt: int
    prefill_writer: str
    decode_writer: str
    keys: list[bytes]  # of the prompt's complete blocks
    prefill_table: list[int]
    decode_table: list[int]  # starts with the prompt's complete blocks
    cached_blocks: int = 0
    tail_source: int | None = None  # block whose committed rows the present epoch copies
    tail_rows: int = 0
    table_epoch: int = 0  # the decode epoch that the tables were made for
    held: list[int] = field(default_factory=list)  # former tails, kept until the stream ends
    fenced: set[str] = field(default_factory=set)  # former writers that have not said Stopped

    @property
    def prompt_blocks(self) -> int:
        """Complete blocks of the prompt, shared by both tables."""
        return self.prompt_tokens // PAGE_TOKENS

    def blocks(self) -> list[int]:
        """Every block this stream holds a lease on, each once."""
        tail = [] if self.tail_source is None else [self.tail_source]
        return [*dict.fromkeys([*self.prefill_table, *self.decode_table, *self.held, *tail])]

    def writers(self) -> set[str]:
        """Everybody who works or has worked on it, as far as they have not said Stopped."""
        return {self.prefill_writer, self.decode_writer, *self.fenced} - {""}


@dataclass
class KvState:
    """Pool, index and streams of one arena."""

    pool: BlockPool
    index: PrefixIndex
    slots: int
    streams: dict[str, Stream] = field(default_factory=dict)
    # slot -> (request, writer) pairs to wait for
    resting_slots: dict[int, set[tuple[str, str]]] = field(default_factory=dict)

    # --- opening ---

    def open(
        self, request_id: str, *, keys: list[bytes], prompt_tokens: int, max_new: int, epoch: int,
        attempt: int, prefill_writer: str, decode_writer: str, bypass_cache: bool = False,
    ) -> tuple[Stream, list[int]]:  # fmt: skip
        """Leases blocks for a stream. Gives it and the blocks that were evicted for it.

        The prompt's last token is always computed, so that its logits exist. Raises Overloaded,
        RequestConflict.
        """
        if request_id in self.streams:
            raise RequestConflict(f"request_id: {request_id!r} is open already")
        slot = self._free_slot()
        usable = keys[: (prompt_tokens - 1) // PAGE_TOKENS]
        cached = [] if bypass_cache else self.index.longest(usable)
        tail = prompt_tokens // PAGE_TOKENS
        fresh_prompt = blocks_for(prompt_tokens) - len(cached)
        fresh_decode = blocks_for(prompt_tokens + max_new - 1) - tail if max_new else 0
        for block in cached:
            self.pool.share(block)
        try:
            evicted = self._make_room(fresh_prompt + fresh_decode)
        except Overloaded:
            for block in cached:
                self.pool.drop(block)
            raise
        prefill_table = cached + self.pool.take(fresh_prompt, prefill_writer, attempt)
        decode_table = prefill_table[:tail] + self.pool.take(fresh_decode, decode_writer, epoch)
        partial = prompt_tokens % PAGE_TOKENS
        stream = Stream(
            request_id, slot, prompt_tokens, max_new, epoch, attempt, prefill_writer,
            decode_writer, keys, prefill_table, decode_table, len(cached),
            tail_source=prefill_table[tail] if partial else None, tail_rows=partial,
            table_epoch=epoch,
        )  # fmt: skip
        self.streams[request_id] = stream
        return stream, evicted

    def _free_slot(self) -> int:
        taken = {stream.slot for stream in self.streams.values()} | set(self.resting_slots)
        for slot in range(self.slots):
            if slot not in taken:
                return slot
        raise Overloaded(f"streams_max: all {self.slots} stream records are in use")

    def _make_room(self, count: int) -> list[int]:
        """Evicts least recently used cached blocks until `count` are free. Raises Overloaded."""
        evicted: list[int] = []
        self._check_room(count)
        while len(self.pool.free) < count:
            block = self.index.oldest(self._only_cached)
            assert block is not None
            self.index.remove(block)
            self.pool.drop(block)
            evicted.append(block)
        return evicted

    def _check_room(self, count: int) -> None:
        if count > len(self.pool.free) + self.evictable():
            raise Overloaded(
                f"arena: {count} blocks wanted, {len(self.pool.free)} free and "
                f"{self.evictable()} evictable of {self.pool.total}"
            )

    def _only_cached(self, block: int) -> bool:
        return self.pool.leases[block] == 1

    def evictable(self) -> int:
        return sum(self._only_cached(block) for block in self.index.keys)

    def stream(self, request_id: str) -> Stream:
        if request_id not in self.streams:
            raise UnknownRequest(f"request_id: {request_id!r} is not open in this store")
        return self.streams[request_id]

    # --- changing writers ---

    def check_epoch(self, stream: Stream, epoch: int, *, prefill: bool) -> None:
        """Refuses an epoch (for prefill: attempt) that is not newer than the present one."""
        present = stream.attempt if prefill else stream.epoch
        if epoch <= present:
            raise StaleEpoch(f"epoch: {epoch} is not newer than {present}")

    def reassign_decode(
        self, request_id: str, *, epoch: int, writer: str, committed: int, attached: bool,
        may_write: MayWrite,
    ) -> list[int]:  # fmt: skip
        """Gives the stream to another decode after its record has been fenced at `committed` steps.

        Complete blocks are inherited, the tail becomes the source of a copy, and every other block
        that the old epoch could write is freed or quarantined. Gives the quarantined blocks.
        """
        s = self.stream(request_id)
        kv_tokens = s.prompt_tokens + committed
        tail = kv_tokens // PAGE_TOKENS
        keep, rest = s.decode_table[:tail], s.decode_table[tail:]
        wanted = blocks_for(s.prompt_tokens + s.max_new - 1) - tail
        copied = attached and bool(kv_tokens % PAGE_TOKENS)
        freed = 0 if may_write(s.decode_writer) else len(rest) - copied
        self._check_room(wanted - freed)
        if attached:
            if s.tail_source is not None and s.tail_source not in s.prefill_table:
                s.held.append(s.tail_source)
            s.tail_rows = kv_tokens % PAGE_TOKENS
            s.tail_source = rest.pop(0) if s.tail_rows else None
        for block in keep[s.prompt_blocks :]:
            self.pool.finish_writing(block)
        lost = self._retire(rest, s.request_id, may_write)
        self._make_room(wanted)
        s.decode_table = keep + self.pool.take(wanted, writer, epoch)
        if may_write(s.decode_writer):
            s.fenced.add(s.decode_writer)
        s.epoch = s.table_epoch = epoch
        s.decode_writer = writer
        return lost

    def restart_at(self, stream: Stream, ready_tokens: int) -> int:
        """Where a second prefill begins: whole blocks are kept, the last token is computed again."""
        return min(ready_tokens, stream.prompt_tokens - 1) // PAGE_TOKENS * PAGE_TOKENS

    def reassign_prefill(
        self, request_id: str, *, attempt: int, writer: str, start: int, may_write: MayWrite
    ) -> list[int]:
        """Gives prefill from token `start` on to another worker, after its record has been fenced.

        Gives the quarantined blocks.
        """
        s = self.stream(request_id)
        first = start // PAGE_TOKENS
        old = s.prefill_table[first:]
        if not may_write(s.prefill_writer):
            for block in old:
                self.pool.hand_on(block, writer, attempt)
            fresh, lost = old, []
        else:
            self._make_room(len(old))
            fresh = self.pool.take(len(old), writer, attempt)
            lost = self._retire(old, s.request_id, may_write)
            s.fenced.add(s.prefill_writer)
        s.attempt, s.prefill_writer = attempt, writer
        s.prefill_table = s.prefill_table[:first] + fresh
        s.decode_table[: s.prompt_blocks] = s.prefill_table[: s.prompt_blocks]
        if s.tail_source is not None and s.tail_source in old:
            s.tail_source = s.prefill_table[s.prompt_blocks]
        return lost

    def _retire(self, blocks: list[int], request_id: str, may_write: MayWrite) -> list[int]:
        return [block for block in blocks if self.pool.retire(block, request_id, may_write)]

    # --- sharing and ending ---

    def publish(self, request_id: str, ready_tokens: int) -> list[tuple[int, bytes]]:
        """Makes the prompt's complete blocks findable. Gives (block, key) of the new entries."""
        s = self.stream(request_id)
        complete = min(ready_tokens, s.prompt_tokens) // PAGE_TOKENS
        return self._index(s.prefill_table[:complete], s.keys[:complete])

    def _index(self, blocks: list[int], keys: list[bytes]) -> list[tuple[int, bytes]]:
        added = []
        for block, key in zip(blocks, keys, strict=True):
            if block not in self.index and self.index.add(key, block):
                self.pool.share(block)
                self.pool.finish_writing(block)
                added.append((block, key))
        return added

    def release(
        self, request_id: str, *, keys: list[bytes], may_write: MayWrite
    ) -> tuple[Stream, list[int]]:
        """Ends a stream. `keys` are those of its leading complete blocks that become prefix cache.

        Gives the stream and the blocks that went into quarantine.
        """
        s = self.stream(request_id)
        del self.streams[request_id]
        table = s.decode_table if s.max_new else s.prefill_table
        self._index(table[: len(keys)], keys)
        quarantined = []
        for block in s.blocks():
            if self.pool.leases[block] > 1:
                self.pool.drop(block)
            elif self.pool.retire(block, request_id, may_write):
                quarantined.append(block)
        waiting = {(request_id, writer) for writer in s.writers() if may_write(writer)}
        if waiting:
            self.resting_slots[s.slot] = waiting
        return s, quarantined

    def invalidate(self, blocks: list[int]) -> None:
        """Takes blocks out of the index: their content failed verification."""
        for block in blocks:
            if block in self.index:
                self.index.remove(block)
                self.pool.drop(block)

    def sweep(
        self, may_write: MayWrite, stopped: tuple[str, str] | None = None,
        idle: tuple[str, frozenset[str]] | None = None, epoch: int = MAX_EPOCH,
    ) -> tuple[list[int], list[int]]:  # fmt: skip
        """Ends quarantines whose writer is gone, has `stopped` = (request, writer), or is `idle` =
        (writer, all requests it still works on); what a writer got after `epoch` is not meant.

        Gives the freed blocks and slots.
        """

        def let_go(request_id: str, writer: str, since: int = 0) -> bool:
            if not may_write(writer):
                return True
            if (request_id, writer) == stopped:
                return since <= epoch
            working = idle is None or writer != idle[0] or request_id in idle[1]
            return not working and since <= epoch

        done = [
            block
            for block, why in self.pool.quarantined.items()
            if let_go(why.request_id, why.writer, why.epoch)
        ]
        self.pool.release_quarantine(done)
        for stream in self.streams.values():
            stream.fenced = {w for w in stream.fenced if not let_go(stream.request_id, w)}
        slots = []
        for slot, waiting in list(self.resting_slots.items()):
            waiting -= {pair for pair in waiting if let_go(*pair)}
            if not waiting:
                del self.resting_slots[slot]
                slots.append(slot)
        return done, slots

    def check_invariants(self) -> None:
        self.pool.check_invariants()
        holders: dict[int, int] = dict.fromkeys(self.index.keys, 1)
        for stream in self.streams.values():
            for block in stream.blocks():
                holders[block] = holders.get(block, 0) + 1
        assert holders == self.pool.leases, "leases and holders differ"
        slots = [stream.slot for stream in self.streams.values()]
        assert len(slots) == len(set(slots)), "two streams in one slot"
        assert not set(slots) & set(self.resting_slots), "a resting slot is in use"
