"""Stream leases: renewed or over, and never over because nobody could be heard."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.kv_store.leases import LeaseTable


def table() -> LeaseTable:
    leases = LeaseTable(lease_s=10.0, step_s=1.0)
    leases.tick(500.0)
    return leases


def test_a_lease_that_nobody_renews_ends() -> None:
    """Not a moment before its time."""
    leases = table()
    leases.grant("r")
    for second in range(1, 11):
        assert leases.expired() == []
        leases.tick(500.0 + second)
    assert leases.expired() == ["r"]
    leases.end("r")
    leases.end("r")
    leases.check_invariants([])


def test_renewal_starts_it_again_and_names_what_is_unknown() -> None:
    """Also what has just ended: whoever asks learns that it is lost."""
    leases = table()
    for name in ("a", "b"):
        leases.grant(name)
    for second in range(1, 10):
        leases.tick(500.0 + second)
    assert leases.renew(["a", "x"]) == ["x"]
    for second in range(10, 13):
        leases.tick(500.0 + second)
    assert leases.expired() == ["b"]
    leases.end("b")
    assert leases.renew(["a", "b"]) == ["b"]
    leases.check_invariants(["a"])


@pytest.mark.parametrize("gap_s", [5.0, 11.0, 100_000.0])
def test_time_in_which_the_store_was_stopped_does_not_count(gap_s: float) -> None:
    """Nobody could have been heard then: whoever is there has the rest of the lease to say so."""
    leases = table()
    leases.grant("r")
    leases.tick(500.0 + gap_s)
    assert leases.expired() == []
    assert leases.now == 1.0
    leases.renew(["r"])
    leases.check_invariants(["r"])


def test_a_clock_does_not_go_back() -> None:
    with pytest.raises(AssertionError):
        table().tick(499.0)


@given(st.lists(st.tuples(st.sampled_from("tgre"), st.integers(0, 30)), max_size=60))
def test_against_a_plain_list(acts: list[tuple[str, int]]) -> None:
    """Any order of ticks, grants, renewals and ends."""
    leases, model, now, mine = table(), dict[str, float](), 500.0, 0.0
    for act, n in acts:
        name = str(n % 3)
        if act == "t":
            now += n / 8
            mine += min(n / 8, 1.0)
            leases.tick(now)
        elif act == "g":
            leases.grant(name)
            model[name] = mine
        elif act == "r":
            assert leases.renew([name]) == ([] if name in model else [name])
            if name in model:
                model[name] = mine
        else:
            leases.end(name)
            model.pop(name, None)
        assert set(leases.expired()) == {r for r, at in model.items() if mine - at >= 10.0}
        leases.check_invariants(model)
