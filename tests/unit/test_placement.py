"""Placement: pure, the same for the same view, near pages first."""

from __future__ import annotations

import random

import pytest

from policies.placement import Hold, LeastLoaded, Placement
from policies.view import ClusterView, RequestView, WorkerView

REQUEST = RequestView("r", prompt_tokens=100, max_tokens=10)
POLICY = LeastLoaded()


def view(*workers: str) -> ClusterView:
    """Workers as `p0@a/2`: role and number, arena, load."""
    made = []
    for text in workers:
        name, rest = text.split("@")
        store, load = rest.split("/")
        role = {"p": "prefill", "d": "decode"}[name[0]]
        made.append(WorkerView(name, role, store, int(load)))
    return ClusterView(tuple(made))


def test_the_least_loaded_get_the_request() -> None:
    """Of either role."""
    there = view("p0@a/3", "p1@a/1", "d0@a/2", "d1@a/1")
    assert POLICY.place(REQUEST, there) == Placement("p1", "d1")


def test_pages_in_place_come_before_a_lighter_load() -> None:
    """A prefill that shares the decode's arena needs no transfer."""
    there = view("p0@a/9", "p1@b/0", "d0@a/0", "d1@b/1")
    assert POLICY.place(REQUEST, there) == Placement("p0", "d0")


def test_without_a_near_prefill_a_far_one_serves() -> None:
    """The pages travel then."""
    there = view("p0@a/1", "p1@a/0", "d0@b/0")
    assert POLICY.place(REQUEST, there) == Placement("p1", "d0")


@pytest.mark.parametrize(
    ("there", "missing"),
    [(view(), "prefill"), (view("d0@a/0"), "prefill"), (view("p0@a/0"), "decode")],
)
def test_a_missing_role_holds_the_request(there: ClusterView, missing: str) -> None:
    """And says which."""
    assert POLICY.place(REQUEST, there) == Hold(f"no {missing} worker is ready")


def test_a_successor_shares_the_arena() -> None:
    """It is not the one that is gone, and it has the fewest requests of those left."""
    there = view("p0@a/0", "d0@a/0", "d1@a/5", "d2@a/4", "d3@b/0")
    assert POLICY.successor(there, "a", "d0") == "d2"
    assert POLICY.successor(there, "b", "d0") == "d3"
    assert POLICY.successor(there, "b", "d3") is None
    assert POLICY.successor(there, "c", "") is None


def test_the_same_view_gives_the_same_decision() -> None:
    """In whatever order the workers are listed: decisions can be replayed."""
    workers = ["p0@a/1", "p1@a/1", "p2@b/1", "d0@a/2", "d1@a/2", "d2@b/2"]
    for seed in range(20):
        random.Random(seed).shuffle(workers)
        assert POLICY.place(REQUEST, view(*workers)) == Placement("p0", "d0")
        assert POLICY.successor(view(*workers), "a", "d0") == "d1"
