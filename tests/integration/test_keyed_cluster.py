"""Whole clusters with keys: the same tokens, and nobody else is let in."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import zmq
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton import cli
from baton.client import Client, ClientError, Unreachable
from baton.cluster import ROLES
from baton.handle import SupervisorHandle
from baton.keys import make
from baton.v1 import (
    cluster_pb2,
    control_pb2,
    control_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    store_pb2,
    store_pb2_grpc,
)
from services.engine.reference import Reference
from services.ops.keys import load
from services.wire import sockets
from services.wire.tls import open_channel
from tests.integration.conftest import StartCluster
from tests.support.keyed import foreign_dir, keys_dir, keys_of, raw, with_own_pair
from tests.support.requests import SAMPLED, Ask, tokens_of, varied

__all__ = ["foreign_dir", "keys_dir"]  # fixtures
pytestmark = pytest.mark.processes

RPC_S = 5.0
SAID_S = 10.0
SILENCE_MS = 400


@pytest.fixture(params=["shm", "zmq"])
def keyed(
    request: pytest.FixtureRequest, start_cluster: StartCluster, keys_dir: Path
) -> SupervisorHandle:
    """A cluster with keys, over each medium in turn."""
    return start_cluster(medium=request.param, decode=2, keys_dir=str(keys_dir))


@pytest.fixture
def zmq_keyed(start_cluster: StartCluster, keys_dir: Path) -> SupervisorHandle:
    return start_cluster(medium="zmq", decode=2, keys_dir=str(keys_dir))


def own_client(cluster: SupervisorHandle, **options: Any) -> Client:
    return Client(cluster.address, keys_dir=cluster.spec.keys_dir, **options)


def control(cluster: SupervisorHandle) -> str:
    return cluster.spec.unix("scheduler")


def store(cluster: SupervisorHandle) -> str:
    return cluster.spec.unix("kv-store-0")


def channel(directory: Path, role: str, address: str, peer: str) -> Any:
    """As a process of that role would dial that address."""
    return open_channel(grpc, address, load(str(directory), role), peer, [])


def refusal(call: Callable[[], Any]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value
    return error.code(), error.details()


def register(as_role: int = cluster_pb2.ROLE_DECODE) -> Iterator[control_pb2.WorkerEvent]:
    worker = cluster_pb2.Worker(worker_id="stranger", name="stranger", role=as_role)
    yield control_pb2.WorkerEvent(register=control_pb2.Register(worker=worker))


def attach(dialled: Any, as_role: int = cluster_pb2.ROLE_DECODE) -> Any:
    return next(control_pb2_grpc.ControlStub(dialled).Attach(register(as_role), timeout=RPC_S))


# --- as without keys -----------------------------------------------------------------------------


def test_the_tokens_are_the_reference_s(keyed: SupervisorHandle, reference: Reference) -> None:
    """Many streams at once over mutual TLS and CURVE."""
    asks = varied(reference)
    with own_client(keyed) as client, ThreadPoolExecutor(len(asks)) as pool:
        got = list(pool.map(lambda ask: ask.stream(client), asks))
    assert got == [ask.expected(reference) for ask in asks]


@pytest.mark.parametrize("role", ROLES)
def test_any_process_may_die(keyed: SupervisorHandle, reference: Reference, role: str) -> None:
    """SIGKILL in the middle of a stream; whoever comes back is let in again."""
    ask = Ask(tuple(tokens_of(reference, 2, 150)), 150, SAMPLED)
    with own_client(keyed) as client:
        tokens: list[int] = []
        old = name = None
        events = client.generate(
            list(ask.prompt), max_tokens=ask.max_tokens, ignore_eos=True, **ask.options
        )
        for event in events:
            if event.HasField("token"):
                tokens.append(event.token.token_id)
            if len(tokens) == 20 and old is None:
                name = keyed.names(role)[-1]
                old = keyed.kill(name)
        assert name is not None
        assert old is not None
        keyed.wait_restarted(name, old)
        assert tokens == ask.expected(reference)
        assert ask.stream(client) == ask.expected(reference)


def test_the_command_line_finds_the_keys(
    keyed: SupervisorHandle, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """By the run directory, by option, by variable; without any it says what may be missing."""
    where = ["--address", keyed.address]
    assert cli.main(["status", "--run-dir", keyed.spec.run_dir]) == 0
    away = ["--run-dir", str(tmp_path)]
    assert cli.main(["status", *where, *away, "--keys-dir", keyed.spec.keys_dir]) == 0
    monkeypatch.setenv("BATON_KEYS_DIR", keyed.spec.keys_dir)
    assert cli.main(["generate", "x", "--max-tokens", "2", *where, *away]) == 0
    monkeypatch.delenv("BATON_KEYS_DIR")
    capsys.readouterr()
    assert cli.main(["status", *where, *away]) == 1
    assert "--keys-dir" in capsys.readouterr().err
    assert cli.main(["status", *where, *away, "--keys-dir", str(tmp_path)]) == 1
    assert f"keys_dir: {tmp_path}/public/ca.crt: no such file" in capsys.readouterr().err


@pytest.mark.parametrize("role", ["scheduler", "kv-store"])
def test_health_checks_use_their_role_s_keys(keyed: SupervisorHandle, role: str) -> None:
    """As the containers' health checks call it."""
    name = "kv-store-0" if role == "kv-store" else role
    listen = store(keyed) if role == "kv-store" else keyed.address
    good = {"BATON_NAME": name, "BATON_LISTEN": listen, "BATON_KEYS_DIR": keyed.spec.keys_dir}
    command = [sys.executable, "-m", "services.ops.healthcheck", role]
    assert subprocess.run(command, env=good, check=False).returncode == 0
    del good["BATON_KEYS_DIR"]
    assert subprocess.run(command, env=good, check=False, capture_output=True).returncode == 1


