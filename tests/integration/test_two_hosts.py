"""Prefill and decode on different hosts: the network may be slow, lossy or cut, and a host may be lost.

Hosts are network namespaces; the processes and what they send each other are real.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from baton.chaos import network
from baton.chaos.hosts import APART, TWO_HOSTS, HostPlan, HostsHandle, start_hosts
from baton.client import Client, ClientError
from baton.cluster import ClusterSpec
from baton.handle import wait_until
from services.engine.reference import Reference
from tests.support.hosts import (
    RemoteClient,
    committed,
    decode_of,
    resident_bytes,
    settle,
    view_of,
)
from tests.support.requests import SAMPLED, Ask, text_of, tokens_of

_WHY_NOT = network.why_not()
pytestmark = [pytest.mark.processes, pytest.mark.skipif(bool(_WHY_NOT), reason=_WHY_NOT or "-")]

StartHosts = Callable[..., HostsHandle]
ATTEMPTS = 5
# Longer than any cut here, however slow the machine: who is cut off has not gone away.
PATIENT = ("scheduler:--orphan-ms=60000", "kv-store:--lease-ms=60000")

SPARE_PREFILL = (*TWO_HOSTS, HostPlan("c", ("kv-store", "prefill")))
SPARE_DECODE = (
    HostPlan("s", ("scheduler",)),
    HostPlan("a", ("kv-store", "prefill")),
    HostPlan("b", ("kv-store", "decode"), decode=1),
    HostPlan("c", ("kv-store", "decode"), decode=1),
)


@pytest.fixture(scope="module")
def start() -> Iterator[StartHosts]:
    """Gives a running cluster for a plan; all are removed at the end."""
    running: list[HostsHandle] = []
    with tempfile.TemporaryDirectory(prefix="bt-", dir="/tmp") as root:

        def begin(plan: tuple[HostPlan, ...], **options: bool) -> HostsHandle:
            spec = ClusterSpec(run_dir=f"{root}/{len(running)}", extra=PATIENT)
            running.append(start_hosts(spec, plan, **options))
            return running[-1]

        try:
            yield begin
        finally:
            statuses = [cluster.stop() for cluster in running]
            assert not any(statuses)


@pytest.fixture(scope="module")
def hosts(start: StartHosts) -> HostsHandle:
    return start(TWO_HOSTS)


@pytest.fixture
def cluster(hosts: HostsHandle) -> Iterator[HostsHandle]:
    """Scheduler, prefill and decode on three hosts; the network is whole again afterwards."""
    settle(hosts)
    try:
        yield hosts
    finally:
        hosts.network.impair()
        hosts.network.limit(None)
        settle(hosts)


def asks_of(reference: Reference, count: int = 4, max_tokens: int = 120) -> list[Ask]:
    return [
        Ask(tuple(tokens_of(reference, i, 90 + 137 * i)), max_tokens, SAMPLED if i % 2 else {})
        for i in range(count)
    ]


def strike(
    cluster: HostsHandle, ask: Ask, at_token: int, blow: Callable[[], None],
    timeout_s: float | None = None,
) -> list[int]:  # fmt: skip
    """Streams one request; once it has `at_token` tokens the blow falls. Gives all its tokens."""
    tokens: list[int] = []
    with Client(cluster.address) as client:
        for event in client.generate(
            list(ask.prompt), max_tokens=ask.max_tokens, ignore_eos=True, timeout_s=timeout_s,
            **ask.options,
        ):  # fmt: skip
            if event.HasField("token"):
                assert event.token.index == len(tokens)
                tokens.append(event.token.token_id)
            else:
                assert event.HasField("finished"), event
            if len(tokens) == at_token and event.HasField("token"):
                blow()
    return tokens


# --- a bad network ---


@pytest.mark.parametrize(
    ("delay_ms", "loss", "mbit"),
    [(20, 0, None), (0, 0.05, None), (0, 0, 100), (20, 0.05, 100)],
    ids=["delay", "loss", "cap", "all"],
)
def test_the_same_tokens_over_a_bad_network(
    cluster: HostsHandle, reference: Reference, delay_ms: int, loss: float, mbit: int | None
) -> None:
    """20 ms of delay, 5 % of loss, 100 Mbit/s: slower, and the reference's tokens."""
    cluster.network.impair(delay_ms=delay_ms, loss=loss)
    cluster.network.limit(mbit)
    before = view_of(cluster).requests.prompt_tokens_recomputed
    asks = asks_of(reference)
    with Client(cluster.address) as client, ThreadPoolExecutor(len(asks)) as pool:
        results = list(pool.map(lambda ask: ask.stream(client), asks))
    assert results == [ask.expected(reference) for ask in asks]
    if loss:
        assert cluster.network.lost() > 0
    assert view_of(cluster).requests.prompt_tokens_recomputed == before


