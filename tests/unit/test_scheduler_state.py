"""The scheduler's state machine against fake stores and workers: one final event for every request,
the same tokens whatever dies, no epoch used before it is journaled, no page given back too early.

`FakeCluster` (tests/support/fake_cluster.py) checks most of this after each event of every test here.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

from baton.v1 import control_pb2, inference_pb2, store_pb2
from services.ops.errors import Overloaded, RequestConflict, UnknownRequest
from services.scheduler.request import CallStore, Phase, Write
from tests.support.cluster_walk import ClusterWalk
from tests.support.fake_cluster import FakeCluster, word
from tests.support.fake_worker import token_of
from tests.support.scheduling import CANCELLED, LENGTH, SHAPES, STOP, owner, reason, running


@pytest.mark.parametrize("restarts", [False, True], ids=["one-scheduler", "restarts"])
@pytest.mark.parametrize("seeds", [range(first, first + 50) for first in range(0, 600, 50)])
def test_whatever_happens_every_request_ends_once_and_right(seeds: range, restarts: bool) -> None:
    """Kills, pauses, cut links, cancellations, corrupt pages, with and without restarts of the
    scheduler, in any order. When the faults are over every request ends, with the tokens of an
    undisturbed run; without restarts no stream stays open and no page waits for a worker that is
    there."""
    for seed in seeds:
        rng = random.Random(seed)
        options = {"orphan_ms": 2000, "retain_ms": 10**7}
        walk = ClusterWalk(FakeCluster(**rng.choice(SHAPES), options=options), rng.choice)
        walk.restarts = restarts
        try:
            for _ in range(150):
                walk.step()
            walk.end()
        except Exception as error:
            story = "\n".join(walk.story)
            raise AssertionError(f"seed {seed}: {error!r}\n{story}") from error


# --- a request's life ---


@pytest.mark.parametrize("shape", SHAPES)
def test_an_undisturbed_request(shape: dict[str, Any]) -> None:
    """All its tokens, one end, nothing left behind; in one arena or over two."""
    cluster = FakeCluster(**shape)
    for n in range(4):
        cluster.ask(f"r{n}", max_tokens=n + 1)
    cluster.settle()
    cluster.pass_time(1)
    cluster.settle()
    for n in range(4):
        assert cluster.tokens(f"r{n}") == cluster.expected(f"r{n}", n + 1)
        assert reason(cluster, f"r{n}") == LENGTH
    cluster.check_quiet()


def test_it_is_journaled_before_anybody_is_told() -> None:
    """Acceptance first, then the placement with its epochs, and only then the first call."""
    cluster = FakeCluster()
    cluster.sent.clear()
    cluster.ask("r")
    accepted, placed, opening = cluster.sent
    assert isinstance(accepted, Write)
    assert accepted.record.accepted.request_id == "r"
    assert isinstance(placed, Write)
    assert isinstance(opening, CallStore)
    message = opening.message
    assert (placed.record.placed.epoch, placed.record.placed.attempt) == (
        message.epoch,
        message.attempt,
    )


def test_it_is_idle_when_every_request_has_ended() -> None:
    """Not while one waits, and not before the streams of a scheduler that died are found."""
    cluster = FakeCluster()
    assert cluster.scheduler.idle
    cluster.ask("r")
    assert not cluster.scheduler.idle
    cluster.settle()
    assert cluster.scheduler.idle
    cluster.ask("s")
    cluster.restart_scheduler()
    assert not cluster.scheduler.idle


def test_one_token_needs_no_decode() -> None:
    """Prefill samples it: no decode is told of the request."""
    cluster = FakeCluster()
    cluster.ask("r", max_tokens=1)
    cluster.settle()
    assert reason(cluster, "r") == LENGTH
    assert cluster.commands("decode") == []
    cluster.check_quiet()


@pytest.mark.parametrize("at", range(4))
def test_a_stop_string_ends_the_request(at: int) -> None:
    """Its token is counted, its text is not shown, and whoever still computes is told to stop."""
    cluster = FakeCluster()
    cluster.ask("r", max_tokens=10, stop_at=at)
    cluster.settle()
    assert reason(cluster, "r") == STOP
    assert len(cluster.tokens("r")) == at + 1
    shown = "".join(event.token.text for event in cluster.scheduler.requests["r"].events)
    assert shown == "".join(word(token_of("r", index)) for index in range(at))
    cluster.check_quiet()


@pytest.mark.parametrize("at", range(4))
def test_a_stop_token_ends_the_request(at: int) -> None:
    """It is emitted, then the end; decode has stopped by itself."""
    cluster = FakeCluster()
    cluster.ask("r", max_tokens=10, stop_token_at=at)
    cluster.settle()
    assert reason(cluster, "r") == STOP
    assert len(cluster.tokens("r")) == at + 1
    cluster.check_quiet()


def test_a_request_id_is_used_once() -> None:
    """The same body is the same request, another one is a conflict."""
    cluster = FakeCluster()
    cluster.ask("r", max_tokens=3)
    known = cluster.scheduler.requests["r"].body
    assert cluster.scheduler.same_body(known)
    assert not cluster.scheduler.same_body(inference_pb2.GenerateRequest(request_id="s"))
    with pytest.raises(RequestConflict, match="request_id"):
        cluster.scheduler.same_body(inference_pb2.GenerateRequest(request_id="r", text="other"))


def test_a_request_is_forgotten_when_its_time_is_over() -> None:
    """Finished it stays for retain_ms, and longer while somebody reads it."""
    cluster = FakeCluster()
    cluster.ask("r", retain_ms=1000)
    cluster.settle()
    cluster.pass_time(1.5)
    assert cluster.final("r") is not None
    cluster.run(cluster.scheduler.reader_left(cluster.now, "r"))
    cluster.pass_time(0.1)
    with pytest.raises(UnknownRequest, match="request_id: 'r'"):
        cluster.scheduler.find("r")


def test_more_than_may_wait_are_refused() -> None:
    """And counted; those who wait are served when workers come."""
    cluster = FakeCluster(decodes=0, options={"waiting_max": 2})
    cluster.ask("a")
    cluster.ask("b")
    with pytest.raises(Overloaded, match="waiting_max: 2"):
        cluster.ask("c")
    assert cluster.scheduler.counts.refused == 1
    cluster.start("decode-0")
    cluster.settle()
    assert reason(cluster, "a") == reason(cluster, "b") == LENGTH


def test_requests_are_spread() -> None:
    """The decode with the fewest requests gets the next one."""
    cluster = FakeCluster(decodes=3)
    for n in range(6):
        cluster.ask(f"r{n}")
    owners = [owner(cluster, f"r{n}") for n in range(6)]
    assert sorted(owners) == sorted(["decode-0", "decode-1", "decode-2"] * 2)


# --- tokens ---


def report(cluster: FakeCluster, *indexes: int, other: bool = False) -> None:
    """The present decode reports these tokens of `r`."""
    request = cluster.scheduler.requests["r"]
    tokens = [
        control_pb2.Token(index=i, token_id=token_of("r", i) + other, logprob=-1.0) for i in indexes
    ]
    stream = control_pb2.StreamTokens(request_id="r", epoch=request.epoch, tokens=tokens)
    step = control_pb2.StepReport(streams=[stream])
    cluster.run(cluster.scheduler.step_reported(cluster.now, request.decode_worker, step))


def test_a_token_that_comes_twice_is_taken_once() -> None:
    """The duplicate is absorbed and counted, if it is equal."""
    cluster = FakeCluster()
    running(cluster, 3)
    before = cluster.scheduler.counts.duplicate_tokens_absorbed
    report(cluster, 0, 1, 2, 3)
    assert len(cluster.tokens("r")) == 4
    assert cluster.scheduler.counts.duplicate_tokens_absorbed == before + 3


def test_tokens_behind_a_stop_string_are_not_taken() -> None:
    """Also when they come in one report with it, as after a takeover."""
    cluster = FakeCluster()
    running(cluster, 3, stop_at=4)
    report(cluster, 3, 4, 5, 6)
    assert len(cluster.tokens("r")) == 5
    assert reason(cluster, "r") == STOP
    cluster.settle()
    cluster.check_quiet()


def test_two_different_tokens_at_one_index_are_our_mistake() -> None:
    """Bit-identical means that this cannot happen: it is asserted, never passed on."""
    cluster = FakeCluster()
    running(cluster, 3)
    with pytest.raises(AssertionError, match="r token 1 differs"):
        report(cluster, 1, other=True)


def test_a_gap_is_asked_for_again() -> None:
    """No token is taken out of order; the same epoch is told where to report from."""
    cluster = FakeCluster()
    running(cluster, 3)
    told = len(cluster.commands("decode"))
    report(cluster, 5)
    assert len(cluster.tokens("r")) == 3
    _, command = cluster.commands("decode")[told]
    assert (command.epoch, command.report_from) == (cluster.scheduler.requests["r"].epoch, 3)
    cluster.settle()
    assert cluster.tokens("r") == cluster.expected("r", 10)


# --- a full arena ---


def test_a_request_without_room_waits_for_the_others() -> None:
    """It is tried again, not before HOLD_RETRY_S, and runs when there is room."""
    cluster = FakeCluster(slots=1)
    cluster.ask("a", max_tokens=9)
    cluster.ask("b", max_tokens=2)
    cluster.until(lambda: cluster.scheduler.requests["b"].phase is Phase.WAITING)
    tries = len(cluster.asked_of_stores("OpenStream"))
    cluster.run(cluster.scheduler.tick(cluster.now))
    assert len(cluster.asked_of_stores("OpenStream")) == tries
    cluster.settle()
    cluster.pass_time(0.1)
    cluster.settle()
    assert reason(cluster, "a") == reason(cluster, "b") == LENGTH
    cluster.check_quiet()


def test_a_request_that_never_fits_fails() -> None:
    """Waiting would not help: the client is told at once."""
    cluster = FakeCluster(slots=0)
    cluster.ask("r")
    cluster.settle()
    final = cluster.final("r")
    assert final is not None
    assert (final.failed.code, final.failed.retryable) == ("OUT_OF_RANGE", False)
    assert "OUT_OF_RANGE" in final.failed.story[-1]


def test_a_request_waits_for_room_for_as_long_as_it_takes() -> None:
    """Nobody else is running, but pages are held back, or on their way to disk: that ends."""
    cluster = FakeCluster(slots=1)
    cluster.ask("r", max_tokens=2)
    store = cluster.stores["s0"]
    store.full = True
    for _ in range(50):
        cluster.settle()
        cluster.pass_time(0.1)
    assert cluster.final("r") is None
    store.full = False
    cluster.pass_time(0.1)
    cluster.settle()
    assert reason(cluster, "r") == LENGTH


# --- leases ---


def test_streams_that_are_open_are_renewed_where_they_are() -> None:
    """In every store that has leased pages for them, until they end."""
    cluster = FakeCluster(prefills=1, decodes=2, store_count=2)
    cluster.ask("r", max_tokens=9)
    assert cluster.scheduler.open_streams() == {}, "nothing has been leased yet"
    cluster.until(lambda: cluster.scheduler.requests["r"].phase is Phase.RUNNING)
    request = cluster.scheduler.requests["r"]
    wanted = {store: {"r": request.epoch} for store in request.stores}
    assert cluster.scheduler.open_streams() == wanted
    cluster.settle()
    assert cluster.scheduler.open_streams() == {}


@pytest.mark.parametrize("when", ["prefill", "decode"])
def test_a_stream_whose_lease_ran_out_is_computed_again(when: str) -> None:
    """Same tokens; what has been said about an earlier epoch, or another store, is not believed."""
    cluster = FakeCluster()
    cluster.ask("r", max_tokens=9)
    scheduler, count = cluster.scheduler, {"prefill": 0, "decode": 4}[when]
    request = scheduler.requests["r"]
    cluster.until(lambda: request.phase is Phase.RUNNING and len(request.tokens) >= count)
    epoch = request.epoch
    for place, said in (("s9", epoch), ("s0", epoch - 1)):
        cluster.run(scheduler.streams_lost(cluster.now, place, {"r": said, "x": 1}))
        assert request.epoch == epoch
    store = cluster.stores["s0"]
    record = store.streams["r"]
    writers = [record.decode_writer, *([] if "r" in store.published else [record.prefill_writer])]
    store.Release(store_pb2.ReleaseRequest(request_id="r", live_writers=writers))
    cluster.run(scheduler.streams_lost(cluster.now, "s0", {"r": epoch}))
    assert request.epoch > epoch
    cluster.settle()
    assert cluster.tokens("r") == cluster.expected("r", 9)
    cluster.check_quiet()


def test_a_store_that_says_no_for_good_fails_the_request() -> None:
    """A code that cannot change is not asked for again and again, and does not hold up the others."""
    cluster = FakeCluster()
    cluster.ask("r")
    call = cluster.calls["r"].popleft()
    cluster.run(
        cluster.scheduler.store_replied(cluster.now, call, None, "INVALID_ARGUMENT", "token_ids: 0")
    )
    for _ in range(3):
        cluster.settle()
        cluster.pass_time(0.1)
    final = cluster.final("r")
    assert final is not None
    assert (final.failed.code, final.failed.retryable) == ("INVALID_ARGUMENT", False)


# --- clients that go away ---


def test_cancelling_stops_the_workers_and_frees_the_pages() -> None:
    """At any stage; the second time it is done already."""
    for tokens in (0, 1, 4):
        cluster = FakeCluster()
        running(cluster, tokens)
        cluster.run(cluster.scheduler.cancel(cluster.now, "r", "cancelled by the client"))
        assert reason(cluster, "r") == CANCELLED
        cluster.run(cluster.scheduler.cancel(cluster.now, "r", "again"))
        cluster.settle()
        assert cluster.scheduler.counts.cancelled == 1
        assert len(cluster.tokens("r")) == tokens
        cluster.check_quiet()


def test_a_release_says_up_to_which_epoch_it_is_meant() -> None:
    """So that one which comes late, after another opening of the same request, ends nothing."""
    cluster = FakeCluster()
    running(cluster, 1)
    out = cluster.scheduler.cancel(cluster.now, "r", "cancelled by the client")
    [release] = [c.message for c in out if isinstance(c, CallStore) and c.method == "Release"]
    assert isinstance(release, store_pb2.ReleaseRequest)
    assert release.epoch == cluster.scheduler.epoch >= cluster.scheduler.requests["r"].epoch > 0
    cluster.run(out)


def test_a_stream_without_a_reader_is_cancelled() -> None:
    """After orphan_ms, unless somebody comes back before."""
    cluster = FakeCluster(decodes=1)
    running(cluster, 2, orphan_ms=1000)
    cluster.workers["decode-0"].paused = True
    cluster.run(cluster.scheduler.reader_left(cluster.now, "r"))
    cluster.pass_time(0.9)
    cluster.scheduler.reader_joined("r")
    cluster.pass_time(5)
    assert cluster.final("r") is None
    cluster.run(cluster.scheduler.reader_left(cluster.now, "r"))
    cluster.pass_time(0.9)
    assert cluster.final("r") is None
    cluster.pass_time(0.2)
    assert reason(cluster, "r") == CANCELLED


def test_orphan_ms_may_be_zero() -> None:
    """Then the last reader's leaving is the end."""
    cluster = FakeCluster()
    running(cluster, 2, orphan_ms=0)
    cluster.scheduler.reader_joined("r")
    cluster.run(cluster.scheduler.reader_left(cluster.now, "r"))
    assert cluster.final("r") is None
    cluster.run(cluster.scheduler.reader_left(cluster.now, "r"))
    assert reason(cluster, "r") == CANCELLED


