"""What the kv-store decides: which stream holds which blocks, and who may write them. Pure.

It knows no token's meaning, no socket and no memory: methods take facts and give back plans, which
`runtime.py` writes into the arena. See design.md section 4 for the rules; every decode epoch starts
the same way, by copying the open tail into a block of its own, so no block ever has two writers:

    prompt     | sealed ... | tail (prefill's) |
    epoch 1    | sealed ... | own tail | own ... |
    takeover   | sealed ........... | own tail | own ... |
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from services.kv.layout import PAGE_TOKENS, blocks_for
from services.kv_store.index import PrefixIndex
from services.kv_store.pins import PinTable
from services.kv_store.pool import BlockPool
from services.ops.errors import NeverFits, Overloaded, RequestConflict, StaleEpoch, UnknownRequest

MayWrite = Callable[[str], bool]
Filled = Callable[[int], bool]  # whether a block's writer has come to its end
MAX_EPOCH = 0xFFFFFFFF
CLOSED_MAX = 4096  # closed streams whose epochs are remembered


def _never(_block: int) -> bool:
    return False


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
    held: list[int] = field(default_factory=list)  # former tails and damaged blocks, until the end
    repairs: dict[int, int] = field(default_factory=dict)  # index in the tables -> damaged block
    table_attempt: int = 0  # the prefill attempt that the tables were made for
    prefill_start: int = 0  # the token from which the present attempt computes
    # Former writers that have not said Stopped, and the last epoch or attempt that each got.
    fenced: dict[str, int] = field(default_factory=dict)

    @property
    def prompt_blocks(self) -> int:
        """Complete blocks of the prompt, shared by both tables."""
        return self.prompt_tokens // PAGE_TOKENS

    def blocks(self) -> list[int]:
        """Every block this stream holds a lease on, each once."""
        tail = [] if self.tail_source is None else [self.tail_source]
        return [*dict.fromkeys([*self.prefill_table, *self.decode_table, *self.held, *tail])]

    def writers(self) -> dict[str, int]:
        """Everybody who works or has worked on it, as far as they have not said Stopped, and the last
        epoch or attempt that each got."""
        writers = dict(self.fenced)
        present = {self.prefill_writer: self.table_attempt, self.decode_writer: self.table_epoch}
        for writer, epoch in present.items():
            if writer:
                writers[writer] = max(writers.get(writer, 0), epoch)
        return writers

    def fence(self, writer: str, epoch: int) -> None:
        """`writer` got the stream under `epoch`, has lost it, and may still be there."""
        self.fenced[writer] = max(self.fenced.get(writer, 0), epoch)


@dataclass
class KvState:
    """Pool, index and streams of one arena."""

    pool: BlockPool
    index: PrefixIndex
    slots: int
    streams: dict[str, Stream] = field(default_factory=dict)
    closed: dict[str, int] = field(default_factory=dict)  # request -> its last epoch
    # slot -> (request, writer) pairs to wait for, with the last epoch or attempt of each
    resting_slots: dict[int, dict[tuple[str, str], int]] = field(default_factory=dict)
    pins: PinTable = field(default_factory=PinTable)
    torn: set[int] = field(default_factory=set)  # whose header has to be written anew
    # Blocks on their way to or from another tier. Both are leases: nobody evicts or reuses them.
    copying: Counter[int] = field(default_factory=Counter)  # block -> copies being made of it
    filling: set[int] = field(default_factory=set)  # being filled, for the prefix index

    # --- opening ---

    def open(
        self, request_id: str, *, keys: list[bytes], prompt_tokens: int, max_new: int, epoch: int,
        attempt: int, prefill_writer: str, decode_writer: str, bypass_cache: bool = False,
    ) -> tuple[Stream, list[int]]:  # fmt: skip
        """Leases blocks for a stream. Gives it and the blocks that were evicted for it.

        The prompt's last token is always computed, so that its logits exist. Raises Overloaded,
        RequestConflict, NeverFits, and StaleEpoch for the late words of a scheduler that is no more.
        """
        if request_id in self.streams:
            raise RequestConflict(f"request_id: {request_id!r} is open already")
        if epoch <= self.closed.get(request_id, 0):
            raise StaleEpoch(f"epoch: {epoch} of {request_id!r} has been closed here")
        slot = self._free_slot()
        usable = keys[: (prompt_tokens - 1) // PAGE_TOKENS]
        cached = [] if bypass_cache else self.index.longest(usable)
        tail = prompt_tokens // PAGE_TOKENS
        fresh_prompt = blocks_for(prompt_tokens) - len(cached)
        fresh_decode = blocks_for(prompt_tokens + max_new - 1) - tail if max_new else 0
        self._check_size(fresh_prompt + fresh_decode, cached)
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
            table_epoch=epoch, table_attempt=attempt, prefill_start=len(cached) * PAGE_TOKENS,
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

    # --- copies to and from other tiers ---

    def begin_copy(self, blocks: Iterable[int]) -> None:
        """These sealed blocks stay as they are until `end_copy`."""
        for block in blocks:
            assert block in self.index, f"block {block} may still be written"
            self.pool.share(block)
            self.copying[block] += 1

    def end_copy(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            assert self.copying[block] > 0, f"block {block} is not being copied"
            self.copying[block] -= 1
            self.pool.drop(block)
        self.copying = +self.copying

    def begin_fill(self, count: int) -> list[int]:
        """At most `count` blocks to be filled from another tier: as many as there is room for."""
        count = min(count, len(self.pool.free) + self.evictable())
        self._make_room(count)
        blocks = self.pool.take(count, "")
        self.filling.update(blocks)
        return blocks

    def end_fill(self, keys: Sequence[bytes], blocks: Sequence[int]) -> None:
        """The leading blocks hold what `keys` name, and can be found from now on, where nobody else
        was faster; the others are free again."""
        assert self.filling.issuperset(blocks)
        self.filling.difference_update(blocks)
        for at, block in enumerate(blocks):
            if at < len(keys) and self.index.add(keys[at], block):
                self.pool.finish_writing(block)
            else:
                self.pool.drop(block)
        self.index.longest(keys)

    def _check_room(self, count: int) -> None:
        if count > len(self.pool.free) + self.evictable():
            raise Overloaded(
                f"arena: {count} blocks wanted, {len(self.pool.free)} free and "
                f"{self.evictable()} evictable of {self.pool.total}"
            )

    def _check_size(self, fresh: int, cached: list[int]) -> None:
        """Raises NeverFits when an arena without anybody else would not have the room either."""
        pinned = {self.index.blocks[key] for key in self.pins if key in self.index.blocks}
        room = self.pool.total - len(pinned - set(cached))
        if fresh + len(cached) > room:
            raise NeverFits(
                f"arena: {fresh + len(cached)} blocks wanted, {room} of {self.pool.total} are not pinned"
            )

    def _only_cached(self, block: int) -> bool:
        return self.pool.leases[block] == 1 and self.index.keys[block] not in self.pins

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
        may_write: MayWrite, repair: Iterable[int] = (), filled: Filled = _never,
    ) -> list[int]:  # fmt: skip
        """Gives the stream to another decode after its record has been fenced at `committed` steps.

        Complete blocks are inherited, the tail becomes the source of a copy, and every other block
        that the old epoch could write is freed or quarantined. For a block in `repair` the new epoch
        gets a fresh one, to compute it again, as for one that the old epoch has not `filled`. Gives
        the quarantined blocks.
        """
        s = self.stream(request_id)
        kv_tokens = s.prompt_tokens + committed
        tail = kv_tokens // PAGE_TOKENS
        keep, rest = s.decode_table[:tail], s.decode_table[tail:]
        wanted = blocks_for(s.prompt_tokens + s.max_new - 1) - tail
        repairs = self.repairs(s, repair, filled, attached=attached)
        whole = {index: damaged for index, damaged in repairs.items() if index < tail}
        self.check_decode_room(s, committed, len(whole), attached=attached, may_write=may_write)
        if attached:
            if s.tail_source is not None and s.tail_source not in s.prefill_table:
                s.held.append(s.tail_source)
            s.tail_rows = kv_tokens % PAGE_TOKENS
            s.tail_source = rest.pop(0) if s.tail_rows else None
        for index, block in enumerate(keep):
            if index not in repairs and (index >= s.prompt_blocks or index in s.repairs):
                self.pool.finish_writing(block)
        lost = self._retire(rest, s.request_id, may_write)
        self._make_room(wanted + len(whole))
        s.decode_table = keep + self.pool.take(wanted, writer, epoch)
        lost += self._replace(s, whole, writer, epoch, may_write)
        s.repairs = whole
        if s.tail_source is not None and tail in repairs:
            s.repairs[tail] = s.tail_source
        if may_write(s.decode_writer):
            s.fence(s.decode_writer, s.table_epoch)
        s.epoch = s.table_epoch = epoch
        s.decode_writer = writer
        return lost

    def check_decode_room(
        self, s: Stream, committed: int, repairs: int, *, attached: bool, may_write: MayWrite
    ) -> None:
        """Whether another decode could get its pages. Asked before the present one is fenced: a stream
        that nobody could take over stays with whoever has it, and goes on when that one wakes up.

        Raises Overloaded.
        """
        kv_tokens = s.prompt_tokens + committed
        tail = kv_tokens // PAGE_TOKENS
        wanted = blocks_for(s.prompt_tokens + s.max_new - 1) - tail
        copied = attached and bool(kv_tokens % PAGE_TOKENS)
        freed = 0 if may_write(s.decode_writer) else len(s.decode_table) - tail - copied
        self._check_room(wanted + repairs - freed)

    def check_prefill_room(
        self, s: Stream, start: int, repairs: int, *, may_write: MayWrite
    ) -> None:
        """The same for prefill from token `start` on. Raises Overloaded."""
        old = s.prefill_table[start // PAGE_TOKENS :]
        shared = sum(self.pool.leases[block] > 1 for block in old)
        self._check_room(repairs + (len(old) if may_write(s.prefill_writer) else shared))

    def repairs(
        self, s: Stream, asked: Iterable[int], filled: Filled, *, attached: bool = False
    ) -> dict[int, int]:
        """Index -> damaged block: what is asked for, and what was asked for and not done. The damaged
        block of a fresh one that was never filled is still the first one. A decode that has attached
        has filled all of its own."""
        table = s.decode_table or s.prefill_table
        before = {} if attached else s.repairs
        left = {i: damaged for i, damaged in before.items() if not filled(table[i])}
        return {i: table[i] for i in asked if i < len(table)} | left

    def _replace(
        self, s: Stream, repairs: dict[int, int], writer: str, epoch: int, may_write: MayWrite
    ) -> list[int]:
        """Puts fresh blocks where damaged ones are; these are kept until the stream ends, for the
        proof, and nobody else finds them. Gives the blocks that went into quarantine."""
        lost = []
        for index, damaged in repairs.items():
            present = (s.decode_table or s.prefill_table)[index]
            (fresh,) = self.pool.take(1, writer, epoch)
            for table in (s.prefill_table, s.decode_table):
                if index < len(table) and table[index] == present:
                    table[index] = fresh
            self.invalidate([present])
            if present == damaged:
                s.held.append(damaged)
            else:
                lost += self._retire([present], s.request_id, may_write)
        return lost

    def restart_at(self, stream: Stream, ready_tokens: int) -> int:
        """Where a second prefill begins: whole blocks are kept, the last token is computed again."""
        return min(ready_tokens, stream.prompt_tokens - 1) // PAGE_TOKENS * PAGE_TOKENS

    def reassign_prefill(
        self, request_id: str, *, attempt: int, writer: str, start: int, may_write: MayWrite,
        repair: Iterable[int] = (), filled: Filled = _never,
    ) -> list[int]:  # fmt: skip
        """Gives prefill from token `start` on to another worker, after its record has been fenced; it
        gets fresh blocks for those before `start` that are in `repair`.

        Gives the quarantined blocks.
        """
        s = self.stream(request_id)
        first = start // PAGE_TOKENS
        old = s.prefill_table[first:]
        repairs = self.repairs(s, repair, filled)
        repairs = {index: damaged for index, damaged in repairs.items() if index < first}
        gone = not may_write(s.prefill_writer)
        shared = {block for block in old if self.pool.leases[block] > 1}  # cached, others read them
        self._make_room(len(repairs) + (len(shared) if gone else len(old)))
        fresh, lost = [], []
        for block in old:
            if gone and block not in shared:
                self.pool.hand_on(block, writer, attempt)
                fresh.append(block)
                continue
            fresh += self.pool.take(1, writer, attempt)
            if block in shared:
                self.pool.drop(block)
            else:
                lost += self._retire([block], s.request_id, may_write)
        if not gone:
            s.fence(s.prefill_writer, s.table_attempt)
        s.cached_blocks = min(s.cached_blocks, first)
        s.attempt = s.table_attempt = attempt
        s.prefill_writer = writer
        s.prefill_table = s.prefill_table[:first] + fresh
        s.decode_table[: s.prompt_blocks] = s.prefill_table[: s.prompt_blocks]
        if s.tail_source is not None and s.tail_source in old:
            s.tail_source = s.prefill_table[s.prompt_blocks]
        s.prefill_start, s.repairs = start, repairs
        return lost + self._replace(s, repairs, writer, attempt, may_write)

    def _retire(self, blocks: list[int], request_id: str, may_write: MayWrite) -> list[int]:
        return [block for block in blocks if self.pool.retire(block, request_id, may_write)]

    # --- sharing and ending ---

    def publish(self, request_id: str, ready_tokens: int) -> list[tuple[int, bytes]]:
        """Prefill has left: nobody waits for it any more, and the prompt's complete blocks can be
        found. Gives (block, key) of the new entries."""
        s = self.stream(request_id)
        s.prefill_writer = ""
        complete = min(ready_tokens, s.prompt_tokens) // PAGE_TOKENS
        return self._index(s.prefill_table[:complete], s.keys[:complete])

    def _index(self, blocks: list[int], keys: list[bytes]) -> list[tuple[int, bytes]]:
        added = []
        for block, key in zip(blocks, keys, strict=True):
            if block not in self.index and self.index.add(key, block):
                self.pool.share(block)
                self.pool.finish_writing(block)
                added.append((block, key))
        self.index.longest(keys)
        return added

    def release(
        self, request_id: str, *, keys: list[bytes], may_write: MayWrite
    ) -> tuple[Stream, list[int]]:
        """Ends a stream. `keys` are those of its leading complete blocks that become prefix cache.

        Gives the stream and the blocks that went into quarantine.
        """
        s = self.stream(request_id)
        del self.streams[request_id]
        self.closed[request_id] = max(s.epoch, s.attempt)
        while len(self.closed) > CLOSED_MAX:
            del self.closed[next(iter(self.closed))]
        table = s.decode_table if s.max_new else s.prefill_table
        self._index(table[: len(keys)], keys)
        quarantined = []
        for block in s.blocks():
            if self.pool.leases[block] > 1:
                self.pool.drop(block)
            elif self.pool.retire(block, request_id, may_write):
                quarantined.append(block)
        waiting = {(request_id, w): since for w, since in s.writers().items() if may_write(w)}
        if waiting:
            self.resting_slots[s.slot] = waiting
        return s, quarantined

    def waiting_for(self, request_id: str) -> set[str]:
        """Who has to say Stopped before all that this ended request held is free."""
        waiting = {
            why.writer for why in self.pool.quarantined.values() if why.request_id == request_id
        }
        for pairs in self.resting_slots.values():
            waiting |= {writer for name, writer in pairs if name == request_id}
        return waiting

    def awaited(self) -> dict[tuple[str, str], int]:
        """(request, writer) -> up to which epoch it has to say that it has let go."""
        waiting: dict[tuple[str, str], int] = {}
        held = [((w.request_id, w.writer), w.epoch) for w in self.pool.quarantined.values()]
        for pair, epoch in held + [p for r in self.resting_slots.values() for p in r.items()]:
            waiting[pair] = max(epoch, waiting.get(pair, 0))
        return waiting

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

        def let_go(request_id: str, writer: str, since: int) -> bool:
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
            stream.fenced = {
                writer: since
                for writer, since in stream.fenced.items()
                if not let_go(stream.request_id, writer, since)
            }
        slots = []
        for slot, waiting in list(self.resting_slots.items()):
            for pair in [pair for pair, since in waiting.items() if let_go(*pair, since)]:
                del waiting[pair]
            if not waiting:
                del self.resting_slots[slot]
                slots.append(slot)
        return done, slots

    def check_invariants(self) -> None:
        self.pool.check_invariants()
        self.index.check_invariants()
        self.pins.check_invariants()
        holders = Counter([*self.index.keys]) + self.copying + Counter(self.filling)
        for stream in self.streams.values():
            for block in stream.blocks():
                holders[block] += 1
        assert holders == self.pool.leases, "leases and holders differ"
        slots = [stream.slot for stream in self.streams.values()]
        assert len(slots) == len(set(slots)), "two streams in one slot"
        assert not set(slots) & set(self.resting_slots), "a resting slot is in use"
