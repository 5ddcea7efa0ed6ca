"""The scheduler's state machine against fake stores and workers: one final event for every request,
the same tokens whatever dies, no epoch used before it is journaled, no page given back too early.

`FakeCluster` (tests/support/fake_cluster.py) checks most of this after each event of every test here.
"""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import pytest

from baton.v1 import cluster_pb2, control_pb2, inference_pb2, journal_pb2
from services.ops.errors import Overloaded, RequestConflict, UnknownRequest
from services.scheduler.request import CallStore, Phase, Write
from tests.support.fake_cluster import ClusterWalk, FakeCluster, token_of, word

STOP, LENGTH, CANCELLED = (
    inference_pb2.FINISH_REASON_STOP,
    inference_pb2.FINISH_REASON_LENGTH,
    inference_pb2.FINISH_REASON_CANCELLED,
)
SHAPES: list[dict[str, Any]] = [
    {}, {"decodes": 1}, {"slots": 2}, {"prefills": 2, "decodes": 3},
    {"prefills": 2, "decodes": 2, "store_count": 2}, {"prefills": 1, "decodes": 2, "store_count": 2},
]  # fmt: skip


def reason(cluster: FakeCluster, request_id: str) -> int:
    final = cluster.final(request_id)
    assert final is not None, f"{request_id} has not ended"
    assert final.HasField("finished"), final
    return int(final.finished.reason)


def running(cluster: FakeCluster, tokens: int, request_id: str = "r", **ask: Any) -> None:
    """A request that has got exactly `tokens` tokens."""
    cluster.ask(request_id, max_tokens=10, **ask)
    cluster.until(lambda: len(cluster.tokens(request_id)) == tokens)


def owner(cluster: FakeCluster, request_id: str = "r") -> str:
    return cluster.scheduler.requests[request_id].decode_worker.split("/")[0]


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


# --- a decode is lost ---


def test_another_decode_takes_over_where_the_lost_one_was() -> None:
    """Reassign under a new epoch, then PrepareDecode with it; the successor reports from the first
    token that is not known here."""
    cluster = FakeCluster()
    running(cluster, 3)
    lost, epoch = owner(cluster), cluster.scheduler.requests["r"].epoch
    cluster.kill(lost)
    [asked] = cluster.asked_of_stores("Reassign")
    assert asked.epoch > epoch
    cluster.settle()
    heir, command = cluster.commands("decode")[-1]
    assert heir != lost
    assert (command.epoch, command.report_from) == (asked.epoch, 3)
    assert cluster.tokens("r") == cluster.expected("r", 10)
    final = cluster.final("r")
    assert final is not None
    assert final.finished.timing.takeovers == 1
    assert final.finished.usage.recomputed_tokens == 0
    cluster.check_quiet()


def test_the_only_decode_is_waited_for() -> None:
    """Nobody else has the arena: the epoch stays until there is a successor."""
    cluster = FakeCluster(decodes=1)
    running(cluster, 3)
    cluster.kill("decode-0")
    cluster.settle()
    assert cluster.asked_of_stores("Reassign") == []
    cluster.start("decode-0")
    cluster.settle()
    assert cluster.tokens("r") == cluster.expected("r", 10)


def test_a_decode_of_another_arena_is_no_successor() -> None:
    """It cannot read the pages."""
    cluster = FakeCluster(prefills=2, decodes=2, store_count=2)
    running(cluster, 3)
    cluster.kill(owner(cluster))
    cluster.settle()
    assert cluster.asked_of_stores("Reassign") == []


def test_what_the_fenced_decode_says_is_refused() -> None:
    """Its epoch is old: its tokens are not taken, and that is counted."""
    cluster = FakeCluster()
    running(cluster, 3)
    old = owner(cluster)
    epoch = cluster.scheduler.requests["r"].epoch
    worker = cluster.workers[old]
    worker.paused = True
    cluster.pass_time(1)
    cluster.until(lambda: owner(cluster) != old)
    known = len(cluster.tokens("r"))
    token = control_pb2.Token(index=known, token_id=1)
    stream = control_pb2.StreamTokens(request_id="r", epoch=epoch, tokens=[token])
    report = control_pb2.StepReport(streams=[stream])
    cluster.run(cluster.scheduler.step_reported(cluster.now, worker.id, report))
    stream.epoch = cluster.scheduler.requests["r"].epoch
    report = control_pb2.StepReport(streams=[stream])
    cluster.run(cluster.scheduler.step_reported(cluster.now, worker.id, report))
    assert cluster.scheduler.counts.stale_epoch_refused == 2
    assert len(cluster.tokens("r")) == known


