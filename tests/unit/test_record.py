"""The stream record: who may commit, who may announce, and that nobody does so late."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.kv.arena import Arena
from services.kv.record import NO_BLOCK, StreamRecord, pack, record_dtype, unpack
from tests.support import arenas
from tests.support.arenas import open_record
from tests.support.dying import die_before


@pytest.fixture
def arena(tmp_path: Path) -> Arena:
    return arenas.small_arena(tmp_path)


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_epoch_and_count_share_a_word(epoch: int, count: int) -> None:
    """They come back as they were, and a later epoch is a greater word whatever the count."""
    assert unpack(pack(epoch, count)) == (epoch, count)
    assert pack(epoch, count) < 2**64
    assert pack(epoch + 1, 0) > pack(epoch, count)


# --- decode's word ---


def test_a_stream_opens_with_nothing_committed(arena: Arena) -> None:
    """Epoch and attempt are set, the cached tokens are ready, no token is there."""
    record = open_record(arena, epoch=5, attempt=4, cached=64)
    assert record.commit() == (5, 0)
    assert [record.ready(group) for group in range(2)] == [(4, 64), (4, 64)]
    assert record.ready_tokens() == 64
    assert record.first() == (4, False)
    assert record.attached_epoch() == 0


def test_steps_are_committed_one_after_another(arena: Arena) -> None:
    """Each step once and in order; anything else is refused and changes nothing."""
    record = open_record(arena, epoch=5)
    assert record.advance(5, 1)
    assert record.advance(5, 2)
    for steps in (1, 2, 4):
        assert not record.advance(5, steps)
    assert record.commit() == (5, 2)


def test_a_fenced_decode_commits_nothing_more(arena: Arena) -> None:
    """The fence gives the steps committed before it; after it only the new epoch can commit."""
    record = open_record(arena, epoch=5)
    for step in (1, 2, 3):
        assert record.advance(5, step)
    assert record.fence(7) == 3
    assert not record.advance(5, 4)
    assert record.commit() == (7, 3)
    assert record.advance(7, 4)
    assert record.commit() == (7, 4)


@pytest.mark.parametrize("epoch", [4, 5])
def test_a_fence_goes_forward(arena: Arena, epoch: int) -> None:
    """An epoch that is not newer is our own mistake: the store refuses it before it comes here."""
    record = open_record(arena, epoch=5)
    with pytest.raises(AssertionError):
        record.fence(epoch)
    assert record.commit() == (5, 0)


def test_attaching_is_never_taken_back(arena: Arena) -> None:
    """An old decode that was paused just before it said that it has its tail, and says so only after
    a later one has, does not make the store forget the later one."""
    record = open_record(arena, epoch=5)
    record.fence(7)
    record.set_attached(7)
    record.set_attached(5)
    assert record.attached_epoch() == 7


# --- prefill's words ---


def test_announcements_only_grow(arena: Arena) -> None:
    """Each layer group for itself; an announcement that comes again or late takes nothing back."""
    record = open_record(arena, attempt=4)
    assert record.set_ready(0, 4, 64)
    assert record.set_ready(0, 4, 100)
    assert record.set_ready(0, 4, 64)
    assert [record.ready(group) for group in range(2)] == [(4, 100), (4, 0)]
    assert record.ready_tokens() == 0
    assert record.set_ready(1, 4, 64)
    assert record.ready_tokens() == 64


@pytest.mark.parametrize("attempt", [3, 5])
def test_only_the_present_attempt_announces(arena: Arena, attempt: int) -> None:
    """Neither a fenced attempt nor one that nobody has opened."""
    record = open_record(arena, attempt=4)
    assert not record.set_ready(0, attempt, 64)
    assert not record.publish_first(attempt, 9, 0.0)
    assert record.ready(0) == (4, 0)
    assert record.first() == (4, False)


def test_a_fenced_prefill_announces_nothing_more(arena: Arena) -> None:
    """All groups go back to where the next attempt begins, and only that one can go on."""
    record = open_record(arena, attempt=4)
    record.set_ready(0, 4, 100)
    record.set_ready(1, 4, 64)
    assert record.fence_prefill(6, 64)
    assert not record.set_ready(0, 4, 100)
    assert not record.publish_first(4, 9, 0.0)
    assert [record.ready(group) for group in range(2)] == [(6, 64), (6, 64)]
    assert record.first() == (6, False)
    assert record.set_ready(0, 6, 100)
    assert record.publish_first(6, 9, 0.0)


def test_a_finished_prefill_cannot_be_fenced(arena: Arena) -> None:
    """Once the first token is there, prefill is done: the fence says so and changes nothing."""
    record = open_record(arena, attempt=4)
    for group in range(2):
        record.set_ready(group, 4, 100)
    record.publish_first(4, 9, -0.5)
    assert not record.fence_prefill(6, 64)
    assert record.first() == (4, True)
    assert record.ready_tokens() == 100


def test_the_first_token_is_published_once(arena: Arena) -> None:
    """Behind the prompt, with its log probability; the same again is fine and changes nothing."""
    record = open_record(arena, attempt=4, prompt=100)
    assert record.publish_first(4, 11, -0.25)
    assert record.publish_first(4, 12, -9.0)
    assert record.first() == (4, True)
    assert (record.tokens[100], record.logprobs[100]) == (11, -0.25)


# --- a slot that another request uses ---


def test_nobody_writes_through_a_slot_that_was_closed(arena: Arena) -> None:
    """Closing is a fence past every epoch."""
    record = open_record(arena, epoch=5, attempt=4)
    record.advance(5, 1)
    record.close()
    assert not record.advance(5, 1)
    assert not record.advance(5, 2)
    assert not record.set_ready(0, 4, 64)
    assert not record.publish_first(4, 9, 0.0)


def test_nobody_writes_through_a_slot_that_is_used_again(arena: Arena) -> None:
    """ABA: the same slot, even with the same counts, is another stream under another epoch; a late
    writer of the first changes no word and no token of the second."""
    record = open_record(arena, epoch=5, attempt=4)
    record.close()
    record.tokens[:] = 0
    open_record(arena, epoch=9, attempt=8)
    before = record._view.tobytes()
    assert not record.advance(5, 1)
    assert not record.set_ready(0, 4, 64)
    assert not record.publish_first(4, 9, -1.0)
    assert record._view.tobytes() == before


# --- the memory ---


def test_two_mappings_are_one_record(arena: Arena, tmp_path: Path) -> None:
    """What one process commits the other sees, words and tokens alike."""
    here = open_record(arena, 2, epoch=5, attempt=4)
    there = StreamRecord(Arena(tmp_path), 2)
    there.tokens[100:103] = (7, 8, 9)
    assert there.advance(5, 1)
    assert here.commit() == (5, 1)
    assert here.tokens[100:103].tolist() == [7, 8, 9]
    assert here.fence(6) == 1
    assert not there.advance(5, 2)


def test_records_do_not_touch_their_neighbours(arena: Arena) -> None:
    """Every byte of a record written, the ones beside it are untouched."""
    low, middle, high = (StreamRecord(arena, slot) for slot in range(3))
    raw = np.ndarray(
        (arena.plan.record_bytes,), np.uint8, arena.buffer,
        arena.plan.records_offset + arena.plan.record_bytes,
    )  # fmt: skip
    raw[:] = 0xAB
    assert middle.commit() == (0xABABABAB, 0xABABABAB)
    assert not any(low._view.tobytes())
    assert not any(high._view.tobytes())


def test_every_field_keeps_what_it_is_given(arena: Arena, tmp_path: Path) -> None:
    """Numbers, names at their full length, tokens and log probabilities come back, also through
    another mapping."""
    record, capacity = open_record(arena, 1), arenas.MAX_CONTEXT + 1
    numbers = {"prompt_tokens": 2**32 - 1, "max_new": 2**32 - 2, "first_index": 2**32 - 3}
    texts = {"request_id": "r" * 128, "tenant": "ü" * 32}
    for name, number in numbers.items():
        record.fixed[name] = number
    for name, text in texts.items():
        record.fixed[name] = text.encode()
    record.fixed["root"] = np.void(b"\1" + bytes(14) + b"\0")
    record.tokens[:] = np.arange(capacity)[::-1]
    record.logprobs[:] = np.arange(capacity) / 7
    for view in (record, StreamRecord(Arena(tmp_path), 1)):
        assert {name: view.number(name) for name in numbers} == numbers
        assert {name: view.text(name) for name in texts} == texts
        assert view.root == b"\1" + bytes(15)
        assert view.tokens.tolist() == list(range(capacity))[::-1]
        assert (view.logprobs == (np.arange(capacity) / 7).astype(np.float32)).all()
        assert view.commit() == (5, 0)


PLAN = {
    "prefill_writer": b"p" * 32, "decode_writer": b"d" * 32, "table_epoch": 5, "cached_tokens": 64,
    "tail_rows": 36, "tail_source": 9, "prefill_table": [3, 9], "decode_table": [3, 10, 11],
}  # fmt: skip
NEXT = {
    "prefill_writer": b"p" * 32, "decode_writer": b"", "table_epoch": 7, "cached_tokens": 64,
    "tail_rows": 0, "tail_source": NO_BLOCK, "prefill_table": [4, 8], "decode_table": [4, 12, 13],
}  # fmt: skip


def planned(record: StreamRecord) -> dict[str, object]:
    """What a reader takes from the record's plan."""
    return {
        "prefill_writer": record.text("prefill_writer").encode(),
        "decode_writer": record.text("decode_writer").encode(),
        **{
            n: record.number(n)
            for n in ("table_epoch", "cached_tokens", "tail_rows", "tail_source")
        },
        "prefill_table": record.prefill_table[:2].tolist(),
        "decode_table": record.decode_table[:3].tolist(),
    }


