"""The tier on disk under real processes: a prefix outlives them, and a broken disk stops nothing."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from baton.client import Client
from baton.cluster import ClusterSpec
from baton.handle import SupervisorHandle, wait_until
from baton.v1 import cluster_pb2
from services.engine.reference import Reference
from tests.support.requests import SAMPLED, Ask, tokens_of

pytestmark = pytest.mark.processes


@contextmanager
def cluster(tmp_path: Path, medium: str = "shm", **more: object) -> Iterator[Client]:
    """A cluster of its own, whose stores keep what is cold on disk at once."""
    spec = ClusterSpec(
        run_dir=str(tmp_path / "run"), listen="127.0.0.1:0", decode=1, medium=medium,
        disk_dir=str(tmp_path / "disk"), extra=("kv-store:--write-back-ms=0",), **more,  # type: ignore[arg-type]
    )  # fmt: skip
    handle = SupervisorHandle.start(spec)
    try:
        with Client(handle.address) as client:
            yield client
    finally:
        assert handle.stop() == 0


def ask(client: Client, what: Ask) -> tuple[list[int], int, int]:
    """Tokens, cached tokens, recomputed tokens."""
    *events, last = client.generate(
        list(what.prompt), max_tokens=what.max_tokens, ignore_eos=True, **what.options
    )
    usage = last.finished.usage
    return [e.token.token_id for e in events], usage.cached_tokens, usage.recomputed_tokens


def store(client: Client) -> cluster_pb2.StorePages:
    """Decode's."""
    return client.view().stores[-1]


@pytest.mark.parametrize("medium", ["shm", "zmq"])
def test_a_prefix_outlives_everything(tmp_path: Path, reference: Reference, medium: str) -> None:
    """Another arena, other processes: only the tail is computed, and the tokens are the same."""
    what = Ask(tuple(tokens_of(reference, 7, 450)), 20, SAMPLED)
    expected = what.expected(reference)
    with cluster(tmp_path, medium) as client:
        assert ask(client, what) == (expected, 0, 0)
    with cluster(tmp_path, medium) as client:
        assert ask(client, what) == (expected, 448, 0)
        assert store(client).disk_hits == 7
        assert client.view().requests.prompt_tokens_computed == 2


def test_flipped_files_are_computed_again(tmp_path: Path, reference: Reference) -> None:
    """The hit ends at the first bad file; nothing of it becomes a token, and it is counted."""
    what = Ask(tuple(tokens_of(reference, 8, 450)), 20, SAMPLED)
    expected = what.expected(reference)
    with cluster(tmp_path) as client:
        ask(client, what)
    rng, files = random.Random(3), sorted((tmp_path / "disk").rglob("*.kv"))
    assert len(files) == 7
    for path in files:
        raw = bytearray(path.read_bytes())
        raw[rng.randrange(100, len(raw))] ^= 1 << rng.randrange(8)
        path.write_bytes(raw)
    with cluster(tmp_path) as client:
        assert ask(client, what) == (expected, 0, 0)
        assert store(client).disk_corrupt_files == 1
        wait_until(lambda: store(client).disk_blocks >= 7, 10, "good ones to take their place")
        assert ask(client, what)[:2] == (expected, 448)


def test_a_full_disk_stops_nothing(tmp_path: Path, reference: Reference) -> None:
    """No write succeeds: requests run, prefixes are found in the arena, and it is counted."""
    what = Ask(tuple(tokens_of(reference, 9, 200)), 20, SAMPLED)
    expected = what.expected(reference)
    with cluster(tmp_path) as client:
        (tmp_path / "disk" / "kv-store-0").rename(tmp_path / "gone")
        assert ask(client, what)[0] == expected
        wait_until(lambda: store(client).disk_write_failures > 0, 10, "a write to fail")
        assert store(client).disk_paused
        assert ask(client, what) == (expected, 192, 0)
