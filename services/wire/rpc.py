"""gRPC as every process here uses it: channels, servers, health, and errors mapped once."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from services.ops import log
from services.ops.errors import BatonError
from services.ops.keys import Keys
from services.wire import tls

R = TypeVar("R")
_logger = log.get("rpc")

MESSAGE_BYTES_MAX = 16 << 20
# A partition leaves sockets open: a peer that answers no ping is gone. Whoever has dialled notices
# within a second and dials again; the server takes its time, it only has to let go of the socket.
PING_MS, PING_TIMEOUT_MS = 250, 550
SERVER_PING_MS, SERVER_PING_TIMEOUT_MS = 1000, 1000
OPTIONS = [
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.initial_reconnect_backoff_ms", 20),
    ("grpc.min_reconnect_backoff_ms", 1000),  # how long one attempt may take
    ("grpc.max_reconnect_backoff_ms", 200),
    ("grpc.so_reuseport", 0),
    ("grpc.enable_http_proxy", 0),
]
CHANNEL_OPTIONS = [
    *OPTIONS,
    ("grpc.keepalive_time_ms", PING_MS),
    ("grpc.keepalive_timeout_ms", PING_TIMEOUT_MS),
]
SERVER_OPTIONS = [
    *OPTIONS,
    ("grpc.keepalive_time_ms", SERVER_PING_MS),
    ("grpc.keepalive_timeout_ms", SERVER_PING_TIMEOUT_MS),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 100),
    ("grpc.http2.max_ping_strikes", 0),
]


def channel(address: str, keys: Keys | None, peer: str) -> grpc.aio.Channel:
    """A channel to the server of role `peer`, which must prove that role where there are keys."""
    on_this_host = address.startswith("unix:")  # then the kernel tells, and a pause is no death
    options = OPTIONS if on_this_host else CHANNEL_OPTIONS
    return tls.open_channel(grpc.aio, address, keys, peer, options)


def status_of(error: BatonError) -> grpc.StatusCode:
    return grpc.StatusCode[error.code]


async def abort(context: Any, error: BatonError) -> None:
    """Ends a call with the error's status; never returns."""
    await context.abort(status_of(error), error.message)


def unary(method: Callable[..., Awaitable[R]]) -> Callable[..., Awaitable[R]]:
    """A unary handler whose BatonErrors become gRPC statuses."""

    @functools.wraps(method)
    async def handler(self: Any, request: Any, context: Any) -> R:
        try:
            return await method(self, request, context)
        except BatonError as error:
            await abort(context, error)
            raise AssertionError("abort does not return") from error

    return handler


def streaming(method: Callable[..., AsyncIterator[R]]) -> Callable[..., AsyncIterator[R]]:
    """A streaming handler whose BatonErrors become gRPC statuses."""

    @functools.wraps(method)
    async def handler(self: Any, request: Any, context: Any) -> AsyncIterator[R]:
        try:
            async for event in method(self, request, context):
                yield event
        except BatonError as error:
            await abort(context, error)

    return handler


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
