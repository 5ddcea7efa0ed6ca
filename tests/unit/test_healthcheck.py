"""The containers' health checks tell the truth."""

from __future__ import annotations

import os
import tempfile
import time
from concurrent import futures
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from services.ops.healthcheck import SERVERS, local_address, problem

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.mark.parametrize("role", SERVERS)
def test_a_server_is_well_when_it_says_so(tmp_path: Path, role: str) -> None:
    """Nobody there, not serving yet, and serving are three different answers."""
    environ = {"BATON_LISTEN": f"unix:{tmp_path}/s.sock"}
    assert "UNAVAILABLE" in problem(role, environ)
    servicer = health.HealthServicer()
    server = grpc.server(futures.ThreadPoolExecutor(1))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    server.add_insecure_port(environ["BATON_LISTEN"])
    server.start()
    servicer.set(SERVERS[role], NOT_SERVING)
    assert "NOT_SERVING" in problem(role, environ)
    servicer.set(SERVERS[role], SERVING)
    assert problem(role, environ) == ""
    server.stop(None).wait()


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_worker_is_well_while_it_gives_signs_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    """No sign, a fresh one and one older than two seconds."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    environ = {"BATON_NAME": "w-0"}
    assert "missing" in problem(role, environ)
    sign = tmp_path / "baton-w-0.alive"
    sign.touch()
    assert problem(role, environ) == ""
    then = time.time() - 2.5
    os.utime(sign, (then, then))
    assert "old" in problem(role, environ)


def test_a_check_that_cannot_check_says_why() -> None:
    """An unknown role or a missing variable is no health."""
    assert "gateway" in problem("gateway", {})
    assert "BATON_NAME" in problem("decode", {})
    assert "BATON_LISTEN" in problem("scheduler", {})


@pytest.mark.parametrize(
    ("listen", "dialled"),
    [
        ("0.0.0.0:50051", "127.0.0.1:50051"),
        ("[::]:1", "127.0.0.1:1"),
        ("10.0.0.1:1", "10.0.0.1:1"),
        ("unix:/run/x", "unix:/run/x"),
    ],
)
def test_a_wildcard_is_dialled_at_home(listen: str, dialled: str) -> None:
    """What listens everywhere also listens here."""
    assert local_address(listen) == dialled
