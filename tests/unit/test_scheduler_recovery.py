"""The scheduler itself dies: journal, stream records and returning workers bring every request back."""

from __future__ import annotations

from functools import partial

import pytest

from baton.v1 import journal_pb2
from services.scheduler.request import Phase
from tests.support.fake_cluster import FakeCluster
from tests.support.scheduling import CANCELLED, LENGTH, SHAPES, STOP, owner, reason, running

# --- the scheduler itself dies ---


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 4])
def test_a_running_request_is_resumed(tokens: int, compact: bool) -> None:
    """From the journal and the stream's record: the same tokens, none computed twice, one end."""
    cluster = FakeCluster()
    running(cluster, tokens)
    cluster.until(lambda: cluster.scheduler.requests["r"].phase is Phase.RUNNING)
    cluster.restart_scheduler(compact=compact)
    assert cluster.tokens("r") == []
    cluster.scheduler.reader_joined("r")
    cluster.reattach()
    cluster.pass_time(0.1)
    cluster.settle()
    assert cluster.tokens("r") == cluster.expected("r", 10)
    final = cluster.final("r")
    assert final is not None
    assert final.finished.usage.recomputed_tokens == 0
    assert len(cluster.asked_of_stores("OpenStream")) == 0
    cluster.check_quiet()


@pytest.mark.parametrize("compact", [False, True])
def test_a_finished_request_is_still_known(compact: bool) -> None:
    """Its events and its end are those that were, for as long as it is retained."""
    cluster = FakeCluster()
    cluster.ask("r", stop_at=2, max_tokens=9)
    cluster.settle()
    before = cluster.scheduler.requests["r"]
    cluster.restart_scheduler(compact=compact)
    after = cluster.scheduler.requests["r"]
    assert after.events == before.events
    assert after.final == before.final
    assert after.done
    cluster.reattach()
    cluster.pass_time(1)
    cluster.settle()
    assert cluster.asked_of_stores("OpenStream") == []
    cluster.check_quiet()


def test_what_was_never_placed_starts_after_a_restart() -> None:
    """It waits like a new one."""
    cluster = FakeCluster(decodes=0)
    cluster.ask("r")
    cluster.restart_scheduler()
    cluster.scheduler.reader_joined("r")
    cluster.start("decode-0")
    cluster.reattach()
    cluster.pass_time(1)
    cluster.settle()
    assert reason(cluster, "r") == LENGTH


def test_epochs_go_on_after_a_restart() -> None:
    """Every later epoch is greater than any that was journaled."""
    cluster = FakeCluster()
    running(cluster, 2)
    used = max(number for _, number in cluster.placed)
    cluster.restart_scheduler()
    cluster.scheduler.reader_joined("r")
    cluster.kill("decode-0")
    cluster.kill("decode-1")
    cluster.start("decode-0")
    cluster.reattach()
    cluster.pass_time(1)
    cluster.settle()
    [asked] = cluster.asked_of_stores("Reassign")
    assert asked.epoch > used
    assert cluster.tokens("r") == cluster.expected("r", 10)


def test_epochs_never_go_back_through_a_compaction() -> None:
    """A takeover is under way when the journal is compacted, and the request ends before its answer:
    the epoch has been used all the same."""
    cluster = FakeCluster(decodes=3)
    running(cluster, 2)
    cluster.kill(owner(cluster))
    used = max(number for _, number in cluster.placed)
    cluster.run(cluster.scheduler.cancel(cluster.now, "r", "cancelled"))
    cluster.execute("r")  # the takeover; the release is lost with the scheduler
    for _ in range(2):
        cluster.restart_scheduler(compact=True)
    cluster.reattach()
    cluster.pass_time(1)
    cluster.ask("s")
    opening = cluster.asked_of_stores("OpenStream")[-1]
    assert min(opening.epoch, opening.attempt) > used
    cluster.settle()
    cluster.check_quiet()