# --- who is refused ------------------------------------------------------------------------------


def test_a_plain_client_is_refused(keyed: SupervisorHandle) -> None:
    """It gets no answer to anything."""
    with Client(keyed.address, retry_s=0.3) as client:
        with pytest.raises(Unreachable):
            client.view()
        with pytest.raises(Unreachable):
            list(client.generate("x", max_tokens=1))


def test_a_client_without_a_certificate_is_refused(keyed: SupervisorHandle, keys_dir: Path) -> None:
    """Trusting the cluster is not enough: the cluster must trust the client."""
    credentials = grpc.ssl_channel_credentials(keys_of(keys_dir, "client").ca)
    with grpc.secure_channel(keyed.address, credentials) as dialled:
        stub = inference_pb2_grpc.InferenceStub(dialled)
        request = inference_pb2.ListModelsRequest()
        code, _ = refusal(lambda: stub.ListModels(request, timeout=RPC_S))
    assert code is grpc.StatusCode.UNAVAILABLE


def test_a_client_of_a_foreign_authority_is_refused(
    keyed: SupervisorHandle, keys_dir: Path, foreign_dir: Path, tmp_path: Path
) -> None:
    """By its own side, which does not trust the cluster; and by the cluster, when it trusts that."""
    with Client(keyed.address, keys_dir=str(foreign_dir)) as client:
        started = time.monotonic()
        with pytest.raises(ClientError, match="not trusted"):
            list(client.generate("x", max_tokens=1))
        assert time.monotonic() - started < 10, "no retry mends that"
    foreign = keys_of(foreign_dir, "client")
    trusted = keys_of(keys_dir, "client").ca
    credentials = grpc.ssl_channel_credentials(trusted, foreign.key, foreign.certificate)
    with grpc.secure_channel(keyed.address, credentials) as dialled:
        stub = inference_pb2_grpc.InferenceStub(dialled)
        request = inference_pb2.ListModelsRequest()
        code, _ = refusal(lambda: stub.ListModels(request, timeout=RPC_S))
    assert code is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("whose", ["nobody", "another cluster"])
def test_a_worker_that_does_not_belong_is_refused_and_says_so(
    keyed: SupervisorHandle, foreign_dir: Path, tmp_path: Path, whose: str
) -> None:
    """It goes on dialling, its log tells why it does not get through, and no stream is given to it."""
    arguments = [
        "--name=stranger", f"--scheduler={control(keyed)}", f"--arena-dir={keyed.spec.arena_dir(0)}",
        f"--model={keyed.spec.model}", *([f"--keys-dir={foreign_dir}"] if whose != "nobody" else []),
    ]  # fmt: skip
    log = tmp_path / "log"
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "services.decode", *arguments], stderr=errors,
            env={**os.environ, "TMPDIR": str(tmp_path)},
        )  # fmt: skip
    try:
        end = time.monotonic() + 30
        while "scheduler not reached" not in log.read_text():
            assert time.monotonic() < end, log.read_text()
            assert process.poll() is None, log.read_text()
            threading.Event().wait(0.02)
        if whose != "nobody":
            assert "CERTIFICATE_VERIFY_FAILED" in log.read_text()
        with own_client(keyed) as client:
            assert "stranger" not in {worker.name for worker in client.view().workers}
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("role", ["client", "kv-store", "scheduler"])
def test_only_workers_may_attach(keyed: SupervisorHandle, keys_dir: Path, role: str) -> None:
    """Another certificate on the control port is refused with words."""
    with channel(keys_dir, role, control(keyed), "scheduler") as dialled:
        code, words = refusal(lambda: attach(dialled))
    assert code is grpc.StatusCode.PERMISSION_DENIED
    assert f"a {role} may not call /baton.v1.Control/Attach; only decode and prefill may" in words


