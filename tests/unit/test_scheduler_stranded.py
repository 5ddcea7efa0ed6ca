"""Requests whose host does not come back: waited for, and then computed again on another."""

from __future__ import annotations

import pytest

from baton.v1 import control_pb2
from services.ops.errors import ConfigError
from services.scheduler.config import SchedulerConfig
from services.scheduler.request import Phase
from tests.support.fake_cluster import FakeCluster
from tests.support.scheduling import owner, running

LOST_S = SchedulerConfig().lost_ms / 1e3


def two_hosts() -> FakeCluster:
    """prefill-0 and decode-0 on one host, prefill-1 and decode-1 on the other."""
    return FakeCluster(prefills=2, decodes=2, store_count=2)


def test_a_lost_host_s_requests_are_computed_again_on_the_other() -> None:
    """After `lost_ms` and not before; the same tokens, and the recomputation is counted."""
    cluster = two_hosts()
    running(cluster, 3)
    lost = owner(cluster)
    cluster.kill(lost)
    cluster.pass_time(LOST_S - 0.2)
    cluster.settle()
    assert len(cluster.tokens("r")) == 3
    cluster.pass_time(0.4)
    cluster.settle()
    assert owner(cluster) != lost
    assert cluster.tokens("r") == cluster.expected("r", 10)
    final = cluster.final("r")
    assert final is not None
    assert final.finished.usage.recomputed_tokens > 0


def test_a_host_that_comes_back_in_time_goes_on() -> None:
    """What is restarted beside its pages computes nothing twice."""
    cluster = two_hosts()
    running(cluster, 3)
    lost = owner(cluster)
    cluster.kill(lost)
    cluster.pass_time(LOST_S - 0.2)
    cluster.start(lost)
    cluster.settle()
    cluster.pass_time(LOST_S)
    cluster.settle()
    final = cluster.final("r")
    assert final is not None
    assert final.finished.usage.recomputed_tokens == 0


def test_without_another_host_the_lost_one_is_waited_for() -> None:
    """Giving up would gain nothing."""
    cluster = FakeCluster(decodes=1)
    running(cluster, 3)
    cluster.kill("decode-0")
    cluster.pass_time(10 * LOST_S)
    cluster.settle()
    assert cluster.scheduler.requests["r"].phase is Phase.RUNNING
    cluster.start("decode-0")
    cluster.settle()
    assert cluster.tokens("r") == cluster.expected("r", 10)


def test_a_lost_prefill_is_given_up_too() -> None:
    """Its chunk in flight is on a host that nobody reaches."""
    cluster = FakeCluster(prefills=2, decodes=1, store_count=2)
    cluster.ask("r", max_tokens=10)
    cluster.until(lambda: cluster.commands("prefill"))
    [(name, _)] = cluster.commands("prefill")
    cluster.kill(name)
    cluster.pass_time(LOST_S + 0.2)
    cluster.settle()
    assert [who for who, _ in cluster.commands("prefill")][-1] != name
    assert cluster.tokens("r") == cluster.expected("r", 10)


def test_a_store_that_does_not_answer_holds_nobody_for_ever() -> None:
    """A request in mid-opening is opened elsewhere once its workers are lost, and the late answer of
    the first store changes nothing."""
    cluster = two_hosts()
    cluster.ask("r", max_tokens=10)
    request = cluster.scheduler.requests["r"]
    assert request.phase is Phase.OPENING
    store = request.decode_store
    for name in [w.name for w in cluster.workers.values() if w.store.store_id == store]:
        cluster.kill(name)
    cluster.pass_time(LOST_S + 0.2)
    assert request.decode_store != store
    cluster.settle()
    assert cluster.tokens("r") == cluster.expected("r", 10)


def test_a_silent_prefill_is_replaced_when_another_is_ready() -> None:
    """Silence is enough, as for decode: the attempt is fenced, and its late word refused."""
    cluster = FakeCluster(prefills=2)
    cluster.ask("r", max_tokens=10)
    cluster.until(lambda: cluster.commands("prefill"))
    [(name, command)] = cluster.commands("prefill")
    cluster.workers[name].paused = True
    cluster.pass_time(1.0)
    cluster.settle()
    heir, again = cluster.commands("prefill")[-1]
    assert heir != name
    assert again.attempt > command.attempt
    assert cluster.tokens("r") == cluster.expected("r", 10)
    cluster.workers[name].paused = False
    cluster.pass_time(0.2)
    cluster.settle()
    cluster.check_quiet()


def test_a_transfer_that_died_with_its_prefill_is_made_again() -> None:
    """The pages are complete in its arena: another prefill there sends them under the same attempt."""
    cluster = FakeCluster(prefills=3, decodes=2, store_count=2)
    for name in ("decode-0", "prefill-1"):  # prefill-0 and prefill-2 on s0, decode-1 on s1
        cluster.kill(name)
    cluster.ask("r", max_tokens=10)
    cluster.until(lambda: cluster.scheduler.requests["r"].prefill_done)
    request = cluster.scheduler.requests["r"]
    assert request.handing_over
    name, command = cluster.commands("prefill")[-1]
    cluster.kill(name)
    heir, again = cluster.commands("prefill")[-1]
    assert heir != name
    assert (again.attempt, again.ingest_address) == (command.attempt, command.ingest_address)


def test_who_was_cut_off_and_comes_back_was_suspected_falsely() -> None:
    """The same worker id registers again: it never died."""
    cluster = FakeCluster()
    worker = cluster.workers["decode-0"]
    cluster.detach(worker)
    cluster.attach(worker)
    assert cluster.scheduler.counts.false_suspicions == 1


def test_a_worker_s_refused_commits_are_seen() -> None:
    """Its heartbeat carries how often the fence has stopped it."""
    cluster = FakeCluster()
    worker = cluster.workers["decode-0"]
    cluster.scheduler.beat(worker.id, control_pb2.Heartbeat(steps=9, fenced=2))
    view = cluster.scheduler.cluster_view([])
    assert {w.name: w.fenced for w in view.workers} == {
        "prefill-0": 0,
        "decode-0": 2,
        "decode-1": 0,
    }


def test_lost_ms_leaves_time_for_a_suspicion() -> None:
    with pytest.raises(ConfigError, match=r"^lost_ms: "):
        SchedulerConfig(lost_ms=500)
