"""Writers that have been fenced, and pages that wait for them: nobody is waited for in vain, and nobody
who may still write is overlooked."""

from __future__ import annotations

import pytest

from baton.v1 import store_pb2
from services.scheduler import stops
from services.scheduler.request import Phase
from tests.support.fake_cluster import FakeCluster
from tests.support.scheduling import owner, running

# --- a prefill that is silent ---


def silent_prefill(prefills: int) -> FakeCluster:
    """A request whose prefill has been told and is paused before it has computed anything."""
    cluster = FakeCluster(prefills=prefills)
    cluster.ask("r", max_tokens=5)
    prefill = cluster.workers["prefill-0"]
    cluster.until(lambda: prefill.commands)
    prefill.paused = True
    return cluster


def test_a_silent_prefill_is_replaced_by_a_ready_one() -> None:
    """By a new attempt; the old one is fenced, and when it wakes up it leaves nothing behind."""
    cluster = silent_prefill(2)
    attempt = cluster.scheduler.requests["r"].attempt
    cluster.pass_time(1)
    cluster.settle()
    [asked] = cluster.asked_of_stores("Reassign")
    assert asked.epoch > attempt
    assert cluster.commands("prefill")[-1][0] == "prefill-1"
    assert cluster.tokens("r") == cluster.expected("r", 5)
    cluster.workers["prefill-0"].paused = False
    cluster.pass_time(0.2)
    cluster.settle()
    assert cluster.scheduler.counts.false_suspicions == 1
    cluster.check_quiet()


def test_a_silent_prefill_without_a_successor_keeps_its_attempt() -> None:
    """It may only be slow: nothing is fenced, and it comes to its end."""
    cluster = silent_prefill(1)
    attempt = cluster.scheduler.requests["r"].attempt
    cluster.pass_time(2)
    cluster.settle()
    assert cluster.asked_of_stores("Reassign") == []
    cluster.workers["prefill-0"].paused = False
    cluster.settle()
    assert cluster.scheduler.requests["r"].attempt == attempt
    assert cluster.tokens("r") == cluster.expected("r", 5)
    cluster.check_quiet()


def test_a_prefill_that_fell_silent_after_its_end_may_still_be_there() -> None:
    """Its first token is read from the record; its pages are not free before it has said Stopped."""
    cluster = FakeCluster(prefills=2)
    cluster.ask("r", max_tokens=1)
    prefill = cluster.workers["prefill-0"]
    cluster.until(lambda: prefill.jobs)
    prefill.act()
    prefill.reports.clear()
    prefill.paused = True
    cluster.pass_time(1)
    cluster.settle()
    assert cluster.tokens("r") == cluster.expected("r", 1)
    assert cluster.stores["s0"].quarantine
    prefill.paused = False
    cluster.pass_time(0.2)
    cluster.settle()
    cluster.check_quiet()


# --- a move is under way when the request ends ---


@pytest.mark.parametrize("anew", [False, True], ids=["ends", "opened-anew"])
def test_a_writer_that_is_being_fenced_is_told_though_nobody_waits_for_the_answer(
    anew: bool,
) -> None:
    """It had pages and had not been told of them yet; the answer that says it is still there comes
    when the request has gone, or has other pages."""
    cluster = FakeCluster(prefills=1, decodes=2)
    cluster.ask("r", max_tokens=5, retain_ms=0, reader=False)
    decode = cluster.workers[owner(cluster)]
    decode.paused = True
    cluster.pass_time(1)
    cluster.until(lambda: cluster.asked_of_stores("Reassign"))
    request = cluster.scheduler.requests["r"]
    assert not request.decode_told
    if anew:
        cluster.scheduler._placing.compute_again(request, cluster.now, fresh=False)
        cluster.run(cluster.scheduler.drain())
    else:
        cluster.run(cluster.scheduler.cancel(cluster.now, "r", "cancelled"))
        cluster.run(cluster.scheduler.tick(cluster.now))
        assert "r" not in cluster.scheduler.requests
    cluster.settle()
    decode.paused = False
    for _ in range(3):
        cluster.pass_time(0.2)
        cluster.settle()
    cluster.check_quiet()