def test_a_worker_may_only_be_what_its_certificate_says(
    keyed: SupervisorHandle, keys_dir: Path
) -> None:
    """A prefill cannot attach as a decode, to be given streams."""
    with channel(keys_dir, "prefill", control(keyed), "scheduler") as dialled:
        code, words = refusal(lambda: attach(dialled))
    assert code is grpc.StatusCode.PERMISSION_DENIED
    assert "a prefill may not register as decode" in words


@pytest.mark.parametrize("role", ["client", "prefill", "decode", "kv-store"])
def test_only_the_scheduler_may_call_a_store(
    keyed: SupervisorHandle, keys_dir: Path, role: str
) -> None:
    """Everybody else is refused with words, and nothing has changed."""
    with channel(keys_dir, "scheduler", store(keyed), "kv-store") as dialled:
        insider = store_pb2_grpc.KvStoreStub(dialled)
        before = insider.Describe(store_pb2.DescribeRequest(), timeout=RPC_S).pages
        with channel(keys_dir, role, store(keyed), "kv-store") as foreign:
            stub = store_pb2_grpc.KvStoreStub(foreign)
            request = store_pb2.OpenStreamRequest(request_id="r", token_ids=[1], max_new_tokens=1)
            code, words = refusal(lambda: stub.OpenStream(request, timeout=RPC_S))
        assert insider.Describe(store_pb2.DescribeRequest(), timeout=RPC_S).pages == before
    assert code is grpc.StatusCode.PERMISSION_DENIED
    assert f"a {role} may not call /baton.v1.KvStore/OpenStream; only scheduler may" in words


@pytest.mark.parametrize("role", ["prefill", "decode", "kv-store", "scheduler"])
def test_only_clients_may_generate(keyed: SupervisorHandle, keys_dir: Path, role: str) -> None:
    """A stolen worker's key reads nobody's streams; only the server itself may ask for its health."""
    with channel(keys_dir, role, keyed.address, "scheduler") as dialled:
        stub = inference_pb2_grpc.InferenceStub(dialled)
        request = inference_pb2.ResumeRequest(request_id="r")
        code, _ = refusal(lambda: next(stub.Resume(request, timeout=RPC_S)))
        assert code is grpc.StatusCode.PERMISSION_DENIED
        health = health_pb2_grpc.HealthStub(dialled)
        check = health_pb2.HealthCheckRequest(service="baton.v1.Inference")
        if role == "scheduler":
            assert health.Check(check, timeout=RPC_S).status == 1
        else:
            code, _ = refusal(lambda: health.Check(check, timeout=RPC_S))
            assert code is grpc.StatusCode.PERMISSION_DENIED


def test_a_server_of_another_role_is_not_taken_for_the_scheduler(
    keyed: SupervisorHandle, keys_dir: Path
) -> None:
    """A kv-store's certificate is good and names localhost, and is not the scheduler's."""
    with channel(keys_dir, "client", store(keyed), "scheduler") as dialled:
        stub = inference_pb2_grpc.InferenceStub(dialled)
        request = inference_pb2.ListModelsRequest()
        code, words = refusal(lambda: stub.ListModels(request, timeout=RPC_S))
    assert code is grpc.StatusCode.UNAVAILABLE
    assert "Hostname Verification Check failed" in words


# --- files ---------------------------------------------------------------------------------------


def test_nobody_but_owner_and_group_can_read(keyed: SupervisorHandle) -> None:
    """Pages, locks, journal, sockets and logs: encryption on the wire would be of no use otherwise."""
    arenas = [Path(keyed.spec.arena_dir(store)) for store in range(keyed.spec.stores)]
    made = [path for root in (keyed.spec.path, *arenas) for path in (root, *root.rglob("*"))]
    assert {"arena", "journal", "scheduler.sock", "decode-0.log"} <= {path.name for path in made}
    closed = {path for path in made if path.stat().st_mode & 0o007 == 0}
    assert {path for path in made if not {path, path.parent} & closed} == set()
    assert {(arena / "arena").stat().st_mode & 0o777 for arena in arenas} == {0o660}
    assert {arena.stat().st_mode & 0o777 for arena in arenas} == {0o770}