# --- partitions ---


def test_a_partition_in_mid_transfer_heals(cluster: HostsHandle, reference: Reference) -> None:
    """Prefill's host is cut from decode's with part of the KV across: the rest follows, and nothing
    is computed twice."""
    ask = Ask(tuple(tokens_of(reference, 2, 1900)), 40)
    before = view_of(cluster).requests
    cluster.network.limit(20)
    sent = cluster.network.carried("a", "b")

    def halfway() -> bool:
        return cluster.network.carried("a", "b") > sent + 2_000_000

    with Client(cluster.address) as client, ThreadPoolExecutor(1) as pool:
        stream = pool.submit(ask.stream, client)
        wait_until(halfway, 10, "some of the KV to be across")
        cluster.network.partition("a", "b")
        cut_at = time.monotonic()
        wait_until(lambda: time.monotonic() > cut_at + 2.5, 5, "both ends to notice")
        assert not stream.done()
        cluster.network.heal()
        cluster.network.limit(None)
        assert stream.result(30) == ask.expected(reference)
    after = settle(cluster).requests
    assert after.prompt_tokens_recomputed == before.prompt_tokens_recomputed
    cached = after.prompt_tokens_cached - before.prompt_tokens_cached
    assert after.prompt_tokens_computed - before.prompt_tokens_computed + cached == len(ask.prompt)


def test_a_decode_that_is_cut_off_is_replaced_and_refused(
    start: StartHosts, reference: Reference
) -> None:
    """The scheduler does not hear it, the store beside it does not know: the other decode takes over
    at the committed step, and the first finds itself fenced while it still works."""
    cluster = start(APART)
    ask = Ask(tuple(tokens_of(reference, 0, 150)), 1200)
    before = view_of(cluster).requests
    cut: list[str] = []

    def blow() -> None:
        victim = decode_of(view_of(cluster))
        cut.append(victim.name)
        cluster.network.partition("s", victim.host)

    assert strike(cluster, ask, 15, blow) == ask.expected(reference)
    after = settle(cluster)
    assert after.requests.takeovers == before.takeovers + 1
    assert after.requests.prompt_tokens_recomputed == before.prompt_tokens_recomputed
    assert {w.name: w.fenced for w in after.workers if w.fenced} == {cut[0]: 1}


def test_a_partition_that_outlasts_the_deadline_ends_the_request(
    cluster: HostsHandle, reference: Reference
) -> None:
    """The request's own deadline is the only one: it ends then, and what it held comes back once the
    hosts hear each other again."""
    before = view_of(cluster).requests
    ask = Ask(tuple(tokens_of(reference, 1, 200)), 1500)
    with pytest.raises(ClientError, match="DEADLINE_EXCEEDED"):
        strike(cluster, ask, 5, lambda: cluster.network.partition("s", "b"), timeout_s=2.5)
    # The client's clock may be ahead of the scheduler's by a tick.
    wait_until(lambda: view_of(cluster).requests.cancelled == before.cancelled + 1, 5, "its end")
    assert view_of(cluster).requests.failed == before.failed
    settle(cluster)


