"""A flipped byte never becomes a token: it is noticed, dropped and computed again."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from baton.client import Client
from baton.handle import SupervisorHandle
from baton.v1 import inference_pb2 as pb
from services.engine.reference import Reference
from services.kv import arena as pages
from services.kv.arena import Arena
from tests.integration.conftest import StartCluster
from tests.support.requests import SAMPLED, Ask, tokens_of

pytestmark = pytest.mark.processes


def flip_sealed(cluster: SupervisorHandle, store: int, draw: random.Random) -> int:
    """Flips one byte of every sealed page in one arena, in payload or row checksums."""
    arena = Arena(Path(cluster.spec.arena_dir(store)))
    sealed = np.flatnonzero(arena.headers["state"] == pages.SEALED).tolist()
    for page in sealed:
        if draw.random() < 0.8:
            target = arena.page(page).reshape(-1).view(np.uint8)
        else:
            target = arena.headers["row_crc"][page].view(np.uint8)
        target[draw.randrange(len(target))] ^= 1 << draw.randrange(8)
    return len(sealed)


def ask_whole(client: Client, ask: Ask) -> tuple[list[int], pb.Usage]:
    *events, last = client.generate(
        list(ask.prompt), max_tokens=ask.max_tokens, ignore_eos=True, **ask.options
    )
    return [event.token.token_id for event in events], last.finished.usage


@pytest.mark.parametrize(("medium", "store"), [("shm", 0), ("zmq", 0), ("zmq", 1)])
def test_corrupt_cached_pages_are_computed_again(
    start_cluster: StartCluster, reference: Reference, medium: str, store: int
) -> None:
    """Whichever arena it is in: same tokens, counted, and the bad blocks are gone from the cache."""
    cluster = start_cluster(medium=medium, decode=2, arena_bytes=64 << 20)  # of its own
    ask = Ask(tuple(tokens_of(reference, store + 1, 450)), 30, SAMPLED)
    expected = ask.expected(reference)
    with Client(cluster.address) as client:
        assert ask_whole(client, ask)[0] == expected
        assert flip_sealed(cluster, store, random.Random(store))
        tokens, usage = ask_whole(client, ask)
        assert tokens == expected
        assert usage.recomputed_tokens == 450
        seen = [ask_whole(client, ask) for _ in range(9)]
        assert [tokens for tokens, _ in seen] == [expected] * 9
        assert seen[-1][1].cached_tokens == 448  # all bad blocks have been found and replaced
        assert seen[-1][1].recomputed_tokens == 0