def test_a_worker_that_comes_and_goes_while_streams_are_looked_for() -> None:
    """What it had said to the scheduler before this one is made up for whenever it is back."""
    cluster = FakeCluster(decodes=2, options={"recover_grace_ms": 500})
    running(cluster, 2)
    cluster.ask("other", max_tokens=50)
    worker = cluster.workers[owner(cluster)]
    cluster.run(cluster.scheduler.cancel(cluster.now, "r", "cancelled"))
    cluster.execute("r")
    worker.jobs = [job for job in worker.jobs if job.request_id != "r"]
    cluster.restart_scheduler()
    cluster.attach(worker)
    cluster.detach(worker)
    cluster.pass_time(1)
    cluster.settle()
    cluster.scheduler.reader_joined("other")
    cluster.reattach()
    cluster.settle()
    assert not cluster.stores["s0"].quarantine


def test_a_takeover_that_was_journaled_and_never_made() -> None:
    """The store still has the old epoch, whose decode may be alive: nobody else gets that epoch."""
    cluster = FakeCluster()
    running(cluster, 3)
    old = cluster.workers[owner(cluster)]
    old.paused = True
    cluster.pass_time(1)
    assert len(cluster.asked_of_stores("Reassign")) == 1
    cluster.restart_scheduler()  # before the store has heard of it
    cluster.scheduler.reader_joined("r")
    cluster.reattach()
    cluster.pass_time(1)
    cluster.settle()
    assert cluster.tokens("r") == cluster.expected("r", 10)
    old.paused = False
    cluster.attach(old)
    cluster.settle()
    cluster.check_quiet()


def test_a_takeover_that_was_never_made_is_not_needed_any_more() -> None:
    """The old decode is back before the store has heard of a new epoch: it goes on under its own."""
    cluster = FakeCluster()
    running(cluster, 3)
    old, epoch = cluster.workers[owner(cluster)], cluster.scheduler.requests["r"].epoch
    old.paused = True
    cluster.pass_time(1)
    old.paused = False
    cluster.restart_scheduler()
    cluster.scheduler.reader_joined("r")
    cluster.reattach()
    cluster.pass_time(0.1)
    cluster.settle()
    assert [(name, command.epoch) for name, command in cluster.commands("decode")] == [
        (old.name, epoch)
    ]
    assert cluster.asked_of_stores("Reassign") == []
    assert cluster.tokens("r") == cluster.expected("r", 10)
    cluster.check_quiet()


def test_reports_before_the_stream_is_found_again_are_no_harm() -> None:
    """A decode that went on all the while reports token 6 to a scheduler that knows none."""
    cluster = FakeCluster(options={"recover_grace_ms": 5000})
    running(cluster, 4)
    cluster.restart_scheduler()
    cluster.scheduler.reader_joined("r")
    worker = cluster.workers["decode-0"]
    cluster.attach(worker)
    worker.act()
    cluster.deliver_report(worker)
    cluster.reattach()
    cluster.pass_time(1)
    cluster.settle()
    assert cluster.tokens("r") == cluster.expected("r", 10)
    cluster.check_quiet()


@pytest.mark.parametrize("asked", [False, True])
def test_a_request_that_ends_while_it_is_looked_for(asked: bool) -> None:
    """Cancelled before or after its store has been asked: its stream is closed all the same."""
    cluster = FakeCluster()
    running(cluster, 3)
    cluster.restart_scheduler()
    cluster.reattach()
    if asked:
        cluster.pass_time(1)
        assert cluster.calls["r"]
    cluster.run(cluster.scheduler.cancel(cluster.now, "r", "cancelled"))
    cluster.settle()
    cluster.pass_time(1)
    cluster.settle()
    assert reason(cluster, "r") == CANCELLED
    cluster.check_quiet()


def test_a_stop_string_that_is_found_in_the_record() -> None:
    """Decode does not know of stop strings and has gone on: it is stopped, its pages waited for, and
    no token behind the stop is shown."""
    cluster = FakeCluster(decodes=1)
    cluster.ask("r", max_tokens=50, stop_at=6)
    cluster.until(lambda: len(cluster.tokens("r")) == 4)
    cluster.restart_scheduler()
    cluster.scheduler.reader_joined("r")
    for _ in range(8):
        cluster.workers["decode-0"].act()
    cluster.reattach()
    cluster.pass_time(1)
    cluster.settle()
    assert reason(cluster, "r") == STOP
    assert len(cluster.tokens("r")) == 7
    cluster.check_quiet()


