"""The stream record: what the arena knows of one request, so that nobody needs to be asked.

It holds the token ids, the block tables, how far prefill has come in each layer group, and one word
`commit` = epoch << 32 | steps that moves a decode's progress and its right to write in one compare-
and-swap. Tokens are stored before the count advances; a fence bumps the epoch, after which every
compare-and-swap of the old writer fails.

    tokens:  [ prompt ........ | generated 0 | generated 1 | ... ]
    KV rows: [ prompt ........ | step 0      | ...             ]   steps committed -> rows valid

Step c reads generated c, writes its K and V at position prompt + c, and commits generated c + 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from services import _native
from services.kv.arena import Arena, ArenaPlan
from services.kv.layout import KvLayout, blocks_for

_FIXED = np.dtype(
    [
        ("state", "<u4"),
        ("generation", "<u4"),
        ("pad0", "V56"),
        ("words", "<u8", (8,)),
        ("prompt_tokens", "<u4"),
        ("max_new", "<u4"),
        ("first_index", "<u4"),
        ("pad1", "V52"),
        ("request_id", "S128"),
        ("tenant", "S64"),
        ("root", "V16"),
        ("pad2", "V112"),
    ]
)
assert _FIXED.itemsize == 512
_COMMIT, _FIRST, _ATTACHED, _PLAN = range(4)
FREE, ACTIVE, RESTING = range(3)  # resting: closed, but a fenced writer may still be there
NO_BLOCK = 0xFFFFFFFF
FENCED_MAX = (
    16  # a stream that has been moved more often forgets its oldest writers after a restart
)


@lru_cache(maxsize=16)
def plan_dtype(max_context: int) -> np.dtype[np.void]:
    """Who works on the stream and in which blocks; two copies, of which a word names the valid one.

    table_epoch, table_attempt: the decode epoch and the prefill attempt that these tables were made
        for, which their writers got; a fence may be ahead of them.
    fenced: former writers that have not said Stopped; in a resting record, all that are waited for.
    fenced_epochs: the last epoch or attempt that each of them got.
    tail_source: the block whose first `tail_rows` rows that epoch has to copy, or NO_BLOCK.
    prefill_start: the token from which prefill's present attempt computes.
    repair_source: for a block whose KV was damaged, the damaged one; the tables hold a fresh one for
        whoever works on the stream to fill. Block plus one; 0: nothing to do.
    """
    blocks = blocks_for(max_context)
    return np.dtype(
        [
            ("prefill_writer", "S40"),
            ("decode_writer", "S40"),
            ("fenced", "S40", (FENCED_MAX,)),
            ("fenced_epochs", "<u4", (FENCED_MAX,)),
            ("table_epoch", "<u4"),
            ("table_attempt", "<u4"),
            ("cached_tokens", "<u4"),
            ("tail_rows", "<u4"),
            ("tail_source", "<u4"),
            ("prefill_start", "<u4"),
            ("repair_source", "<u4", (blocks,)),
            ("prefill_table", "<u4", (blocks,)),
            ("decode_table", "<u4", (blocks,)),
        ]
    )


@lru_cache(maxsize=16)  # numpy takes 50 us to make it, and every look at a record needs it
def record_dtype(layout: KvLayout, max_context: int) -> np.dtype[np.void]:
    """One record, padded to whole cache lines."""
    fields = np.dtype(
        [
            ("fixed", _FIXED),
            ("ready", "<u8", (layout.groups,)),
            ("tokens", "<i4", (max_context + 1,)),
            ("logprobs", "<f4", (max_context + 1,)),
            ("plans", plan_dtype(max_context), (2,)),
        ]
    )
    padding = -fields.itemsize % 64
    return np.dtype([*fields.descr, ("end", f"V{padding}")]) if padding else fields


def pack(epoch: int, count: int) -> int:
    return epoch << 32 | count


def unpack(word: int) -> tuple[int, int]:
    return word >> 32, word & 0xFFFFFFFF


@dataclass(frozen=True)
class StreamRecord:
    """A view of the record in `slot`. Writers: the store while it opens or fences the stream, prefill
    for `ready` and the first token, the decode that owns the epoch for all later tokens."""

    arena: Arena
    slot: int

    @cached_property
    def _view(self) -> NDArray[np.void]:
        plan: ArenaPlan = self.arena.plan
        dtype = record_dtype(plan.layout, plan.max_context)
        return np.ndarray(
            (), dtype, self.arena.buffer, plan.records_offset + self.slot * plan.record_bytes
        )

    @cached_property
    def fixed(self) -> NDArray[np.void]:
        return self._view["fixed"]  # type: ignore[no-any-return]

    @cached_property
    def _words(self) -> _native.Words:
        offset = self.arena.plan.records_offset + self.slot * self.arena.plan.record_bytes + 64
        return _native.Words(self.arena.buffer, offset, 8)

    @cached_property
    def _ready(self) -> _native.Words:
        offset = self.arena.plan.records_offset + self.slot * self.arena.plan.record_bytes + 512
        return _native.Words(self.arena.buffer, offset, self.arena.layout.groups)

    # --- plain fields, written by the store before anyone is told of the slot ---

    def plan(self) -> NDArray[np.void]:
        """The valid plan, as `plan_dtype`; a view that a later `write_plan` but one overwrites."""
        return self._plans[self._words.load(_PLAN) & 1]

    @cached_property
    def _plans(self) -> tuple[NDArray[np.void], NDArray[np.void]]:
        plans = self._view["plans"]
        return plans[0, ...], plans[1, ...]

    @cached_property
    def _prefill_tables(self) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
        even, odd = self._plans
        return even["prefill_table"], odd["prefill_table"]

    def write_plan(self, **fields: object) -> None:
        """Changes fields of the plan in one step: whoever reads, even after a crash, sees the old one
        or the new one. Tables may be shorter than the room for them."""
        following = (self._words.load(_PLAN) + 1) & 1
        plan = self._plans[following]
        plan[...] = self.plan()
        for name, value in fields.items():
            if isinstance(value, list):
                plan[name][: len(value)] = value
            else:
                plan[name] = value
        self._words.store(_PLAN, following)

    def _field(self, field: str) -> NDArray[np.void]:
        holder = self.fixed if field in (_FIXED.names or ()) else self.plan()
        return holder[field]  # type: ignore[no-any-return]

    def number(self, field: str) -> int:
        return int(self._field(field))

    def text(self, field: str) -> str:
        return bytes(self._field(field)).rstrip(b"\0").decode()

    @property
    def root(self) -> bytes:
        return self.fixed["root"].tobytes()

    @cached_property
    def tokens(self) -> NDArray[np.int32]:
        return self._view["tokens"]  # type: ignore[no-any-return]

    @cached_property
    def logprobs(self) -> NDArray[np.float32]:
        return self._view["logprobs"]  # type: ignore[no-any-return]

    @property
    def prefill_table(self) -> NDArray[np.uint32]:
        return self._prefill_tables[self._words.load(_PLAN) & 1]

    @property
    def decode_table(self) -> NDArray[np.uint32]:
        return self.plan()["decode_table"]  # type: ignore[no-any-return]

    # --- decode's progress ---

    def commit(self) -> tuple[int, int]:
        """(epoch, committed steps)."""
        return unpack(self._words.load(_COMMIT))

    def advance(self, epoch: int, steps: int) -> bool:
        """Commits step `steps` - 1; False when a later epoch has fenced this one."""
        won, _ = self._words.cas(_COMMIT, pack(epoch, steps - 1), pack(epoch, steps))
        return bool(won)

    def fence(self, epoch: int) -> int:
        """Makes `epoch` the only one that can commit; gives the steps committed before it."""
        while True:
            before, steps = self.commit()
            assert epoch > before, f"epoch {epoch} does not follow {before}"
            won, _ = self._words.cas(_COMMIT, pack(before, steps), pack(epoch, steps))
            if won:
                return steps

    def attached_epoch(self) -> int:
        """The last epoch whose decode has its own copy of the open tail."""
        return int(self._words.load(_ATTACHED))

    def set_attached(self, epoch: int) -> None:
        """Only upwards: an old epoch that wakes up late does not hide a newer one."""
        while (seen := self._words.load(_ATTACHED)) < epoch:
            if self._words.cas(_ATTACHED, seen, epoch)[0]:
                return

    # --- prefill's progress ---

    def ready(self, group: int) -> tuple[int, int]:
        """(attempt, tokens whose K and V of this layer group are complete)."""
        return unpack(self._ready.load(group))

    def ready_tokens(self) -> int:
        """Tokens complete in every layer group."""
        return min(self.ready(g)[1] for g in range(self.arena.layout.groups))

    def set_ready(self, group: int, attempt: int, tokens: int) -> bool:
        """Announces tokens of one layer group; False when a later attempt has fenced this one."""
        while True:
            word = self._ready.load(group)
            owner, seen = unpack(word)
            if owner != attempt:
                return False
            if seen >= tokens:
                return True
            won, _ = self._ready.cas(group, word, pack(attempt, tokens))
            if won:
                return True

    def first(self) -> tuple[int, bool]:
        """(attempt, whether the first token is there)."""
        attempt, present = unpack(self._words.load(_FIRST))
        return attempt, bool(present)

    def publish_first(self, attempt: int, token: int, logprob: float) -> bool:
        """Stores the first token, then says so; False when this attempt has been fenced."""
        at = self.number("prompt_tokens")
        if self.first() != (attempt, False):
            return self.first() == (attempt, True)
        self.tokens[at] = token
        self.logprobs[at] = logprob
        won, _ = self._words.cas(_FIRST, pack(attempt, 0), pack(attempt, 1))
        return bool(won)

    def fence_prefill(self, attempt: int, ready: int) -> bool:
        """Makes `attempt` the only one that can announce, from `ready` tokens on. False when the
        first token was already there: then prefill is done and nothing changes."""
        while True:
            word = self._words.load(_FIRST)
            if unpack(word)[1]:
                return False
            if self._words.cas(_FIRST, word, pack(attempt, 0))[0]:
                break
        for group in range(self.arena.layout.groups):
            while True:
                word = self._ready.load(group)
                if self._ready.cas(group, word, pack(attempt, ready))[0]:
                    break
        return True

    # --- the store's own ---

    def open(self, epoch: int, attempt: int, cached: int) -> None:
        """Sets the words of a new stream; the plain fields are written already."""
        for group in range(self.arena.layout.groups):
            self._ready.store(group, pack(attempt, cached))
        self._words.store(_FIRST, pack(attempt, 0))
        self._words.store(_ATTACHED, 0)
        self._words.store(_COMMIT, pack(epoch, 0))
        self.fixed["state"] = ACTIVE

    def close(self) -> None:
        """Fences everybody: the words are set past every writer's epoch. `set_state` follows."""
        self._words.store(_COMMIT, pack(0xFFFFFFFF, 0))
        self._words.store(_FIRST, pack(0xFFFFFFFF, 0))
        for group in range(self.arena.layout.groups):
            self._ready.store(group, pack(0xFFFFFFFF, 0))

    def set_state(self, state: int) -> None:
        """FREE, ACTIVE or RESTING: what a kv-store that starts anew makes of this slot."""
        self.fixed["state"] = state
