"""The block pool: every block is in exactly one place, and a writer that may wake up keeps its own."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from services.kv_store.pool import BlockPool, Quarantine


def alive(*writers: str) -> Callable[[str], bool]:
    return lambda writer: writer in writers


def test_a_fresh_pool_is_free() -> None:
    """All blocks, and nothing to tell the headers."""
    pool = BlockPool(5)
    assert pool.free == set(range(5))
    assert pool.drain_changes() == (set(), set())
    pool.check_invariants()


def test_blocks_are_neighbours_where_they_can_be() -> None:
    """The lowest run that is long enough: a run is one transfer frame."""
    pool = BlockPool(10)
    assert pool.take(3, "p") == [0, 1, 2]
    assert pool.take(4, "p") == [3, 4, 5, 6]
    for block in (1, 3, 4):
        pool.drop(block)
    assert pool.take(2, "p") == [3, 4]
    assert pool.take(3, "p") == [7, 8, 9]


def test_a_scattered_pool_still_gives_blocks() -> None:
    """No run is long enough: the lowest free ones, each once."""
    pool = BlockPool(6)
    pool.take(6, "p")
    for block in (0, 2, 4):
        pool.drop(block)
    assert pool.take(3, "p") == [0, 2, 4]


def test_nothing_taken_is_nothing() -> None:
    """Zero blocks, also of a full pool."""
    pool = BlockPool(1)
    pool.take(1, "p")
    assert pool.take(0, "p") == []
    pool.check_invariants()


def test_a_shared_block_stays_until_its_last_holder_goes() -> None:
    """`drop` says when that was, and only then is the block free."""
    pool = BlockPool(2)
    [block] = pool.take(1, "p")
    pool.share(block)
    assert not pool.drop(block)
    assert block not in pool.free
    assert pool.drop(block)
    assert pool.free == {0, 1}
    assert pool.writers == {}


def test_a_block_whose_writer_may_be_there_is_not_free() -> None:
    """It is held back with who may write it and for what; the same block of a dead writer is free."""
    pool = BlockPool(3)
    pool.take(2, "d0")
    assert pool.retire(0, "r", alive("d0"))
    assert not pool.retire(1, "r", alive("d1"))
    assert pool.quarantined == {0: Quarantine("d0", "r")}
    assert pool.free == {1, 2}
    pool.check_invariants()
    pool.release_quarantine([0])
    assert pool.free == {0, 1, 2}


def test_a_sealed_block_has_no_writer_to_wait_for() -> None:
    """Nobody writes it again, so giving it up frees it, whoever is alive."""
    pool = BlockPool(1)
    pool.take(1, "d0")
    pool.finish_writing(0)
    assert not pool.retire(0, "r", alive("d0"))
    assert pool.free == {0}


def test_our_own_mistakes_are_assertions() -> None:
    """Too many blocks, a block that is not leased, or one that others hold."""
    pool = BlockPool(2)
    [block] = pool.take(1, "p")
    pool.share(block)
    for mistake in (
        lambda: pool.take(2, "p"), lambda: pool.share(1), lambda: pool.drop(1),
        lambda: pool.retire(block, "r", alive()),
    ):  # fmt: skip
        with pytest.raises(AssertionError):
            mistake()
    pool.check_invariants()


def test_changes_are_told_once() -> None:
    """What has moved since last asked, and of that what is newly leased and still is."""
    pool = BlockPool(4)
    pool.take(3, "d0")
    pool.drop(0)
    pool.retire(1, "r", alive("d0"))
    assert pool.drain_changes() == ({0, 1, 2}, {2})
    assert pool.drain_changes() == (set(), set())
    pool.release_quarantine([1])
    assert pool.drain_changes() == ({1}, set())


@pytest.mark.parametrize("seed", range(40))
def test_no_block_is_lost(seed: int) -> None:
    """Whatever is done in whatever order, each block is free, leased or held back."""
    rng, pool = random.Random(seed), BlockPool(8)
    for _ in range(50):
        leased = sorted(pool.leases)
        single = [block for block in leased if pool.leases[block] == 1]
        acts = ["take", *["share", "drop"] * bool(leased), *["retire"] * bool(single)]
        act = rng.choice(acts + ["release"] * bool(pool.quarantined))
        if act == "take":
            taken = pool.take(rng.randint(0, len(pool.free)), "w")
            assert not set(taken) & set(leased)
            assert len(taken) == len(set(taken))
        elif act == "retire":
            pool.retire(rng.choice(single), "r", alive(*["w"] * rng.randint(0, 1)))
        elif act == "release":
            pool.release_quarantine(rng.sample(sorted(pool.quarantined), 1))
        else:
            getattr(pool, act)(rng.choice(leased))
        pool.check_invariants()