def test_a_plan_keeps_what_it_is_given(arena: Arena, tmp_path: Path) -> None:
    """The last plan written is the one that every mapping reads, each time it is replaced."""
    record, there = open_record(arena, 1), StreamRecord(Arena(tmp_path), 1)
    for plan in (PLAN, NEXT, PLAN):
        record.write_plan(**plan)
        assert planned(record) == planned(there) == plan


def test_a_plan_is_replaced_in_one_step(arena: Arena) -> None:
    """A store that dies while it writes leaves the old plan or the new one, never a mixture."""
    seen = []
    record, line, died = open_record(arena), 0, True
    while died:
        record.write_plan(**PLAN)
        died = die_before(line, ("kv/record.py",), lambda: record.write_plan(**NEXT))
        seen.append(planned(record))
        line += 1
    assert line > len(NEXT)
    assert all(plan in (PLAN, NEXT) for plan in seen)
    assert seen[0] == PLAN
    assert seen[-1] == NEXT


def test_a_record_lies_on_cache_lines() -> None:
    """So that no two records share one, and the words lie where both languages look for them."""
    for context in (1, 63, 64, 65, 2048, 5000):
        dtype = record_dtype(arenas.LAYOUT, context)
        assert dtype.itemsize % 64 == 0
        assert dtype.fields is not None
        fixed = dtype["fixed"].fields
        assert fixed is not None
        assert dtype.fields["fixed"][1] == 0
        assert fixed["words"][1] == 64
        assert dtype.fields["ready"][1] == 512
        assert dtype["tokens"].shape == dtype["logprobs"].shape == (context + 1,)
