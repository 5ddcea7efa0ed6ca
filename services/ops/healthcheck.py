"""`python -m services.ops.healthcheck <role>`: exit status 0 when this container's process is well.

A server is asked over gRPC where it listens (BATON_LISTEN), with its own role's keys where there are
some (BATON_KEYS_DIR). A worker has no server: while the
scheduler has it, it touches a file named after it (BATON_NAME) at each heartbeat, whose age tells.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

SERVERS = {"scheduler": "baton.v1.Inference", "kv-store": ""}
WORKERS = ("prefill", "decode")
ALIVE_S_MAX = 2.0
RPC_S_MAX = 2.0


def local_address(listen: str) -> str:
    """Where to dial what listens at `listen`: a wildcard host is this one."""
    if listen.startswith("unix:"):
        return listen
    host, _, port = listen.rpartition(":")
    return f"127.0.0.1:{port}" if host in ("", "0.0.0.0", "[::]", "*") else listen


def server_problem(role: str, listen: str, keys_dir: str) -> str:
    """Asks grpc.health.v1; empty when it serves."""
    import grpc  # a worker's check runs every few seconds and must not pay for these imports
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from services.ops.errors import ConfigError
    from services.ops.keys import load
    from services.wire.tls import open_channel

    address = local_address(listen)
    try:
        keys = load(keys_dir, role)
    except ConfigError as error:
        return error.message
    with open_channel(grpc, address, keys, role, [("grpc.enable_http_proxy", 0)]) as channel:
        request = health_pb2.HealthCheckRequest(service=SERVERS[role])
        try:
            stub = health_pb2_grpc.HealthStub(channel)  # type: ignore[no-untyped-call]
            answer = stub.Check(request, timeout=RPC_S_MAX)
        except grpc.RpcError as error:
            return f"{address}: {error.code().name}: {error.details()}"
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        return f"{address}: {health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)}"
    return ""


def worker_problem(name: str) -> str:
    """Looks at the sign of life that `services.wire.link` leaves; empty when it is fresh."""
    path = Path(tempfile.gettempdir()) / f"baton-{name}.alive"
    try:
        age_s = time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return f"{path} is missing: not attached to the scheduler"
    return f"{path} is {age_s:.1f} s old" if age_s > ALIVE_S_MAX else ""


def problem(role: str, environ: Mapping[str, str]) -> str:
    """What is wrong with the process of this role; empty when nothing is."""
    variable = "BATON_NAME" if role in WORKERS else "BATON_LISTEN"
    if role not in SERVERS and role not in WORKERS:
        return f"{role!r} is not one of {', '.join((*SERVERS, *WORKERS))}"
    if variable not in environ:
        return f"{variable} is not set"
    if role in WORKERS:
        return worker_problem(environ[variable])
    return server_problem(role, environ[variable], environ.get("BATON_KEYS_DIR", ""))


def main(argv: Sequence[str]) -> int:
    found = problem(argv[0] if argv else "", os.environ)
    if found:
        print(found, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
