"""What an abort storm counts by: stages, descriptors, growth, journal rows."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from baton.chaos.abort import rss_grown_late
from baton.chaos.footprint import Footprint, footprint, grown, journal_rows, least
from baton.chaos.stages import STAGES, Watch, Watched, reached, stage_of
from baton.v1 import journal_pb2
from services.scheduler.journal import Journal
from tests.support.arenas import open_record, small_arena

NOTHING: dict[str, Any] = {
    "groups_begun": 0, "groups_done": 0, "attached": False, "tokens": 0, "wanted": 20,
}  # fmt: skip


@pytest.mark.parametrize(
    ("facts", "stage"),
    [
        ({}, "queued"),
        ({"groups_begun": 1}, "prefill"),
        ({"groups_begun": 2, "groups_done": 1}, "transfer"),
        ({"groups_begun": 2, "groups_done": 2, "attached": True}, "transfer"),
        ({"tokens": 1}, "first_token"),
        ({"tokens": 2}, "decoding"),
        ({"tokens": 16}, "decoding"),
        ({"tokens": 17}, "finishing"),
        ({"tokens": 1, "wanted": 4}, "finishing"),
    ],
)
def test_a_stage_follows_from_what_is_there(facts: dict[str, Any], stage: str) -> None:
    """The latest one that anything speaks for."""
    assert stage_of(**{**NOTHING, **facts}) == stage


def test_the_watch_sees_a_request_move(tmp_path: Path) -> None:
    """From the words in its record alone; who waits for a stage is told of it or of a later one."""
    arena = small_arena(tmp_path / "arena")
    watch = Watch(arena)
    mine = watch.requests["me"] = Watched("me", wanted=20)
    watch.look()
    assert mine.stage == ""
    record = open_record(arena, 1, prompt=100, epoch=5, attempt=4)
    record.fixed["request_id"] = b"me"
    watch.look()
    assert mine.stage == "queued"
    record.set_ready(0, 4, 64)
    watch.look()
    assert mine.stage == "prefill"
    mine.target = "prefill"
    record.set_ready(0, 4, 100)
    watch.look()
    assert mine.stage == "transfer"
    assert mine.reached.is_set()
    mine.tokens = 1
    watch.look()
    assert mine.stage == "first_token"


def test_nobody_waits_for_a_stage_that_never_comes() -> None:
    """A request that has ended is given up."""
    watched = Watched("me", wanted=20)
    asyncio.run(asyncio.wait_for(reached(watched, STAGES[-1], lambda: True), 5))
    assert not watched.reached.is_set()


def test_an_open_descriptor_is_counted() -> None:
    """And one that was only open for a moment is not."""
    before = footprint(os.getpid())
    read, write = os.pipe()
    after = footprint(os.getpid())
    os.close(read)
    os.close(write)
    assert after.fds == before.fds + 2
    assert after.rss_kb > 0
    assert after.threads > 0
    assert grown({"me": before}, {"me": after}, "fds") == {"me": 2}
    assert least([after, footprint(os.getpid())]).fds == before.fds
    assert grown({"me": before}, {"me": before}, "fds") == {}


def test_only_growth_after_the_middle_is_a_leak() -> None:
    """What a storm needs at once it has taken by then."""
    steady = [{"me": kb} for kb in (10, 40, 50, 52, 51, 52, 50, 52)]
    leaking = [{"me": 10 * n} for n in range(8)]
    assert rss_grown_late(steady)["me"] <= 0
    assert rss_grown_late(leaking)["me"] == 20
    assert rss_grown_late(leaking[:3]) == {}
    assert Footprint(1, 1, 1) == least([Footprint(1, 2, 1), Footprint(2, 1, 1)])


def test_journal_rows_are_those_of_requests(tmp_path: Path) -> None:
    """The last epoch given out has a row of its own, which says nothing of a request."""
    journal = Journal(tmp_path, fsync=False)
    rows = [
        journal_pb2.JournalRecord(placed=journal_pb2.Placed(request_id="a", epoch=7)),
        journal_pb2.JournalRecord(ended=journal_pb2.Ended(request_id="a")),
        journal_pb2.JournalRecord(placed=journal_pb2.Placed(epoch=9, attempt=9)),
    ]
    journal.append(rows)
    assert journal_rows(tmp_path) == 2
    journal.rewrite(rows[2:])
    assert journal_rows(tmp_path) == 0
    journal.close()