def test_an_old_epoch_is_refused_whoever_says_it() -> None:
    """The present decode had the stream before, lost it and got it back: what it said then is late."""
    cluster = FakeCluster(decodes=1)
    running(cluster, 3)
    request = cluster.scheduler.requests["r"]
    stream = control_pb2.StreamTokens(request_id="r", epoch=request.epoch - 1)
    stream.tokens.add(index=3, token_id=1)
    report = control_pb2.StepReport(streams=[stream])
    cluster.run(cluster.scheduler.step_reported(cluster.now, request.decode_worker, report))
    assert len(cluster.tokens("r")) == 3
    assert cluster.scheduler.counts.stale_epoch_refused == 1


def test_silence_without_a_successor_changes_nothing() -> None:
    """Only slower: the epoch is kept, and a heartbeat ends the suspicion, which is counted."""
    cluster = FakeCluster(decodes=1)
    running(cluster, 3)
    epoch = cluster.scheduler.requests["r"].epoch
    worker = cluster.workers["decode-0"]
    worker.paused = True
    cluster.pass_time(2)
    info = cluster.scheduler.workers[worker.id]
    assert info.worker.state == cluster_pb2.WORKER_STATE_SUSPECT
    assert cluster.asked_of_stores("Reassign") == []
    worker.paused = False
    cluster.settle()
    assert cluster.scheduler.requests["r"].epoch == epoch
    assert cluster.scheduler.counts.false_suspicions == 1
    assert cluster.tokens("r") == cluster.expected("r", 10)


def test_silence_with_a_successor_moves_the_stream() -> None:
    """And the one who wakes up is fenced, refuses, and is not waited for any longer."""
    cluster = FakeCluster()
    running(cluster, 3)
    old = owner(cluster)
    cluster.workers[old].paused = True
    cluster.pass_time(1)
    cluster.settle()
    assert cluster.tokens("r") == cluster.expected("r", 10)
    cluster.workers[old].paused = False
    cluster.settle()
    cluster.check_quiet()


def test_short_silence_is_nothing() -> None:
    """Less than suspect_ms."""
    cluster = FakeCluster()
    running(cluster, 3)
    cluster.workers[owner(cluster)].paused = True
    cluster.pass_time(0.6)
    assert cluster.asked_of_stores("Reassign") == []


def test_a_successor_that_dies_is_followed_by_the_next() -> None:
    """Also while the takeover is under way; every epoch is greater than the one before."""
    cluster = FakeCluster(decodes=3)
    running(cluster, 2)
    cluster.kill(owner(cluster))
    heir = cluster.asked_of_stores("Reassign")[-1].writer.split("/")[0]
    cluster.kill(heir)
    cluster.settle()
    assert cluster.tokens("r") == cluster.expected("r", 10)
    epochs = [message.epoch for message in cluster.asked_of_stores("Reassign")]
    assert epochs == sorted(set(epochs))
    cluster.check_quiet()


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


# --- a prefill is lost ---


def test_another_prefill_goes_on() -> None:
    """Under a new attempt, for the same decode and its epoch."""
    cluster = FakeCluster(prefills=2)
    cluster.ask("r")
    cluster.until(lambda: cluster.commands("prefill"))
    lost, command = cluster.commands("prefill")[-1]
    epoch = cluster.scheduler.requests["r"].epoch
    cluster.kill(lost)
    cluster.settle()
    heir, again = cluster.commands("prefill")[-1]
    assert heir != lost
    assert again.attempt > command.attempt
    assert cluster.scheduler.requests["r"].epoch == epoch
    assert reason(cluster, "r") == LENGTH
    cluster.check_quiet()


@pytest.mark.parametrize("max_tokens", [1, 5])
def test_a_prefill_that_dies_before_it_can_report(max_tokens: int) -> None:
    """The first token is in the record and nobody has said so: the request goes on all the same."""
    cluster = FakeCluster(prefills=2)
    cluster.ask("r", max_tokens=max_tokens)
    cluster.until(lambda: any(s.tokens for s in cluster.stores["s0"].streams.values()))
    [name] = [w.name for w in cluster.workers.values() if w.reports]
    cluster.kill(name)
    cluster.settle()
    assert cluster.tokens("r") == cluster.expected("r", max_tokens)
    cluster.check_quiet()


@pytest.mark.parametrize("name", ["prefill-0", "decode-0", "decode-1"])
def test_a_worker_that_dies_while_pages_are_leased(name: str) -> None:
    """The answer finds it gone: another one is put in its place."""
    cluster = FakeCluster(prefills=2, decodes=2)
    cluster.ask("r")
    assert cluster.scheduler.requests["r"].phase is Phase.OPENING
    cluster.kill(name)
    cluster.settle()
    assert reason(cluster, "r") == LENGTH
    cluster.check_quiet()


