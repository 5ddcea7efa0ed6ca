"""Decodes come and go while streams run: the clients' tokens stay the reference's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from baton import cli
from baton.client import Client
from baton.handle import SupervisorHandle, wait_until
from services.engine.reference import Reference
from tests.integration.conftest import StartCluster
from tests.integration.test_deaths import asks_of, strike

pytestmark = pytest.mark.processes


def scale(cluster: SupervisorHandle, decodes: int) -> None:
    assert cli.main(["scale", f"--decode={decodes}", "--run-dir", cluster.spec.run_dir]) == 0


def decodes(client: Client) -> list[str]:
    """Names of the decodes that the scheduler knows."""
    return sorted(w.name for w in client.view().workers if w.name.startswith("decode"))


@pytest.mark.parametrize("spares", [True, False])
def test_decodes_come_and_go_in_mid_stream(
    start_cluster: StartCluster, reference: Reference, spares: bool
) -> None:
    """One more takes part, from a spare or not; then one goes, whose streams the other takes over."""
    cluster = start_cluster(decode=1, spares=spares, extra=("decode:--batch-max=2",))
    asks = asks_of(reference)
    for count in (2, 1):
        results = strike(cluster, asks, 12, lambda cluster, _, n=count: scale(cluster, n))  # type: ignore[misc]
        assert results == [ask.expected(reference) for ask in asks]
        names = [f"decode-{n}" for n in range(count)]
        assert cluster.names("decode") == names
        with Client(cluster.address) as client:
            wait_until(lambda: decodes(client) == names, 20, f"{names} at the scheduler")  # noqa: B023


def test_an_added_decode_logs_where_its_name_says(start_cluster: StartCluster) -> None:
    """A spare that becomes another process is that process in every way."""
    cluster = start_cluster(decode=1)
    scale(cluster, 2)
    pid = cluster.pid("decode-1")
    log = Path(f"/proc/{pid}/fd/2").resolve()
    assert log == cluster.spec.path / "logs" / "decode-1.log"
    assert (cluster.spec.path / "baton-decode-1.alive").exists()
    scale(cluster, 1)
    state = json.loads((cluster.spec.path / "supervisor.json").read_text())
    assert [entry["name"] for entry in state["processes"] if entry["role"] == "decode"] == [
        "decode-0"
    ]
