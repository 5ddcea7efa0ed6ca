"""Mutual TLS on gRPC: channels and servers from a process's keys, and who may call what.

Who calls is known by the role in the certificate, checked here, before any method is entered. Without
keys everything is plain. It knows roles and services by name and nothing about what they do.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import grpc

from services.ops import log
from services.ops.errors import BatonError, Forbidden, Unauthenticated
from services.ops.keys import Keys, name_of, role_of

Option = tuple[str, str | int]
_logger = log.get("tls")


def open_channel(
    kind: Any, address: str, keys: Keys | None, peer: str, options: Sequence[Option]
) -> Any:
    """A channel to the server of role `peer`; `kind` is `grpc` or `grpc.aio`.

    The server is verified by its role's name, whatever the address: it may be a unix socket, a
    container's name or a forwarded port, and another role's certificate is refused everywhere.
    """
    if keys is None:
        return kind.insecure_channel(address, options=options)
    credentials = grpc.ssl_channel_credentials(keys.ca, keys.key, keys.certificate)
    named = [*options, ("grpc.ssl_target_name_override", name_of(peer))]
    return kind.secure_channel(address, credentials, options=named)


def listen(server: grpc.aio.Server, address: str, keys: Keys | None) -> int:
    """Adds a port on which every peer must show a certificate of this cluster; gives its number."""
    if keys is None:
        return int(server.add_insecure_port(address))
    pairs = [(keys.key, keys.certificate)]
    credentials = grpc.ssl_server_credentials(pairs, keys.ca, require_client_auth=True)
    return int(server.add_secure_port(address, credentials))


class RoleGuard(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Lets in the roles that a server is for; its own role may ask for its health alone."""

    def __init__(self, own: str, admits: frozenset[str], health_service: str) -> None:
        assert admits, "a server that nobody may call"
        self._own, self._admits = own, admits
        self._health = f"/{health_service}/"

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(details)
        if handler is None:
            return None
        kinds = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
        (kind,) = (kind for kind in kinds if getattr(handler, kind) is not None)
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        guarded = self._guard(getattr(handler, kind), details.method)
        return make(guarded, handler.request_deserializer, handler.response_serializer)

    def _guard(self, method: Callable[..., Any], name: str) -> Callable[..., Any]:
        if inspect.isasyncgenfunction(method):  # else a coroutine, as every method here

            async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
                await self._check(context, name)
                async with contextlib.aclosing(method(request, context)) as events:
                    async for event in events:
                        yield event

            return stream

        async def call(request: Any, context: Any) -> Any:
            await self._check(context, name)
            return await method(request, context)

        return call

    async def _check(self, context: Any, name: str) -> None:
        try:
            self.admit(caller(context), name)
        except BatonError as error:
            _logger.warning("call refused", peer=context.peer(), reason=error.message)
            await context.abort(grpc.StatusCode[error.code], error.message)

    def admit(self, role: str, name: str) -> None:
        """Raises Unauthenticated without a role, Forbidden with the wrong one."""
        if not role:
            raise Unauthenticated("certificate: it names no role of this cluster")
        own_health = role == self._own and name.startswith(self._health)
        if role not in self._admits and not own_health:
            admitted = " and ".join(sorted(self._admits))
            raise Forbidden(f"certificate: a {role} may not call {name}; only {admitted} may")


def caller(context: Any) -> str:
    """The role of the peer's certificate; empty when it has none."""
    names = context.auth_context().get("x509_subject_alternative_name", ())
    roles = [role for name in names if (role := role_of(name.decode()))]
    return roles[0] if len(roles) == 1 else ""
