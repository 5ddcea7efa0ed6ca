"""Prefill on one device, decode on another: the promises that are left, over real processes.

Bits differ between the classes, so the reference computes the prompt as prefill does and the answer
as decode does. `torch-cpu` is another class than the native engine on every machine.
"""

from __future__ import annotations

import pytest
import torch

from baton.client import Client
from baton.handle import SupervisorHandle
from services.engine.reference import Reference
from tests.integration.conftest import StartCluster
from tests.integration.test_same_tokens import run_together
from tests.support.oracle import no_cuda
from tests.support.requests import SAMPLED, Ask, tokens_of, varied

pytestmark = pytest.mark.processes

DEVICES = ["torch-cpu", pytest.param("cuda", marks=no_cuda)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["shm", "zmq"])
def mixed(
    request: pytest.FixtureRequest, device: str, start_cluster: StartCluster
) -> SupervisorHandle:
    return start_cluster(medium=request.param, decode=2, prefill_device=device)


@pytest.fixture
def both(device: str) -> Reference:
    """The one-process reference of such a cluster; prefill has one core, so torch has one thread."""
    torch.set_num_threads(1)
    return Reference("models/pico", prefill_device=device)


def test_tokens_are_the_mixed_reference_s(mixed: SupervisorHandle, both: Reference) -> None:
    """T0 within the pair of classes: chunks, batch and company change no token."""
    asks = varied(both)
    assert run_together(mixed.address, asks) == [ask.expected(both) for ask in asks]


def test_the_first_token_is_near_the_native_engine_s(
    mixed: SupervisorHandle, reference: Reference
) -> None:
    """Across the classes the logits agree to rounding, so a clear choice is the same choice."""
    asks = [Ask(tuple(tokens_of(reference, module, 200)), 1) for module in range(4)]
    with Client(mixed.address) as client:
        assert [ask.stream(client) for ask in asks] == [ask.expected(reference) for ask in asks]


def test_a_killed_decode_changes_no_token(mixed: SupervisorHandle, both: Reference) -> None:
    """What is taken over is decode's own work on prefill's pages: bit for bit, nothing recomputed."""
    ask = Ask(tuple(tokens_of(both, 1, 200)), 150, SAMPLED)
    with Client(mixed.address) as client:
        before = client.view().requests.prompt_tokens_recomputed
        tokens: list[int] = []
        for event in client.generate(
            list(ask.prompt), max_tokens=150, ignore_eos=True, **ask.options
        ):
            if event.HasField("token"):
                tokens.append(event.token.token_id)
            if len(tokens) == 70 and event.HasField("token"):
                victim = next(
                    w for w in client.view().workers if w.role == 2 and w.running_requests
                )
                mixed.wait_restarted(victim.name, mixed.kill(victim.name))
        assert client.view().requests.prompt_tokens_recomputed == before
    assert tokens == ask.expected(both)


def test_an_answer_is_no_prefix_for_a_prompt(mixed: SupervisorHandle, both: Reference) -> None:
    """A prompt that goes on from an answer finds the old prompt's blocks and computes the rest, so
    its tokens do not depend on what the cache holds."""
    first = Ask(tuple(tokens_of(both, 2, 300)), 100)
    with Client(mixed.address) as client:
        produced = first.stream(client)
        longer = Ask((*first.prompt, *produced[:90], 5, 9), 30)
        events = list(client.generate(list(longer.prompt), max_tokens=30, ignore_eos=True))
    assert events[-1].finished.usage.cached_tokens == 256
    assert [e.token.token_id for e in events[:-1]] == longer.expected(both)