def test_the_transfer_to_another_arena_that_fails_is_made_again() -> None:
    """The stream there is gone: prefill says UNAVAILABLE, and all is computed again."""
    cluster = FakeCluster(prefills=1, decodes=2, store_count=2)
    cluster.ask("a", max_tokens=3)
    cluster.ask("b", max_tokens=3)
    remote = next(r for r in "ab" if owner(cluster, r) == "decode-1")
    cluster.until(lambda: len(cluster.commands("prefill")) == 2)
    cluster.stores["s1"].streams[remote].attempt += 10**6
    cluster.settle()
    assert reason(cluster, "a") == reason(cluster, "b") == LENGTH
    assert cluster.scheduler.requests[remote].recomputed == 3
    cluster.check_quiet()


def test_prefills_arena_is_left_when_the_pages_have_arrived() -> None:
    """Decode's arena has them; the other keeps what can be cached and nothing else."""
    cluster = FakeCluster(prefills=1, decodes=2, store_count=2)
    cluster.ask("a", max_tokens=9)
    cluster.ask("b", max_tokens=9)
    remote = next(r for r in "ab" if owner(cluster, r) == "decode-1")
    cluster.until(lambda: remote in cluster.stores["s0"].streams)
    cluster.until(lambda: remote not in cluster.stores["s0"].streams)
    command = next(c for _, c in cluster.commands("prefill") if c.request_id == remote)
    assert command.ingest_address == cluster.stores["s1"].address
    assert command.remote_attempt == command.attempt
    assert remote in cluster.stores["s1"].streams
    cluster.settle()
    cluster.check_quiet()


# --- KV that is lost or wrong ---


def test_kv_that_failed_verification_is_computed_anew() -> None:
    """Not from the cache that may hold it; the request goes on from its next token."""
    cluster = FakeCluster()
    cluster.ask("r", max_tokens=6)
    cluster.corrupt.add("r")
    cluster.settle()
    assert cluster.tokens("r") == cluster.expected("r", 6)
    first, again = cluster.asked_of_stores("OpenStream")
    assert (first.bypass_cache, again.bypass_cache) == (False, True)
    assert len(again.token_ids) == 3 + again.first_index
    assert [m.blocks for m in cluster.asked_of_stores("Invalidate")] == [[0]]
    final = cluster.final("r")
    assert final is not None
    assert final.finished.usage.recomputed_tokens == 3
    cluster.check_quiet()


def test_a_stream_that_its_store_has_lost_is_computed_again() -> None:
    """The store says NOT_FOUND to a takeover: the tokens that are known are part of the new prompt."""
    cluster = FakeCluster()
    running(cluster, 4)
    cluster.stores["s0"].streams.clear()
    cluster.kill(owner(cluster))
    cluster.settle()
    assert cluster.tokens("r") == cluster.expected("r", 10)
    again = cluster.asked_of_stores("OpenStream")[-1]
    assert (again.first_index, len(again.token_ids), again.max_new_tokens) == (4, 7, 6)
    assert list(again.token_ids[3:]) == cluster.expected("r", 4)


def test_a_late_answer_does_not_disturb_a_new_opening() -> None:
    """A takeover is under way when the stream is given up and opened anew: its answer is too late."""
    cluster = FakeCluster(decodes=3)
    running(cluster, 3)
    cluster.kill(owner(cluster))
    cluster.execute("r")
    request = cluster.scheduler.requests["r"]
    refused = control_pb2.Refused(
        request_id="r", epoch=request.attempt, code="UNAVAILABLE", message="no acknowledgement"
    )
    cluster.run(cluster.scheduler.refused(cluster.now, request.prefill_worker, refused))
    epoch = request.epoch
    cluster.answer("r")
    assert request.epoch == epoch
    cluster.settle()
    assert cluster.tokens("r") == cluster.expected("r", 10)
    cluster.check_quiet()


def test_a_worker_that_cannot_compute_it_fails_the_request() -> None:
    """The failure has the code, says whether to retry, and tells the story."""
    cluster = FakeCluster()
    running(cluster, 2)
    request = cluster.scheduler.requests["r"]
    refused = control_pb2.Refused(
        request_id="r", epoch=request.epoch, code="INTERNAL", message="logits are not finite"
    )
    cluster.run(cluster.scheduler.refused(cluster.now, request.decode_worker, refused))
    assert request.final is not None
    failed = request.final.failed
    assert (failed.code, failed.retryable) == ("INTERNAL", False)
    assert failed.message == "logits are not finite"
    assert failed.story[0] == "accepted"
    assert "logits are not finite" in failed.story[-1]


