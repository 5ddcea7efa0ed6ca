"""Each process may die, or fall silent, in mid-stream: the clients' tokens stay the reference's."""

from __future__ import annotations

import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest

from baton.client import Client, Unreachable
from baton.handle import SupervisorHandle, wait_until
from services.engine.reference import Reference
from tests.integration.conftest import StartCluster
from tests.support.requests import SAMPLED, Ask, tokens_of

pytestmark = pytest.mark.processes

Blow = Callable[[SupervisorHandle, Client], None]


def asks_of(reference: Reference, count: int = 4, max_tokens: int = 220) -> list[Ask]:
    return [
        Ask(tuple(tokens_of(reference, i, 90 + 37 * i)), max_tokens, SAMPLED if i % 2 else {})
        for i in range(count)
    ]


def strike(
    cluster: SupervisorHandle, asks: list[Ask], at_token: int, blow: Blow
) -> list[list[int]]:
    """Runs all streams; the first one to reach `at_token` tokens strikes the blow."""
    struck = Event()

    def run(ask: Ask, striker: bool) -> list[int]:
        tokens: list[int] = []
        with Client(cluster.address) as client:
            events = client.generate(
                list(ask.prompt), max_tokens=ask.max_tokens, ignore_eos=True, **ask.options
            )
            for event in events:
                if event.HasField("token"):
                    assert event.token.index == len(tokens)
                    tokens.append(event.token.token_id)
                else:
                    assert event.HasField("finished"), event
                if striker and len(tokens) == at_token and not struck.is_set():
                    struck.set()
                    blow(cluster, client)
        return tokens

    with ThreadPoolExecutor(len(asks)) as pool:
        running = [pool.submit(run, ask, i == 0) for i, ask in enumerate(asks)]
        return [future.result() for future in running]


def settle(cluster: SupervisorHandle) -> None:
    """Everyone is back, and nobody holds a page."""

    def at_rest() -> bool:
        if not all(entry["ready"] for entry in cluster.state()["processes"]):
            return False
        try:
            with Client(cluster.address) as client:
                view = client.view()
        except Unreachable:
            return False
        workers = cluster.spec.decode + cluster.spec.prefill
        return len(view.workers) == workers and all(
            s.reachable and s.streams == s.pages_open == s.pages_sealed == s.pages_quarantined == 0
            for s in view.stores
        )

    wait_until(at_rest, 20, "the cluster to come to rest")


def recomputed(cluster: SupervisorHandle) -> int:
    """Prompt tokens computed a second time, since the scheduler was started."""
    with Client(cluster.address) as client:
        return int(client.view().requests.prompt_tokens_recomputed)


def kill(*roles: str) -> Blow:
    def blow(cluster: SupervisorHandle, client: Client) -> None:
        for role in roles:
            for name in cluster.names(role):
                cluster.kill(name)

    return blow


@pytest.mark.parametrize(
    "roles",
    [("kv-store",), ("scheduler",), ("decode",), ("decode", "kv-store"), ("decode", "scheduler"),
     ("scheduler", "kv-store")],
    ids="+".join,
)  # fmt: skip
def test_processes_die_at_once(
    cluster: SupervisorHandle, reference: Reference, roles: tuple[str, ...]
) -> None:
    """SIGKILL of every process of these roles, in mid-stream: all streams end as if nothing had
    been, no prompt token is computed twice, and all pages come back."""
    settle(cluster)
    asks = asks_of(reference)
    before = recomputed(cluster)
    results = strike(cluster, asks, 12, kill(*roles))
    assert results == [ask.expected(reference) for ask in asks]
    settle(cluster)
    assert recomputed(cluster) == (0 if "scheduler" in roles else before)


def test_prefill_dies_in_mid_prefill(start_cluster: StartCluster, reference: Reference) -> None:
    """Another prefill, here the restarted one, goes on from the last complete block."""
    cluster = start_cluster(decode=1, extra=("prefill:--chunk-tokens=64",))
    asks = [Ask(tuple(tokens_of(reference, i, 1500)), 30) for i in range(3)]

    def computing(client: Client) -> bool:
        return any(s.pages_open for s in client.view().stores)

    with Client(cluster.address) as client, ThreadPoolExecutor(4) as pool:
        running = [pool.submit(ask.stream, client) for ask in asks]
        wait_until(lambda: computing(client), 10, "prefill to begin")
        old = cluster.kill("prefill-0")
        results = [future.result() for future in running]
        cluster.wait_restarted("prefill-0", old)
    assert results == [ask.expected(reference) for ask in asks]
    settle(cluster)


def test_a_paused_decode_is_replaced_and_refused(
    cluster: SupervisorHandle, reference: Reference
) -> None:
    """A silent decode's streams move to the other one; when it wakes it spoils nothing, and the
    pages kept from it come back."""
    settle(cluster)
    paused: list[tuple[str, int]] = []

    def pause(cluster: SupervisorHandle, client: Client) -> None:
        [victim, *_] = [w for w in client.view().workers if w.role == 2 and w.running_requests]
        paused.append((victim.name, cluster.kill(victim.name, signal.SIGSTOP)))

    asks = asks_of(reference, max_tokens=300)
    try:
        results = strike(cluster, asks, 15, pause)
    finally:
        for name, pid in paused:
            assert cluster.pid(name) == pid
            cluster.kill(name, signal.SIGCONT)
    assert results == [ask.expected(reference) for ask in asks]
    settle(cluster)
    with Client(cluster.address) as client:
        counts = client.view().requests
        assert counts.takeovers >= 1
        assert counts.false_suspicions >= 1


def test_silence_without_a_successor_keeps_the_epoch(
    start_cluster: StartCluster, reference: Reference
) -> None:
    """With one decode there is nobody to move to: the stream waits for it, and goes on."""
    cluster = start_cluster(decode=1)
    with Client(cluster.address) as client:
        before = client.view().requests.takeovers

    def pause_until_suspected(cluster: SupervisorHandle, client: Client) -> None:
        cluster.kill("decode-0", signal.SIGSTOP)
        try:
            wait_until(lambda: any(w.state == 2 for w in client.view().workers), 5, "the suspicion")
        finally:
            cluster.kill("decode-0", signal.SIGCONT)

    asks = asks_of(reference, count=2)
    results = strike(cluster, asks, 10, pause_until_suspected)
    assert results == [ask.expected(reference) for ask in asks]
    with Client(cluster.address) as client:
        assert client.view().requests.takeovers == before
