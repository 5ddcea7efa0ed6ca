"""T0 over real processes: whatever happens around a request, its tokens are the reference's."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from baton.client import Client
from baton.handle import SupervisorHandle
from services.engine.reference import Reference
from tests.integration.conftest import StartCluster
from tests.support.requests import SAMPLED, Ask, tokens_of, varied

pytestmark = pytest.mark.processes


def run_together(address: str, asks: list[Ask]) -> list[list[int]]:
    with Client(address) as client, ThreadPoolExecutor(len(asks)) as pool:
        return list(pool.map(lambda ask: ask.stream(client), asks))


def test_one_at_a_time(cluster: SupervisorHandle, reference: Reference) -> None:
    """A stream alone in the batch gives the reference's tokens."""
    with Client(cluster.address) as client:
        for ask in varied(reference)[:6]:
            assert ask.stream(client) == ask.expected(reference)


@pytest.mark.parametrize("order", [1, 2])
def test_eight_and_more_at_once_in_any_order(
    cluster: SupervisorHandle, reference: Reference, order: int
) -> None:
    """A full batch, joined and left at different times, changes no token of any stream."""
    asks = varied(reference)
    random.Random(order).shuffle(asks)
    assert run_together(cluster.address, asks) == [ask.expected(reference) for ask in asks]


def test_prefix_hit(cluster: SupervisorHandle, reference: Reference) -> None:
    """A second request finds the first one's blocks, its generated ones too, computes only the
    tail, and gives the same tokens as without them."""
    prompt = tuple(tokens_of(reference, 2, 300))
    first = Ask(prompt, 100, {**SAMPLED, "seed": random.randrange(1 << 30)})
    with Client(cluster.address) as client:
        produced = first.stream(client)
        longer = Ask((*prompt, *produced[:60], 5, 9), 30)
        before = client.view().requests
        events = list(client.generate(list(longer.prompt), max_tokens=30, ignore_eos=True))
        after = client.view().requests
    usage = events[-1].finished.usage
    assert usage.cached_tokens == 320  # of 362, in whole blocks
    computed = after.prompt_tokens_computed - before.prompt_tokens_computed
    assert computed == 362 - usage.cached_tokens
    assert [e.token.token_id for e in events[:-1]] == longer.expected(reference)


@pytest.mark.parametrize(
    ("option", "cached"), [("prefill:--transfer=pull", 320), ("scheduler:--peer-fetch=0", 256)]
)
def test_pages_travel_in_other_ways(
    start_cluster: StartCluster, reference: Reference, option: str, cached: int
) -> None:
    """Fetched by decode's store instead of pushed: the same tokens. Without fetching between stores
    (the control) a second turn computes again what decode has written elsewhere."""
    cluster = start_cluster(medium="zmq", decode=1, extra=(option,))
    prompt = tuple(tokens_of(reference, 5, 300))
    first = Ask(prompt, 100)
    with Client(cluster.address) as client:
        produced = first.stream(client)
        assert produced == first.expected(reference)
        longer = Ask((*prompt, *produced[:60], 5, 9), 30)
        events = list(client.generate(list(longer.prompt), max_tokens=30, ignore_eos=True))
    assert events[-1].finished.usage.cached_tokens == cached
    assert [e.token.token_id for e in events[:-1]] == longer.expected(reference)


def test_a_fully_cached_prompt_computes_its_last_block(
    cluster: SupervisorHandle, reference: Reference
) -> None:
    """When every block is cached the last one is computed again, so that its logits exist."""
    ask = Ask(tuple(tokens_of(reference, 3, 256)), 20)
    with Client(cluster.address) as client:
        assert ask.stream(client) == ask.expected(reference)
        assert ask.stream(client) == ask.expected(reference)


def test_tenants_share_nothing(cluster: SupervisorHandle, reference: Reference) -> None:
    """Another tenant's equal prompt finds no block."""
    prompt = tokens_of(reference, 1, 200)
    with Client(cluster.address) as client:
        for tenant in ("a", "b"):
            *_, last = client.generate(prompt, max_tokens=4, tenant=tenant)
            assert last.finished.usage.cached_tokens == 0
        *_, last = client.generate(prompt, max_tokens=4, tenant="a")
        assert last.finished.usage.cached_tokens == 192


@pytest.mark.parametrize("length", [63, 64, 200])
def test_killed_or_not(cluster: SupervisorHandle, reference: Reference, length: int) -> None:
    """SIGKILL of the decode that runs them changes no token of its streams."""
    asks = [
        Ask(tuple(tokens_of(reference, i, length + i)), 150, SAMPLED if i % 2 else {})
        for i in range(4)
    ]
    with Client(cluster.address) as client, ThreadPoolExecutor(len(asks)) as pool:
        before = client.view().requests.prompt_tokens_recomputed
        running = [
            pool.submit(_stream_and_kill, cluster, client, ask, i) for i, ask in enumerate(asks)
        ]
        results = [future.result() for future in running]
        assert client.view().requests.prompt_tokens_recomputed == before
    assert results == [ask.expected(reference) for ask in asks]


def _stream_and_kill(cluster: SupervisorHandle, client: Client, ask: Ask, number: int) -> list[int]:
    """Stream 0 kills its own decode after 20 tokens."""
    tokens: list[int] = []
    events = client.generate(
        list(ask.prompt), max_tokens=ask.max_tokens, ignore_eos=True, **ask.options
    )
    for event in events:
        if event.HasField("token"):
            assert event.token.index == len(tokens)
            tokens.append(event.token.token_id)
        if number == 0 and len(tokens) == 20:
            victim = next(w for w in client.view().workers if w.role == 2 and w.running_requests)
            old = cluster.kill(victim.name)
            tokens_at_kill = len(tokens)
            assert tokens_at_kill == 20
            cluster.wait_restarted(victim.name, old)
    return tokens