# --- words that were lost ---


def test_a_worker_that_comes_back_is_not_waited_for_any_longer() -> None:
    """Its Refused was lost with the link; the registration says that it works on nothing."""
    cluster = FakeCluster()
    running(cluster, 2)
    old = cluster.workers[owner(cluster)]
    cluster.detach(old)
    cluster.until(lambda: owner(cluster) != old.name)
    cluster.settle()
    assert not old.jobs
    cluster.scheduler._stops._waiting.clear()  # forgotten, as by a scheduler that died
    assert cluster.stores["s0"].quarantine
    cluster.attach(old)
    cluster.settle()
    cluster.check_quiet()


def test_a_stop_for_a_worker_that_is_gone_is_forgotten() -> None:
    """After stop_keep; one for a worker that is here is kept until it has answered."""
    cluster = FakeCluster()
    running(cluster, 2)
    here, gone = owner(cluster), "prefill-0"
    cluster.detach(cluster.workers[gone])
    cluster.workers[here].paused = True
    for name in (here, gone):
        cluster.scheduler._stops.tell("x", cluster.workers[name].id, 7)
    known = cluster.scheduler._stops
    cluster.run(cluster.scheduler.tick(cluster.now))
    cluster.run(cluster.scheduler.tick(cluster.now + stops.STOP_KEEP_S - 1))
    assert len(known) == 2
    cluster.run(cluster.scheduler.tick(cluster.now + stops.STOP_KEEP_S + 1))
    assert [worker for _, worker in known._waiting] == [cluster.workers[here].id]


def test_a_later_stop_of_an_earlier_epoch_does_not_hide_the_later_epoch() -> None:
    """What is said again after a cut link covers all that was asked for."""
    cluster = FakeCluster()
    running(cluster, 2)
    worker = cluster.workers["decode-1"]
    cluster.scheduler._stops.tell("x", worker.id, 9)
    cluster.scheduler._stops.tell("x", worker.id, 7)
    cluster.scheduler.drain()
    cluster.attach(worker)
    assert [m.epoch for _, m in cluster.commands("stop") if m.request_id == "x"] == [9]


# --- a scheduler that comes back ---


def test_a_request_that_ends_before_its_record_is_read_waits_for_everybody() -> None:
    """The journal says who was about to get it, the record who works on it: the store decides."""
    cluster = FakeCluster()
    running(cluster, 2)
    present, epoch = owner(cluster), cluster.scheduler.requests["r"].epoch
    cluster.detach(cluster.workers[present])  # a Reassign is journaled, and never carried out
    assert cluster.asked_of_stores("Reassign")
    cluster.restart_scheduler()
    assert cluster.scheduler.requests["r"].phase is Phase.RECOVERING
    assert cluster.stores["s0"].streams["r"].epoch == epoch
    cluster.run(cluster.scheduler.cancel(cluster.now, "r", "cancelled"))
    cluster.settle()
    cluster.reattach()
    for _ in range(6):
        cluster.pass_time(0.2)
        cluster.settle()
    cluster.check_quiet()


def test_what_a_worker_was_asked_since_it_came_back_it_has_not_let_go_of() -> None:
    """A store that has been reconciled hears what workers have let go of, by what they said when they
    registered. A prefill that was asked again since, and has not answered its Stop, is at work. Found
    by the walk of seed 23446."""
    cluster = FakeCluster()
    cluster.ask("r", max_tokens=5)
    prefill = cluster.workers["prefill-0"]
    cluster.until(lambda: prefill.commands)
    cluster.restart_scheduler()  # the order is lost, and prefill has nothing when it registers
    cluster.reattach()
    cluster.pass_time(1)
    cluster.execute("r")  # the record is read
    cluster.answer("r")
    while not prefill.jobs:
        cluster.deliver_command(prefill)
    prefill.act()
    cluster.run(cluster.scheduler.cancel(cluster.now, "r", "cancelled"))
    cluster.execute("r")  # released: the pages wait for prefill
    cluster.execute("")  # reconciled
    cluster.answer("")
    assert cluster.calls[""]
    while cluster.calls[""]:
        cluster.execute("")  # a Retire, which must not speak for what prefill still does
        cluster.answer("")
    assert cluster.stores["s0"].quarantine
    cluster.settle()
    cluster.check_quiet()


