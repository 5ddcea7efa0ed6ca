"""The store's state under any sequence of opens, takeovers, deaths and releases.

`World` (tests/support/kv_world.py) does what a cluster could do and says after each step what must
hold: one writer per block, nothing taken from a writer that may wake up, nothing committed lost,
nothing leaked.
"""

from __future__ import annotations

import random

import pytest

from services.kv_store.index import PrefixIndex
from services.kv_store.pool import BlockPool
from services.kv_store.state import KvState, Stream
from services.ops.errors import Overloaded, RequestConflict, StaleEpoch, UnknownRequest
from tests.support.kv_world import Walk, key_of


@pytest.mark.parametrize("seeds", [range(first, first + 50) for first in range(0, 400, 50)])
def test_whatever_happens(seeds: range) -> None:
    """Any events in any order, each sequence from its seed; a failure tells its story."""
    for seed in seeds:
        walk, rng = Walk(), random.Random(seed)
        try:
            for _ in range(60):
                walk.step(rng.choice)
            walk.end()
        except AssertionError as error:
            story = "\n".join(walk.story)
            raise AssertionError(f"seed {seed}: {error}\n{story}") from error


# --- the rules, one by one ---

KEYS = [key_of(0, block) for block in range(8)]


def store(blocks: int = 20, slots: int = 4) -> KvState:
    return KvState(BlockPool(blocks), PrefixIndex(), slots)


