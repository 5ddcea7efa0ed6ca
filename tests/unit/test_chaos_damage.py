"""When a round of corruption counts as clean."""

from __future__ import annotations

import dataclasses

import pytest

from baton.chaos.damage import Damage

FIVE = Damage(
    "held", 0, flips=5, mattering=4, parts=(("magic", 1), ("padding", 1), ("payload", 3)),
    corrupt_blocks=4, blocks_repaired=4, tokens_repaired=256,
)  # fmt: skip
ON_DISK = dataclasses.replace(
    FIVE, where="disk", flips=4, mattering=4, parts=(("file_content", 4),)
)


def test_everything_was_noticed() -> None:
    assert FIVE.good
    assert ON_DISK.good


def test_the_store_may_be_first() -> None:
    """With a field of its own written anew, or a cached block dropped; not with what it never writes."""
    four = dataclasses.replace(FIVE, corrupt_blocks=3, blocks_repaired=3)
    assert four.good
    three = dataclasses.replace(four, corrupt_blocks=2, blocks_repaired=2)
    assert not three.good
    assert dataclasses.replace(three, cached_dropped=1).good
    assert not dataclasses.replace(three, headers_mended=1).good


def test_on_the_wire_as_many_messages_are_noticed_as_matter() -> None:
    """By the stores' own counter; but for those that are perhaps lost with their connection."""
    wire = Damage("wire", 0, flips=9, mattering=6, corrupt_messages=6)
    assert wire.good
    assert not dataclasses.replace(wire, corrupt_messages=5).good
    assert not dataclasses.replace(wire, corrupt_messages=7).good
    assert dataclasses.replace(wire, corrupt_messages=7, dropped=1).good


@pytest.mark.parametrize(
    "wrong",
    [{"corrupt_blocks": 5, "blocks_repaired": 5}, {"blocks_repaired": 3}, {"repair_mismatches": 1},
     {"prompt_tokens_recomputed": 64}, {"trouble": "no view"}],
)  # fmt: skip
def test_what_is_not_clean(wrong: dict[str, object]) -> None:
    assert not dataclasses.replace(FIVE, **wrong).good  # type: ignore[arg-type]


def test_a_file_costs_its_own_tokens_only() -> None:
    """Or none, where another store's file is whole."""
    assert not dataclasses.replace(ON_DISK, tokens_repaired=320).good
    assert not dataclasses.replace(ON_DISK, tokens_repaired=0).good
    assert dataclasses.replace(ON_DISK, tokens_repaired=0, kept_elsewhere=True).good
