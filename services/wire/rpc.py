"""gRPC as every process here uses it: channels, handlers, and errors mapped once."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import grpc

from services.ops.errors import BatonError
from services.ops.keys import Keys
from services.wire import tls

R = TypeVar("R")

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