def open_stream(
    state: KvState, request_id: str = "r", *, prompt: int = 100, max_new: int = 100, epoch: int = 5,
    decode: str = "d0",
) -> Stream:  # fmt: skip
    stream, _ = state.open(
        request_id, keys=KEYS[: prompt // 64], prompt_tokens=prompt, max_new=max_new, epoch=epoch,
        attempt=epoch - 1, prefill_writer="p0", decode_writer=decode,
    )  # fmt: skip
    return stream


def nobody(writer: str) -> bool:
    return False


def anybody(writer: str) -> bool:
    return bool(writer)


def cached(state: KvState, prompt: int) -> list[int]:
    """Fills the cache with a prompt's blocks."""
    stream = open_stream(state, "before", prompt=prompt, max_new=0)
    state.release("before", keys=stream.keys, may_write=nobody)
    return stream.prefill_table[: prompt // 64]


@pytest.mark.parametrize(
    ("prompt", "hit"), [(63, 0), (64, 0), (65, 1), (128, 1), (129, 2), (192, 2)]
)
def test_the_last_token_of_a_cached_prompt_is_computed(prompt: int, hit: int) -> None:
    """Its logits must exist, so its block is never taken from the cache."""
    state = store()
    blocks = cached(state, 256)
    stream = open_stream(state, prompt=prompt)
    assert stream.cached_blocks == hit
    assert stream.prefill_table[:hit] == blocks[:hit]
    assert not set(stream.prefill_table[hit:]) & set(blocks)
    state.check_invariants()


def test_the_cache_can_be_bypassed() -> None:
    """A prompt whose KV is not to be trusted is computed into blocks of its own."""
    state = store()
    blocks = cached(state, 256)
    stream, _ = state.open(
        "r", keys=KEYS[:4], prompt_tokens=256, max_new=1, epoch=5, attempt=4, prefill_writer="p0",
        decode_writer="d0", bypass_cache=True,
    )  # fmt: skip
    assert stream.cached_blocks == 0
    assert not set(stream.prefill_table) & set(blocks)


def test_decode_has_room_for_every_step_but_the_last() -> None:
    """The last token's K and V are needed by nobody."""
    for prompt, max_new, blocks in (
        (64, 1, 1), (64, 64, 2), (64, 65, 2), (64, 66, 3), (100, 29, 2), (100, 30, 3),
    ):  # fmt: skip
        stream = open_stream(store(), prompt=prompt, max_new=max_new)
        assert len(stream.decode_table) == blocks, (prompt, max_new)


def test_a_prompt_without_decode_here_takes_its_own_blocks_only() -> None:
    """Prefill's store when decode is elsewhere."""
    stream = open_stream(store(), prompt=100, max_new=0)
    assert len(stream.prefill_table) == 2
    assert stream.decode_table == stream.prefill_table[:1]


def test_the_tail_is_never_shared() -> None:
    """Prefill and decode each have a block for the prompt's open tail; decode copies its rows."""
    stream = open_stream(store(), prompt=100)
    assert stream.decode_table[0] == stream.prefill_table[0]
    assert stream.decode_table[1] != stream.prefill_table[1]
    assert (stream.tail_source, stream.tail_rows) == (stream.prefill_table[1], 36)
    whole = open_stream(store(), prompt=128)
    assert (whole.tail_source, whole.tail_rows) == (None, 0)


def test_a_request_is_open_once() -> None:
    """The id is refused and nothing changes."""
    state = store()
    open_stream(state)
    with pytest.raises(RequestConflict, match="request_id"):
        open_stream(state)
    state.check_invariants()


def test_an_id_that_is_not_open_is_unknown() -> None:
    """Every act on a stream says so by the field's name."""
    state = store()
    for act in (
        lambda: state.stream("x"), lambda: state.publish("x", 64),
        lambda: state.release("x", keys=[], may_write=nobody),
    ):  # fmt: skip
        with pytest.raises(UnknownRequest, match="request_id: 'x'"):
            act()


@pytest.mark.parametrize("prefill", [True, False])
def test_only_a_newer_epoch_is_taken(prefill: bool) -> None:
    """The present one and every older one have been used."""
    state = store()
    stream = open_stream(state, epoch=5)
    present = 4 if prefill else 5
    for epoch in (present - 1, present):
        with pytest.raises(StaleEpoch, match=f"epoch: {epoch} is not newer than {present}"):
            state.check_epoch(stream, epoch, prefill=prefill)
    state.check_epoch(stream, present + 1, prefill=prefill)


def test_a_full_arena_says_what_is_missing() -> None:
    """Blocks that others hold are not evicted; the message has the numbers."""
    state = store(blocks=4)
    open_stream(state, "a", prompt=100, max_new=2)
    with pytest.raises(Overloaded, match="arena: 3 blocks wanted, 1 free and 0 evictable of 4"):
        open_stream(state, "b", prompt=100, max_new=2)


def test_all_records_in_use_is_overload() -> None:
    """Also when the arena has room."""
    state = store(slots=1)
    open_stream(state, "a")
    with pytest.raises(Overloaded, match="streams_max: all 1"):
        open_stream(state, "b")


def test_the_least_recently_used_blocks_are_evicted() -> None:
    """And only as many as are needed; what the new request itself reuses stays."""
    state = store(blocks=5)
    blocks = cached(state, 256)
    stream, evicted = state.open(
        "r", keys=KEYS[:1], prompt_tokens=65, max_new=64, epoch=5, attempt=4, prefill_writer="p0",
        decode_writer="d0",
    )  # fmt: skip
    assert stream.prefill_table[0] == blocks[0]
    assert evicted == [blocks[3]], "the end of a prefix goes before its beginning"


def test_a_takeover_keeps_what_is_committed_where_it_is() -> None:
    """Complete blocks stay in the table, the tail becomes the source of a copy, the rest is held back
    from a writer that is alive."""
    state = store()
    stream = open_stream(state, prompt=100, max_new=200)
    table = list(stream.decode_table)
    lost = state.reassign_decode(
        "r", epoch=7, writer="d1", committed=70, attached=True, may_write=anybody
    )
    assert stream.decode_table[:2] == table[:2]
    assert (stream.tail_source, stream.tail_rows) == (table[2], 170 - 128)
    assert lost == table[3:]
    assert set(state.pool.quarantined) == set(lost)
    assert not set(stream.decode_table[2:]) & set(table)
    assert table[1] not in state.pool.writers, "nobody writes a complete block again"
    state.check_invariants()


def test_a_takeover_on_a_block_border_copies_nothing() -> None:
    """There is no open tail: the first block after it belongs to the new epoch alone."""
    state = store()
    stream = open_stream(state, prompt=100, max_new=200)
    table = list(stream.decode_table)
    state.reassign_decode("r", epoch=7, writer="d1", committed=28, attached=True, may_write=nobody)
    assert stream.decode_table[:2] == table[:2]
    assert (stream.tail_source, stream.tail_rows) == (None, 0)


def test_a_decode_that_never_attached_leaves_the_old_tail() -> None:
    """Its own copy may be incomplete, so the next one copies from where it would have."""
    state = store()
    stream = open_stream(state, prompt=100, max_new=100)
    state.reassign_decode("r", epoch=7, writer="d1", committed=10, attached=True, may_write=nobody)
    source = stream.tail_source
    state.reassign_decode(
        "r", epoch=9, writer="d2", committed=10, attached=False, may_write=anybody
    )
    assert (stream.tail_source, stream.tail_rows) == (source, 110 - 64)
    state.check_invariants()


def test_blocks_of_a_paused_writer_wait_for_its_word() -> None:
    """Not for another writer's, and not for its word on another request; the slot waits too."""
    state = store()
    stream = open_stream(state)
    own = set(stream.decode_table[1:])
    state.release("r", keys=[], may_write=lambda writer: writer == "d0")
    assert set(state.pool.quarantined) == own
    for other in (("r", "p0"), ("s", "d0"), ("", "d0")):
        assert state.sweep(anybody, other) == ([], [])
    freed, slots = state.sweep(anybody, ("r", "d0"))
    assert (set(freed), slots) == (own, [stream.slot])
    assert len(state.pool.free) == state.pool.total


def test_a_word_is_about_what_a_writer_had_got_by_then() -> None:
    """Blocks, fenced writers and resting slots alike: a late Stopped of an earlier epoch says nothing
    about what the same worker has got since."""
    state = store()
    stream = open_stream(state, epoch=5)
    for epoch in (7, 9):
        state.reassign_decode(
            "r", epoch=epoch, writer="d0", committed=0, attached=True, may_write=anybody
        )
    assert stream.fenced == {"d0": 7}
    assert state.sweep(anybody, ("r", "d0"), epoch=6)[0], "its blocks of epoch 5"
    assert stream.fenced == {"d0": 7}, "it had got more by then"
    state.sweep(anybody, ("r", "d0"), epoch=7)
    assert stream.fenced == {}
    state.release("r", keys=[], may_write=lambda writer: writer == "d0")
    assert state.resting_slots == {stream.slot: {("r", "d0"): 9}}
    for idle in (None, ("d0", frozenset[str]())):
        said = None if idle else ("r", "d0")
        assert state.sweep(anybody, said, idle, epoch=8)[1] == []
        assert state.resting_slots
        assert {why.epoch for why in state.pool.quarantined.values()} == {9}
    freed, slots = state.sweep(anybody, ("r", "d0"), epoch=9)
    assert freed
    assert slots == [stream.slot]


def test_blocks_of_a_dead_writer_come_back() -> None:
    """Death is as good as its word."""
    state = store()
    stream = open_stream(state)
    state.release("r", keys=[], may_write=anybody)
    freed, slots = state.sweep(lambda writer: writer == "p0")
    assert set(freed) == set(stream.decode_table[1:])
    assert slots == []
    assert state.sweep(nobody)[1] == [stream.slot]
    assert len(state.pool.free) == state.pool.total


def test_an_invalid_block_cannot_be_found() -> None:
    """Whoever holds it keeps it; nobody new gets it."""
    state = store()
    blocks = cached(state, 256)
    stream = open_stream(state, prompt=200)
    state.invalidate([blocks[1], blocks[1], 19])
    assert stream.prefill_table[:3] == blocks[:3]
    assert open_stream(state, "s", prompt=200).cached_blocks == 1
    state.check_invariants()


def test_a_late_opening_of_an_older_epoch_is_refused() -> None:
    """A call of a scheduler that has died meanwhile brings nothing back that has been closed."""
    state = store()
    open_stream(state, epoch=9)
    state.release("r", keys=[], may_write=nobody)
    with pytest.raises(StaleEpoch, match="epoch"):
        open_stream(state, epoch=4)
    assert open_stream(state, epoch=11).epoch == 11
    state.check_invariants()