def test_a_store_that_comes_late_lets_go_of_what_nobody_remembers() -> None:
    """It was away when the scheduler came back; its streams have been computed elsewhere since."""
    cluster = FakeCluster(prefills=2, decodes=2, store_count=2)
    running(cluster, 2)
    home = cluster.scheduler.requests["r"].decode_store
    ingest = dict(cluster.scheduler.ingest)
    cluster.restart_scheduler()
    cluster.scheduler.ingest = {store: ingest[store] for store in ingest if store != home}
    cluster.reattach()
    for _ in range(6):
        cluster.pass_time(0.2)
        for queue in cluster.calls.values():
            while queue and queue[0].store_id == home:
                call = queue.popleft()
                reply = cluster.scheduler.store_replied(
                    cluster.now, call, None, "NOT_FOUND", "gone"
                )
                cluster.run(reply)
        cluster.settle()
    assert cluster.final("r") is not None
    assert cluster.stores[home].streams
    cluster.run(cluster.scheduler.stores_changed(ingest))
    cluster.settle()
    cluster.check_quiet()


# --- a prefill towards another arena is moved ---


def remote_prefill() -> FakeCluster:
    """Decode sits in s1, whose prefill is away; two prefills of s0 can compute for it."""
    cluster = FakeCluster(prefills=3, decodes=2, store_count=2)
    cluster.detach(cluster.workers["prefill-1"])
    cluster.workers["decode-0"].paused = True
    cluster.pass_time(1)
    cluster.ask("r", max_tokens=5)
    request = cluster.scheduler.requests["r"]
    assert (request.prefill_store, request.decode_store) == ("s0", "s1")
    cluster.until(lambda: cluster.by_id(request.prefill_worker).commands)  # type: ignore[union-attr]
    return cluster


@pytest.mark.parametrize("last", ["s0", "s1"])
def test_it_begins_when_both_arenas_know_of_it(last: str) -> None:
    """In either order; until then the other arena would refuse its pages."""
    cluster = remote_prefill()
    request = cluster.scheduler.requests["r"]
    lost = request.prefill_worker
    cluster.kill(lost.split("/")[0])
    moves = [i for i in cluster.calls["r"] if i.method == "Reassign"]
    cluster.calls["r"].clear()
    told = len(cluster.commands("prefill"))
    for call in sorted(moves, key=lambda call: call.store_id == last):
        assert len(cluster.commands("prefill")) == told
        reply = cluster.stores[call.store_id].Reassign(call.message)
        cluster.run(cluster.scheduler.store_replied(cluster.now, call, reply, "OK", ""))
    heir = cluster.by_id(request.prefill_worker)
    assert heir is not None
    assert heir.role == "prefill"
    assert heir.id != lost
    cluster.settle()
    assert cluster.tokens("r") == cluster.expected("r", 5)


def test_whoever_a_store_waits_for_is_told_once() -> None:
    """His answer had come before the store waited for him. What he works on now is not meant."""
    cluster = FakeCluster()
    running(cluster, 2)
    worker = cluster.workers[owner(cluster)]
    epoch = cluster.scheduler.requests["r"].epoch
    for _ in range(2):
        awaited = [
            store_pb2.Awaited(request_id="x", writer=worker.id, epoch=7),
            store_pb2.Awaited(request_id="r", writer=worker.id, epoch=epoch + 5),
        ]
        cluster.run(cluster.scheduler.writers_awaited(awaited))
    told = [(m.request_id, m.epoch) for _, m in cluster.commands("stop")]
    assert told == [("x", 7), ("r", epoch - 1)]
    cluster.settle()
    assert cluster.tokens("r") == cluster.expected("r", 10)
