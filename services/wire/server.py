"""A gRPC server with health and reflection, apart from `rpc` because a worker has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from services.ops.keys import Keys
from services.wire import tls
from services.wire.rpc import SERVER_OPTIONS


class Server:
    """A gRPC server with health and reflection. Health says SERVING only after `ready()`.

    Where there are keys, only the roles in `admits` may call it.
    """

    def __init__(
        self, services: dict[str, Callable[[Any], None]], keys: Keys | None, admits: frozenset[str]
    ) -> None:
        guards = [] if keys is None else [tls.RoleGuard(keys.role, admits, health.SERVICE_NAME)]
        self._keys = keys
        self._server = grpc.aio.server(options=SERVER_OPTIONS, interceptors=guards)
        self._names = list(services)
        for register in services.values():
            register(self._server)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = [*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME]
        reflection.enable_server_reflection(names, self._server)

    async def start(self, listen: str) -> str:
        """Binds and starts; gives the bound address, port 0 resolved."""
        port = tls.listen(self._server, listen, self._keys)
        await self._set(health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._server.start()
        if listen.startswith("unix:"):
            return listen
        return f"{listen.rpartition(':')[0]}:{port}"

    async def ready(self) -> None:
        await self._set(health_pb2.HealthCheckResponse.SERVING)

    async def stop(self, grace_s: float) -> None:
        await self._set(health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._server.stop(grace_s)

    async def _set(self, status: Any) -> None:
        for name in ("", *self._names):
            await self._health.set(name, status)