def test_the_control_that_recomputes_gives_the_same_tokens() -> None:
    """recover=reprefill: no takeover; the recomputation is counted."""
    cluster = FakeCluster(options={"recover": "reprefill"})
    running(cluster, 4)
    cluster.kill(owner(cluster))
    cluster.settle()
    assert cluster.tokens("r") == cluster.expected("r", 10)
    assert cluster.asked_of_stores("Reassign") == []
    assert cluster.scheduler.counts.prompt_tokens_recomputed == 3


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
    """Nothing else is running and there is still no room: the client is told, and may try again."""
    cluster = FakeCluster(slots=0)
    cluster.ask("r")
    for _ in range(3):
        cluster.settle()
        cluster.pass_time(0.1)
    final = cluster.final("r")
    assert final is not None
    assert (final.failed.code, final.failed.retryable) == ("RESOURCE_EXHAUSTED", True)
    assert "RESOURCE_EXHAUSTED" in final.failed.story[-1]


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


# --- links that break ---


@pytest.mark.parametrize("noticed", [True, False])
def test_what_a_worker_said_into_a_broken_link_is_asked_for(noticed: bool) -> None:
    """Decode finished while it was cut off: when it is back it is asked, and the request ends."""
    cluster = FakeCluster(decodes=1)
    running(cluster, 3)
    worker = cluster.workers["decode-0"]
    cluster.detach(worker, noticed=noticed)
    while worker.jobs:
        worker.act()
    cluster.attach(worker)
    cluster.settle()
    assert cluster.tokens("r") == cluster.expected("r", 10)
    cluster.check_quiet()


def test_what_a_prefill_said_into_a_broken_link_is_asked_for() -> None:
    """It had finished: nothing is computed twice."""
    cluster = FakeCluster()
    cluster.ask("r", max_tokens=1)
    cluster.until(lambda: cluster.workers["prefill-0"].jobs)
    worker = cluster.workers["prefill-0"]
    cluster.detach(worker)
    while worker.jobs:
        worker.act()
    cluster.attach(worker)
    cluster.settle()
    assert reason(cluster, "r") == LENGTH
    assert cluster.scheduler.counts.prompt_tokens_computed <= 3
    cluster.check_quiet()


def test_a_prefill_that_is_back_before_it_has_finished() -> None:
    """Its report was lost, its transfer goes on: when it stops, it is asked once more."""
    cluster = FakeCluster()
    cluster.ask("r", max_tokens=1)
    worker = cluster.workers["prefill-0"]
    cluster.until(lambda: worker.reports)
    cluster.detach(worker)
    assert worker.jobs, "it has let go of the request already"
    cluster.attach(worker)
    cluster.deliver_command(worker)  # the same attempt, which it is still at work on
    cluster.settle()
    assert cluster.tokens("r") == cluster.expected("r", 1)
    cluster.check_quiet()


def test_a_worker_that_missed_its_stop_is_told_again() -> None:
    """The request ended while it was cut off: when it is back it is stopped, and its pages freed."""
    cluster = FakeCluster(decodes=1)
    running(cluster, 3)
    worker = cluster.workers["decode-0"]
    cluster.detach(worker)
    cluster.run(cluster.scheduler.cancel(cluster.now, "r", "cancelled"))
    cluster.settle()
    assert worker.jobs == []
    cluster.attach(worker)
    cluster.settle()
    cluster.check_quiet()


def test_the_pages_of_a_stopped_worker_come_back_in_any_order() -> None:
    """It forgot the request while it was cut off, and is back before its store has heard of the end."""
    cluster = FakeCluster(decodes=1)
    running(cluster, 3)
    worker = cluster.workers["decode-0"]
    cluster.detach(worker)
    worker.jobs.clear()
    cluster.run(cluster.scheduler.cancel(cluster.now, "r", "cancelled"))
    cluster.attach(worker)
    cluster.until(lambda: "" not in cluster.answers and not cluster.calls.get(""))
    cluster.settle()
    cluster.check_quiet()


def test_a_stopped_for_an_old_epoch_frees_its_pages() -> None:
    """The only decode refused its KV and got the request again: what it had before is let go of."""
    cluster = FakeCluster(decodes=1)
    running(cluster, 3)
    cluster.corrupt.add("r")
    cluster.settle()
    assert cluster.tokens("r") == cluster.expected("r", 10)
    cluster.check_quiet()


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
