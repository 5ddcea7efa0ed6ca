"""Continuous batching: who waits, who runs, and in which order."""

from __future__ import annotations

import random

import pytest

from services.decode.state import BatchState


def batch(limit: int, *names: str) -> BatchState[str]:
    """A batch in which these streams are runnable."""
    state: BatchState[str] = BatchState(limit)
    for name in names:
        state.add(name, name.upper())
        state.runnable(name)
    return state


def test_streams_run_in_the_order_in_which_they_became_runnable() -> None:
    """Not in which they came: a stream whose KV is complete does not wait for one whose is not."""
    state: BatchState[str] = BatchState(2)
    for name in "abc":
        state.add(name, name.upper())
    for name in "cab":
        state.runnable(name)
    assert state.admit() == ["C", "A"]
    assert list(state.waiting) == ["b"]


def test_the_batch_has_a_limit() -> None:
    """Whoever does not fit waits until somebody leaves."""
    state = batch(2, "a", "b", "c")
    assert state.admit() == ["A", "B"]
    assert state.admit() == []
    state.remove("a")
    assert state.admit() == ["C"]
    state.check_invariants()


def test_a_stream_whose_kv_is_incomplete_never_runs() -> None:
    """Pending is not waiting."""
    state: BatchState[str] = BatchState(2)
    state.add("a", "A")
    assert state.admit() == []
    assert state.get("a") == "A"


def test_a_stream_can_leave_from_anywhere() -> None:
    """Pending, waiting or active; one that is not there is no error."""
    state = batch(1, "active", "waiting")
    state.admit()
    state.add("pending", "PENDING")
    for name in ("active", "waiting", "pending"):
        assert name in state
        assert state.remove(name) == name.upper()
        assert name not in state
    assert state.remove("active") is None
    assert state.all() == {}


def test_a_stream_is_there_once() -> None:
    """Adding it again, wherever it is, is our own mistake."""
    state = batch(1, "a", "b")
    state.admit()
    for name in ("a", "b"):
        with pytest.raises(AssertionError):
            state.add(name, "again")


@pytest.mark.parametrize("seed", range(20))
def test_nobody_is_lost(seed: int) -> None:
    """Any order of events: everybody who came and has not left is in exactly one place, and those
    who became runnable first run first."""
    rng, state, there, order = random.Random(seed), BatchState[str](3), set[str](), list[str]()
    for number in range(200):
        act = rng.choice(["add", "runnable", "admit", "remove"])
        if act == "add":
            state.add(f"s{number}", f"s{number}")
            there.add(f"s{number}")
        elif act == "runnable" and state.pending:
            name = rng.choice(sorted(state.pending))
            state.runnable(name)
            order.append(name)
        elif act == "admit":
            moved = state.admit()
            assert order[: len(moved)] == moved
            del order[: len(moved)]
            assert not state.waiting or len(state.active) == 3
        elif act == "remove" and there:
            name = rng.choice(sorted(there))
            assert state.remove(name) == name
            there.remove(name)
            order = [other for other in order if other != name]
        state.check_invariants()
        assert set(state.all()) == there
        assert list(state.waiting) == order