@pytest.mark.parametrize("decodes", [0, 1])
def test_a_deadline_ends_a_request_wherever_it_is(decodes: int) -> None:
    """Waiting or running; what it has got so far stays."""
    cluster = FakeCluster(decodes=decodes)
    cluster.ask("r", deadline_s=1.0, max_tokens=9)
    if decodes:
        cluster.until(lambda: len(cluster.tokens("r")) == 3)
        cluster.workers["decode-0"].paused = True
    cluster.pass_time(0.9)
    assert cluster.final("r") is None
    cluster.pass_time(0.2)
    assert reason(cluster, "r") == CANCELLED
    assert len(cluster.tokens("r")) == 3 * decodes


# --- looking at it ---


def test_the_view_shows_who_works_on_what() -> None:
    """Workers by name with their requests, and counts that add up."""
    cluster = FakeCluster(decodes=1)
    running(cluster, 2, "a")
    cluster.ask("b", max_tokens=1)
    cluster.settle()
    view = cluster.scheduler.cluster_view([])
    assert [w.name for w in view.workers] == ["decode-0", "prefill-0"]
    assert (view.requests.accepted, view.requests.finished, view.requests.running) == (2, 2, 0)
    running(cluster, 2, "c")
    view = cluster.scheduler.cluster_view([])
    assert view.requests.running == 1
    assert [list(w.running_requests) for w in view.workers] == [["c"], []]
    assert view.requests.prompt_tokens_computed == 9
