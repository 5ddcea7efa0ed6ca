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

R = TypeVar("R")
_logger = log.get("rpc")

MESSAGE_BYTES_MAX = 16 << 20
OPTIONS = [
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.initial_reconnect_backoff_ms", 20),
    ("grpc.min_reconnect_backoff_ms", 1000),  # how long one attempt may take
    ("grpc.max_reconnect_backoff_ms", 200),
    ("grpc.so_reuseport", 0),
    ("grpc.enable_http_proxy", 0),
]


def channel(address: str) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(address, options=OPTIONS)


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
    """A gRPC server with health and reflection. Health says SERVING only after `ready()`."""

    def __init__(self, services: dict[str, Callable[[Any], None]]) -> None:
        self._server = grpc.aio.server(options=OPTIONS)
        self._names = list(services)
        for register in services.values():
            register(self._server)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = [*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME]
        reflection.enable_server_reflection(names, self._server)

    async def start(self, listen: str) -> str:
        """Binds and starts; gives the bound address, port 0 resolved."""
        port = self._server.add_insecure_port(listen)
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