def test_a_deadline_outlives_the_scheduler() -> None:
    """Also through a journal that has been compacted; the time between counts."""
    cluster = FakeCluster(decodes=0)
    cluster.ask("r", deadline_s=2.0)
    cluster.now += 1.0
    for _ in range(2):
        cluster.restart_scheduler(compact=True)
        cluster.scheduler.reader_joined("r")
    cluster.pass_time(0.9)
    assert cluster.final("r") is None
    cluster.pass_time(0.2)
    assert reason(cluster, "r") == CANCELLED


def test_a_request_without_a_reader_is_cancelled_after_a_restart() -> None:
    """Nobody has come back for it within orphan_ms."""
    cluster = FakeCluster(decodes=0)
    cluster.ask("r", orphan_ms=1000)
    cluster.restart_scheduler()
    cluster.pass_time(0.9)
    assert cluster.final("r") is None
    cluster.pass_time(0.2)
    assert reason(cluster, "r") == CANCELLED


def test_streams_that_nobody_remembers_are_closed() -> None:
    """The end was journaled, the release was not made: in every store that had pages of it."""
    for shape in SHAPES:
        cluster = FakeCluster(**shape)
        cluster.ask("r", max_tokens=2)
        cluster.until(partial(cluster.final, "r"))
        cluster.restart_scheduler(compact=True)
        cluster.reattach()
        cluster.pass_time(1)
        cluster.settle()
        cluster.check_quiet()


def test_the_journal_is_as_short_as_it_can_be() -> None:
    """What is forgotten is not in it; what is known comes back from it unchanged."""
    cluster = FakeCluster(options={"retain_ms": 1000})
    cluster.ask("a")
    cluster.settle()
    cluster.run(cluster.scheduler.reader_left(cluster.now, "a"))
    cluster.pass_time(2)
    running(cluster, 3, "b")
    records = cluster.scheduler.journal()
    assert [record.WhichOneof("record") for record in records] == [
        "accepted",
        "placed",
        "placed",
    ]  # and the last epoch
    again = cluster._new_scheduler()
    again.recover(cluster.now, cluster.unix_ms, records)
    assert again.journal() == records
    again.check_invariants()


def test_a_damaged_journal_entry_for_nobody_is_skipped() -> None:
    """Placed and Ended without their Accepted, as a compaction may leave them behind."""
    scheduler = FakeCluster()._new_scheduler()
    placed = journal_pb2.Placed(request_id="x", epoch=5000, attempt=5001)
    ended = journal_pb2.Ended(request_id="x", token_ids=[1], logprobs=[0.0])
    scheduler.recover(
        0.0, 0, [journal_pb2.JournalRecord(placed=placed), journal_pb2.JournalRecord(ended=ended)]
    )
    assert scheduler.requests == {}


def test_a_stream_of_another_opening_is_not_taken_up() -> None:
    """A call of a scheduler before came late and has opened it again, in another way: it is released,
    and the request starts anew."""
    cluster = FakeCluster()
    running(cluster, 2)
    record = cluster.stores["s0"].streams["r"]
    record.epoch, record.attempt = record.epoch - 4, record.attempt - 4
    for worker in cluster.workers.values():
        worker.jobs.clear()
    cluster.restart_scheduler()
    cluster.reattach()
    for _ in range(6):
        cluster.pass_time(0.2)
        cluster.settle()
    assert len(cluster.asked_of_stores("OpenStream")) == 1
    assert cluster.tokens("r") == cluster.expected("r", 10)
    cluster.check_quiet()


@pytest.mark.parametrize("older", [True, False])
def test_a_stream_that_begins_at_a_later_token_is_not_taken_up(*, older: bool) -> None:
    """Its KV was computed again from some token on, and what came before died with a scheduler: what
    the store holds first is not the request's first token, stop strings or not. Found by the walk of
    seed 1213, in which the release of that opening was lost with a second restart."""
    cluster = FakeCluster()
    running(cluster, 2, stop_at=5)
    record = cluster.stores["s0"].streams["r"]
    record.request.first_index = 1
    del record.tokens[0]
    if older:
        record.epoch, record.attempt = record.epoch - 4, record.attempt - 4
    for worker in cluster.workers.values():
        worker.jobs.clear()
    told = list(cluster.said["r"])
    cluster.restart_scheduler()
    cluster.reattach()
    for _ in range(6):
        cluster.pass_time(0.2)
        cluster.settle()
    assert cluster.scheduler.requests["r"].events[: len(told)] == told
    assert reason(cluster, "r") == STOP
    cluster.check_quiet()