def test_the_scheduler_cut_off_from_everybody(start: StartHosts, reference: Reference) -> None:
    """Decode goes on into the stream's record and keeps nothing else; the client, which hears nothing
    either, resumes where it was. No token is lost or repeated."""
    cluster = start((*TWO_HOSTS, HostPlan("u")), public=True)
    prompt, count = text_of(0, 0, 600), 1200
    expected = reference.answer(
        {"token_ids": reference.tokenizer.encode(prompt).ids, "max_tokens": count,
         "ignore_eos": True}
    )["token_ids"]  # fmt: skip
    for _ in range(ATTEMPTS):
        cut, indexes, tokens = cut_off_at(cluster, 10, prompt, count)
        assert indexes == list(range(count))
        assert tokens == expected
        if cut:
            return
    pytest.fail(f"{ATTEMPTS} streams had ended before their tenth token was known")


def cut_off_at(
    cluster: HostsHandle, token: int, prompt: str, count: int
) -> tuple[bool, list[int], list[int]]:
    """Cuts the scheduler's host off once a remote client has `token` tokens, until decode has done all
    its work. Gives whether the stream was still going on then, the indexes as they came, the tokens."""
    options = ("--max-tokens", str(count), "--ignore-eos", "--retry-s", "30")
    client = RemoteClient(cluster, "u", prompt, *options)
    arena_dir = cluster.hosts["b"].spec.arena_dir(0)
    decodes = [cluster.pid(name) for name in cluster.names("decode")]
    indexes: list[int] = []
    cut = False

    def steps() -> int:
        return max(committed(arena_dir))

    def cut_off() -> bool:
        cluster.network.isolate("s")
        resident, cut_at, begun = sum(map(resident_bytes, decodes)), time.monotonic(), steps()
        if 0 < begun < count - 1:
            wait_until(lambda: steps() == count - 1, 30, "decode to go on")
            wait_until(lambda: time.monotonic() > cut_at + 4, 10, "all to notice")
            assert sum(map(resident_bytes, decodes)) - resident < 4 << 20
        cluster.network.heal()
        return 0 < begun < count - 1

    try:
        for event in client.events():
            if "token" in event:
                indexes.append(event["token"]["index"])
                if len(indexes) == token:
                    cut = cut_off()
    finally:
        client.kill()
    return cut, indexes, event["token_ids"]


# --- hosts that are lost ---


def test_prefill_s_host_is_lost(start: StartHosts, reference: Reference) -> None:
    """In mid-prefill, for good: a prefill on another host computes the prompt, and it is counted."""
    cluster = start(SPARE_PREFILL)
    ask = Ask(tuple(tokens_of(reference, 2, 1900)), 40)
    cluster.network.limit(20)

    def at_work() -> list[str]:
        return [w.host for w in view_of(cluster).workers if w.role == 1 and w.running_requests]

    with Client(cluster.address) as client, ThreadPoolExecutor(1) as pool:
        stream = pool.submit(ask.stream, client)
        wait_until(lambda: bool(at_work()), 10, "prefill to begin")
        [victim] = at_work()
        cluster.lose(victim)
        cluster.network.limit(None)
        assert stream.result(40) == ask.expected(reference)
    after = settle(cluster).requests
    assert after.prompt_tokens_recomputed == len(ask.prompt)


def test_decode_s_host_is_lost_with_its_arena(start: StartHosts, reference: Reference) -> None:
    """Its KV is gone: prompt and tokens so far are computed again for a decode on another host, once,
    and the stream goes on with the same tokens."""
    cluster = start(SPARE_DECODE)
    ask = Ask(tuple(tokens_of(reference, 1, 200)), 300, SAMPLED)

    def blow() -> None:
        cluster.lose(decode_of(view_of(cluster)).host)

    assert strike(cluster, ask, 20, blow) == ask.expected(reference)
    after = settle(cluster).requests
    assert after.prompt_tokens_recomputed == len(ask.prompt)
