"""Words in shared memory between two real processes: order, atomicity, fences and the futex.

What one process promises another rests on these few operations. A run that passes proves little on
any one round, so each test makes many.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from services._native import Words
from tests.support import litmus


def test_what_was_written_before_the_flag_is_seen_after_it(tmp_path: Path) -> None:
    """Release and acquire: a reader that has seen flag n sees every plain store made before it."""
    rounds = 20_000
    path = litmus.shared_file(tmp_path / "words", 1 + rounds * litmus.PAYLOAD_WORDS)
    mapping = litmus.map_file(path)
    flag = Words(mapping, 0, 1)
    payload = litmus.payload_of(mapping).reshape(-1, litmus.PAYLOAD_WORDS)
    seen = 0
    with litmus.partner(litmus.send_rounds, path, rounds):
        while seen < rounds:
            now = flag.load(0)
            if now == seen:
                assert flag.wait(0, seen, litmus.PARTNER_S), "the writer has stopped"
                continue
            fresh = payload[seen:now]
            assert (fresh == np.arange(seen + 1, now + 1)[:, None]).all(), (
                f"payload behind flag {now}"
            )
            seen = now


def test_increments_of_two_processes_lose_nothing(tmp_path: Path) -> None:
    """Compare-and-swap and `add` are atomic across processes: every increment is in the sum."""
    times = 20_000
    path = litmus.shared_file(tmp_path / "words", 3)
    with litmus.partner(litmus.increment, path, times):
        litmus.increment(path, times)
    words = litmus.map_words(path)
    assert (words.load(0), words.load(1)) == (2 * times, 2 * times)


def test_a_fence_contains_every_advance_that_succeeded_and_none_after(tmp_path: Path) -> None:
    """Count and epoch share a word: what a fence counted is exactly what the fenced writer was told
    it had committed, however the two race."""
    epochs = 400
    path = litmus.shared_file(tmp_path / "words", 2 + epochs)
    words = litmus.map_words(path)
    counted = []
    with litmus.partner(litmus.advance_until_last, path, epochs):
        started = 0
        for epoch in range(epochs):
            word = words.load(0)
            while word & 0xFFFFFFFF == started:  # not before its writer has begun
                os.sched_yield()
                word = words.load(0)
            while True:
                won, word = words.cas(0, word, (epoch + 1) << 32 | word & 0xFFFFFFFF)
                if won:
                    break
            counted.append((word & 0xFFFFFFFF) - started)
            started = word & 0xFFFFFFFF
    assert [words.load(1 + epoch) for epoch in range(epochs)] == counted


def test_a_sleeper_is_woken_by_another_process(tmp_path: Path) -> None:
    """A wake ends the wait although the word has not changed."""
    path = litmus.shared_file(tmp_path / "words", 2)
    words = litmus.map_words(path)
    with litmus.partner(litmus.sleep_on, path, 0) as process:
        while words.wake(0) == 0:
            assert process.is_alive()
            os.sched_yield()
    assert words.load(1) == 2


def test_a_word_that_has_changed_is_not_waited_for(tmp_path: Path) -> None:
    """The wait compares before it sleeps, so a wake between look and sleep is not lost."""
    words = litmus.map_words(litmus.shared_file(tmp_path / "words", 1))
    words.store(0, 5)
    assert words.wait(0, 4, litmus.PARTNER_S)


def test_only_the_low_half_is_waited_for(tmp_path: Path) -> None:
    """An epoch in the high half does not keep a waiter of the count from sleeping."""
    words = litmus.map_words(litmus.shared_file(tmp_path / "words", 1))
    words.store(0, 9 << 32 | 5)
    assert not words.wait(0, 5, 0.001)


def test_a_wait_without_a_wake_times_out(tmp_path: Path) -> None:
    """False, and not before the time has passed."""
    words = litmus.map_words(litmus.shared_file(tmp_path / "words", 1))
    assert not words.wait(0, 0, 0.01)
    assert words.wake(0) == 0


def test_a_compare_and_swap_says_what_is_there(tmp_path: Path) -> None:
    """Won: the new value; lost: the present one, and the word is untouched."""
    words = litmus.map_words(litmus.shared_file(tmp_path / "words", 1))
    assert words.cas(0, 0, 7) == (True, 7)
    assert words.cas(0, 0, 8) == (False, 7)
    assert words.load(0) == 7


def test_words_keep_all_64_bits(tmp_path: Path) -> None:
    """The full range goes in and out, and `add` wraps."""
    words = litmus.map_words(litmus.shared_file(tmp_path / "words", 1))
    words.store(0, 2**64 - 1)
    assert words.load(0) == 2**64 - 1
    assert words.add(0, 2) == 1


@pytest.mark.parametrize(
    ("offset", "count"), [(4, 1), (0, 9), (64, 1), (8, 8), (72, 0), (2**64 - 8, 1), (8, 2**61)]
)
def test_words_outside_the_buffer_are_refused(offset: int, count: int) -> None:
    """Offset and count must lie in the buffer, on 8 bytes; nothing wraps around."""
    with pytest.raises(ValueError, match="words"):
        Words(bytearray(64), offset, count)


def test_an_index_outside_is_refused_by_every_operation() -> None:
    """A wrong index is an exception, never an access."""
    words = Words(bytearray(64), 8, 3)
    assert len(words) == 3
    calls: dict[str, tuple[float, ...]] = {
        "load": (), "store": (1,), "cas": (0, 1), "add": (1,), "wait": (0, 0.0), "wake": (),
    }  # fmt: skip
    for index in (3, 2**63):
        for name, arguments in calls.items():
            with pytest.raises(IndexError):
                getattr(words, name)(index, *arguments)


def test_values_that_are_no_64_bit_words_are_refused() -> None:
    """A negative or a 65-bit value is a TypeError and changes nothing."""
    words = Words(bytearray(8), 0, 1)
    for value in (-1, 2**64):
        with pytest.raises(TypeError):
            words.store(0, value)
    assert words.load(0) == 0


def test_memory_that_cannot_be_written_is_refused() -> None:
    """Words over a read-only buffer, or over nothing, are refused at once."""
    with pytest.raises(BufferError):
        Words(bytes(64), 0, 1)
    with pytest.raises(ValueError, match="empty"):
        Words(bytearray(), 0, 0)


def test_words_keep_their_memory() -> None:
    """A mapping cannot go away while words look at it."""
    mapping = mmap.mmap(-1, 4096)
    words = Words(mapping, 0, 512)
    with pytest.raises(BufferError):
        mapping.close()
    del words
    mapping.close()
