"""Workers that die, fall silent, cannot go on or are cut off: what the scheduler makes of it."""

from __future__ import annotations

import pytest

from baton.v1 import cluster_pb2, control_pb2, store_pb2
from services.scheduler.request import Phase
from tests.support.fake_cluster import FakeCluster
from tests.support.scheduling import LENGTH, owner, reason, running

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


def test_an_end_is_not_believed_over_a_gap() -> None:
    """Reports before it were lost: they are asked for again, and only then has the request ended."""
    cluster = FakeCluster(decodes=1)
    running(cluster, 3)
    worker = cluster.workers["decode-0"]
    while worker.jobs:
        worker.act()
    last = worker.reports.pop()
    worker.reports.clear()
    worker.reports.append(last)
    cluster.deliver_report(worker)
    assert cluster.final("r") is None
    assert len(cluster.tokens("r")) == 3
    cluster.settle()
    assert cluster.tokens("r") == cluster.expected("r", 10)
    assert reason(cluster, "r") == LENGTH
    cluster.check_quiet()


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


def test_a_silent_prefill_is_replaced_if_another_is_ready() -> None:
    """Its attempt is fenced; what it says when it wakes is refused, and its pages come back."""
    cluster = FakeCluster(prefills=2)
    cluster.ask("r", max_tokens=4)
    cluster.until(lambda: cluster.commands("prefill"))
    [(silent, first)] = cluster.commands("prefill")
    cluster.workers[silent].paused = True
    cluster.pass_time(1)
    cluster.settle()
    (heir, second) = cluster.commands("prefill")[-1]
    assert heir != silent
    assert second.attempt > first.attempt
    assert cluster.tokens("r") == cluster.expected("r", 4)
    cluster.workers[silent].paused = False
    cluster.settle()
    cluster.check_quiet()


def test_a_silent_prefill_without_a_successor_keeps_its_attempt() -> None:
    """It is waited for: nobody else could compute the prompt."""
    cluster = FakeCluster()
    cluster.ask("r", max_tokens=4)
    cluster.until(lambda: cluster.commands("prefill"))
    cluster.workers["prefill-0"].paused = True
    cluster.pass_time(3)
    cluster.settle()
    assert cluster.asked_of_stores("Reassign") == []
    cluster.workers["prefill-0"].paused = False
    cluster.settle()
    assert cluster.tokens("r") == cluster.expected("r", 4)
    assert cluster.scheduler.counts.false_suspicions == 1


def test_a_prefill_that_falls_silent_before_it_can_report_is_told_to_stop() -> None:
    """Its first token is in the record, so the stream goes on; but it lives, and may be at work on
    its hand-over: its pages wait for its answer."""
    cluster = FakeCluster(prefills=2)
    cluster.ask("r", max_tokens=2)
    cluster.until(
        lambda: any(r.tokens for s in cluster.stores.values() for r in s.streams.values())
    )
    [(silent, _)] = cluster.commands("prefill")
    cluster.workers[silent].paused = True
    cluster.pass_time(1)
    cluster.settle()
    assert cluster.tokens("r") == cluster.expected("r", 2)
    assert any(
        writer == cluster.workers[silent].id for _, writer, _ in cluster.stores["s0"].quarantine
    )
    cluster.workers[silent].paused = False
    cluster.settle()
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
    cluster.stores["s1"].streams[remote].attempt = 0
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


def test_a_damaged_block_is_repaired_by_another_epoch_of_decode() -> None:
    """Nothing is opened anew: the store gives a fresh block to whoever goes on."""
    cluster = FakeCluster(decodes=1)
    running(cluster, 3)
    cluster.corrupt.add("r")
    cluster.settle()
    assert cluster.tokens("r") == cluster.expected("r", 10)
    assert len(cluster.asked_of_stores("OpenStream")) == 1
    (moved,) = cluster.asked_of_stores("Reassign")
    assert (moved.role, list(moved.repair_blocks)) == (store_pb2.WRITER_ROLE_DECODE, [0])
    assert not moved.HasField("resume_at")
    assert cluster.scheduler.counts.corrupt_blocks == 1
    cluster.check_quiet()


@pytest.mark.parametrize("stores", [1, 2])
def test_a_damaged_prompt_is_repaired_by_another_attempt_of_prefill(stores: int) -> None:
    """In its own store the block; in both, what may have come of it is computed and sent again."""
    cluster = FakeCluster(decodes=2, store_count=stores)
    for name in "ab":
        cluster.ask(name, max_tokens=6)
    name = next(r for r in "ab" if owner(cluster, r) == "decode-1")
    cluster.corrupt_prompts.add(name)
    cluster.settle()
    assert cluster.tokens(name) == cluster.expected(name, 6)
    moved = cluster.asked_of_stores("Reassign")
    assert [m.role for m in moved] == [store_pb2.WRITER_ROLE_PREFILL] * stores
    assert [m.resume_at for m in moved] == [2] * stores
    assert [list(m.repair_blocks) for m in moved].count([0]) == 1
    final = cluster.final(name)
    assert final is not None
    assert final.finished.usage.recomputed_tokens == 1  # of three, from the second on
    cluster.check_quiet()


def test_kv_whose_repair_fails_is_computed_anew() -> None:
    """Not from the cache that may hold it; the request goes on from its next token."""
    cluster = FakeCluster(irreparable=True)
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
