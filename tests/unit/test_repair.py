"""Damaged blocks at the store: who gets a fresh one, what stays for the proof, what is never shared."""

from __future__ import annotations

from services.kv.layout import PAGE_TOKENS
from services.kv_store.state import KvState, Stream
from tests.unit.test_kv_state import KEYS, anybody, nobody, open_stream, store

PROMPT = 200  # three complete blocks and eight rows


def unfilled(block: int) -> bool:
    return False


def filled(block: int) -> bool:
    return True


def decoding(state: KvState) -> Stream:
    """A stream whose prompt is published and whose first decode has attached."""
    stream = open_stream(state, prompt=PROMPT, max_new=200)
    state.publish("r", PROMPT)
    return stream


def move(
    state: KvState, epoch: int, *, repair: tuple[int, ...] = (), steps: int = 0,
    attached: bool = True, done: bool = False, writer: str = "d1",
) -> list[int]:  # fmt: skip
    return state.reassign_decode(
        "r", epoch=epoch, writer=writer, committed=steps, attached=attached, may_write=nobody,
        repair=repair, filled=filled if done else unfilled,
    )  # fmt: skip


def test_a_damaged_prompt_block_is_replaced_in_both_tables() -> None:
    """The damaged one is kept for the proof, and nobody finds it any more."""
    state = store()
    stream = decoding(state)
    damaged = stream.prefill_table[1]
    move(state, 10, repair=(1,))
    assert stream.repairs == {1: damaged}
    assert stream.prefill_table[1] == stream.decode_table[1] != damaged
    assert damaged in stream.held
    assert damaged not in state.index
    state.check_invariants()
    state.release("r", keys=[], may_write=nobody)
    state.check_invariants()
    assert damaged in state.pool.free


def test_a_damaged_open_tail_is_computed_into_the_new_epochs_own() -> None:
    """It gets a block of its own anyway: only what it is compared with must be known."""
    state = store()
    stream = decoding(state)
    move(state, 10, steps=3)
    tail = PROMPT // PAGE_TOKENS
    source = stream.decode_table[tail]
    move(state, 11, repair=(tail,), steps=5)
    assert stream.repairs == {tail: source}
    assert stream.tail_source == source
    state.check_invariants()


def test_a_repair_that_was_not_done_is_asked_for_again() -> None:
    """The next epoch gets another fresh block; the proof is still against the first damaged one."""
    state = store()
    stream = decoding(state)
    damaged = stream.prefill_table[1]
    move(state, 10, repair=(1,))
    first = stream.prefill_table[1]
    move(state, 11, attached=False, writer="d2")
    assert stream.repairs == {1: damaged}
    assert stream.prefill_table[1] not in (first, damaged)
    assert first in state.pool.free
    state.check_invariants()


def test_an_unfinished_repair_is_quarantined_while_its_writer_may_write() -> None:
    """A decode that was paused while it repaired spoils nothing when it wakes up."""
    state = store()
    stream = decoding(state)
    move(state, 10, repair=(1,))
    first = stream.prefill_table[1]
    state.reassign_decode(
        "r", epoch=11, writer="d2", committed=0, attached=False, may_write=anybody, filled=unfilled
    )
    assert state.pool.quarantined[first].writer == "d1"
    state.check_invariants()


def test_a_repair_that_was_done_is_kept() -> None:
    """By the seal, or because its decode has attached: nothing is computed a second time."""
    for attached, done in ((True, False), (False, True)):
        state = store()
        stream = decoding(state)
        move(state, 10, repair=(1,))
        fresh = stream.prefill_table[1]
        move(state, 11, attached=attached, done=done, writer="d2")
        assert stream.repairs == {}
        assert stream.prefill_table[1] == fresh
        state.check_invariants()


def test_prefill_gets_fresh_blocks_for_damaged_cached_ones_only() -> None:
    """What it computes anew from its start on needs none."""
    state = store()
    decoding(state)
    state.release("r", keys=KEYS[:3], may_write=nobody)
    stream = open_stream(state, prompt=PROMPT, max_new=20, epoch=20)
    assert stream.cached_blocks == 3
    damaged = stream.prefill_table[1]
    state.reassign_prefill(
        "r", attempt=30, writer="p1", start=2 * PAGE_TOKENS, may_write=nobody, repair=(1, 2),
        filled=unfilled,
    )  # fmt: skip
    assert stream.repairs == {1: damaged}
    assert stream.prefill_start == 2 * PAGE_TOKENS
    assert stream.prefill_table[:3] == stream.decode_table[:3]
    assert damaged not in state.index
    state.check_invariants()


def test_what_stands_behind_an_open_repair_is_not_shared() -> None:
    """Until it is filled, a fresh block is nobody's prefix."""
    state = store()
    stream = decoding(state)
    move(state, 10, repair=(1,))
    assert state.repairs(stream, (), unfilled) == {1: stream.repairs[1]}
    assert state.repairs(stream, (), filled) == {}
    assert state.repairs(stream, (), unfilled, attached=True) == {}
