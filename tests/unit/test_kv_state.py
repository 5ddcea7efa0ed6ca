"""The store's state under any sequence of opens, takeovers, deaths and releases.

`World` (tests/support/kv_world.py) does what a cluster could do and says after each step what must
hold: one writer per block, nothing taken from a writer that may wake up, nothing committed lost,
nothing leaked.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from services.kv_store.index import PrefixIndex
from services.kv_store.pool import BlockPool
from services.kv_store.state import KvState, Stream
from services.ops.errors import Overloaded, RequestConflict, StaleEpoch, UnknownRequest
from tests.support.kv_world import Walk, key_of


class Requests(RuleBasedStateMachine):
    """Any events in any order; a failure is shrunk to the few that it needs."""

    def __init__(self) -> None:
        super().__init__()
        self.walk = Walk()

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        self.walk.step(lambda options: data.draw(st.sampled_from(options)))

    def teardown(self) -> None:
        self.walk.end()


TestRequests = Requests.TestCase
TestRequests.settings = settings(max_examples=15, stateful_step_count=30)


@pytest.mark.parametrize("seeds", [range(first, first + 50) for first in range(0, 400, 50)])
def test_long_walks(seeds: range) -> None:
    """The same over many more and longer sequences, each from its seed."""
    for seed in seeds:
        walk, rng = Walk(), random.Random(seed)
        try:
            for _ in range(60):
                walk.step(rng.choice)
            walk.end()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