# --- ZeroMQ --------------------------------------------------------------------------------------


def log_of(cluster: SupervisorHandle, name: str) -> str:
    return (cluster.spec.path / "logs" / f"{name}.log").read_text()


def wait_said(cluster: SupervisorHandle, name: str, words: str, times: int) -> None:
    end = time.monotonic() + SAID_S
    while log_of(cluster, name).count(words) < times:
        assert time.monotonic() < end, f"{name} has not said {words!r}"
        threading.Event().wait(0.02)


def page_counts(cluster: SupervisorHandle) -> list[cluster_pb2.StorePages]:
    with own_client(cluster) as client:
        return list(client.view().stores)


@pytest.mark.parametrize("target", ["decode-0", "kv-store-1"])
@pytest.mark.parametrize("key", ["none", "own"])
def test_a_stranger_can_neither_write_pages_nor_wake(
    zmq_keyed: SupervisorHandle, keys_dir: Path, target: str, key: str
) -> None:
    """What it sends is never even looked at, and its refusal is logged. The control: what a prefill
    with keys sends is looked at, and refused for being no message of the stream."""
    with channel(keys_dir, "scheduler", zmq_keyed.spec.unix("kv-store-1"), "kv-store") as dialled:
        stub = store_pb2_grpc.KvStoreStub(dialled)
        described = stub.Describe(store_pb2.DescribeRequest(), timeout=RPC_S)
    pages = page_counts(zmq_keyed)
    with own_client(zmq_keyed) as client:
        workers = {worker.name: worker for worker in client.view().workers}
    decode = target.startswith("decode")
    role, kind = ("decode", zmq.PUSH) if decode else ("kv-store", zmq.DEALER)
    address = workers[target].address if decode else described.ingest_address
    looked_at = "announcement refused" if decode else "stream message refused"
    before = log_of(zmq_keyed, target).count(looked_at)
    prefill = keys_of(keys_dir, "prefill")
    public = prefill.curve_keys(role)[0]
    inside = sockets.context(keys=prefill)
    outside = sockets.context()
    try:
        stranger = (
            raw(outside, kind, address) if key == "none"
            else with_own_pair(outside, kind, address, public)
        )  # fmt: skip
        stranger.send(b"not a header")
        wait_said(zmq_keyed, target, "handshake failed", 1)
        assert not stranger.poll(SILENCE_MS)
        assert log_of(zmq_keyed, target).count(looked_at) == before
        assert page_counts(zmq_keyed) == pages
        insider = sockets.dial(inside, kind, address, role)
        insider.send(b"not a header")
        wait_said(zmq_keyed, target, looked_at, before + 1)
        stranger.close()
        insider.close()
    finally:
        inside.destroy(linger=0)
        outside.destroy(linger=0)


# --- starting, renewing --------------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
def test_a_process_with_bad_keys_does_not_start(tmp_path: Path, role: str) -> None:
    """It stops with status 2 and one line that names the file and the reason."""
    files = make(tmp_path / "k").files
    files.key(role).write_text("junk")
    arguments = [
        f"--keys-dir={files.root}",
        f"--{'journal' if role == 'scheduler' else 'arena'}-dir",
    ]
    command = [
        sys.executable,
        "-m",
        f"services.{role.replace('-', '_')}",
        *arguments,
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    words = f"ConfigError: keys_dir: {files.key(role)}: is not an unencrypted private key in PEM"
    assert words in done.stderr


@pytest.mark.parametrize("medium", ["shm", "zmq"])
def test_keys_are_renewed_under_a_running_cluster(
    start_cluster: StartCluster, reference: Reference, tmp_path: Path, medium: str
) -> None:
    """One process after the other is restarted with new keys of the same authority; in between old and
    new ones work together, and a client with either is served."""
    made = make(tmp_path / "k").files
    cluster = start_cluster(medium=medium, decode=1, keys_dir=str(made.root))
    old_client = own_client(cluster)
    make(made.root, renew=True)
    new_client = own_client(cluster)
    with old_client, new_client:
        names = [entry["name"] for entry in cluster.state()["processes"]]
        for number, name in enumerate(reversed(names)):
            cluster.wait_restarted(name, cluster.kill(name))
            ask = Ask(tuple(tokens_of(reference, number % 4, 130 + number)), 8)
            for client in (old_client, new_client):
                assert ask.stream(client) == ask.expected(reference)
