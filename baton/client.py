"""The client library: streams that survive a restart of the scheduler.

`Client` blocks, `AsyncClient` runs under asyncio; both drive the same `_Cursor`, which decides what
to ask next, which events the caller sees and when to give up. It knows no channel, clock or thread.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, NoReturn, TypedDict, Unpack, cast

import grpc

from baton.closing import Closing
from baton.v1 import cluster_pb2, cluster_pb2_grpc, inference_pb2, inference_pb2_grpc

CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", 16 << 20),
    ("grpc.max_send_message_length", 16 << 20),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 1000),  # how long one attempt may take
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
]
# A partition leaves the socket open: a scheduler on another host that answers no ping is gone.
PING_OPTIONS = [
    ("grpc.keepalive_time_ms", 500),
    ("grpc.keepalive_timeout_ms", 1000),
    ("grpc.http2.max_pings_without_data", 0),
]
BACKOFF_S_MIN, BACKOFF_S_MAX = 0.05, 0.5
UNARY_TIMEOUT_S = 10.0
# A scheduler that dies breaks a stream with the first, one that stops with the second.
_BROKEN = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
# How gRPC says, within UNAVAILABLE, that the server's certificate is wrong: no retry mends that.
_NOT_TRUSTED = ("CERTIFICATE_VERIFY_FAILED", "Hostname Verification Check failed")


class ClientError(Exception):
    """A call that failed: `code` is the gRPC status name, `message` is for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code, self.message = code, message

    @property
    def retryable(self) -> bool:
        return self.code in ("UNAVAILABLE", "RESOURCE_EXHAUSTED")


class Unreachable(ClientError):
    """No scheduler answered for `retry_s` seconds, or what answered is not to be trusted."""


class StreamCorrupt(ClientError):
    """The scheduler broke its promise: an index is missing, or it came twice and differs."""


class GenerateOptions(TypedDict, total=False):
    """What `generate` takes beside the prompt; meanings and defaults are in `inference.proto`."""

    request_id: str | None
    model: str
    tenant: str
    orphan_ms: int | None
    retain_ms: int | None
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    seed: int | None
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool | None
    logprobs: bool | None


def open_channel(kind: Any, address: str, keys_dir: str) -> Any:
    """A channel to the scheduler; `kind` is `grpc` or `grpc.aio`. With `keys_dir` both ends prove who
    they are. Raises ClientError naming the file when the keys cannot be used."""
    options = CHANNEL_OPTIONS + ([] if address.startswith("unix:") else PING_OPTIONS)
    if not keys_dir:
        return kind.insecure_channel(address, options=options)
    from services.ops import keys  # only who has keys pays for these imports
    from services.ops.errors import ConfigError
    from services.wire import tls

    try:
        own = keys.load(keys_dir, "client")
    except ConfigError as error:
        raise ClientError("INVALID_ARGUMENT", error.message) from None
    return tls.open_channel(kind, address, own, "scheduler", options)


def _set(message: Any, name: str, value: Any) -> None:
    """Sets one field of a message; a value that does not fit is a ClientError naming the field."""
    if value is None:
        return
    try:
        if isinstance(value, Sequence) and not isinstance(value, str):
            getattr(message, name).extend(value)
        else:
            setattr(message, name, value)
    except (TypeError, ValueError) as error:
        raise ClientError("INVALID_ARGUMENT", f"{name}: {error}") from None


def generate_request(
    prompt: str | Sequence[int], options: GenerateOptions
) -> inference_pb2.GenerateRequest:
    """The request for a prompt given as text or as token ids; draws an id when none is given."""
    request = inference_pb2.GenerateRequest()
    if isinstance(prompt, str):
        _set(request, "text", prompt)
    else:
        request.token_ids.SetInParent()
        _set(request.token_ids, "ids", prompt)
    for name, value in cast(Mapping[str, Any], options).items():
        of_request = name in inference_pb2.GenerateRequest.DESCRIPTOR.fields_by_name
        _set(request if of_request else request.sampling, name, value)
    request.request_id = request.request_id or uuid.uuid4().hex
    return request


@dataclass
class _Cursor:
    """One stream's position. A stream without progress for `retry_s` seconds is given up.

    `request` is None for a stream that was started by somebody else and is only resumed.
    """

    request_id: str
    request: inference_pb2.GenerateRequest | None
    retry_s: float
    first_index: int = 0
    deadline: float | None = None
    acknowledged: bool = False
    done: bool = False
    _seen: list[int] = field(default_factory=list)
    _failures: int = 0
    _failing_since: float = 0.0

    @property
    def next_index(self) -> int:
        return self.first_index + len(self._seen)

    def step(self) -> Literal["generate", "resume"]:
        """What to ask now. Generate is idempotent, so it is repeated until an event has come."""
        return "resume" if self.request is None or self.acknowledged else "generate"

    def accept(self, event: inference_pb2.GenerateEvent) -> bool:
        """Takes an event from the wire; True when the caller has not had it yet."""
        assert not self.done
        self.acknowledged, self._failures = True, 0
        kind = event.WhichOneof("event")
        if kind != "token":
            self.done = kind in ("finished", "failed")
            return self.done
        index, token_id = event.token.index, event.token.token_id
        where = f"{self.request_id}: token {index}"
        if index > self.next_index:
            raise StreamCorrupt("DATA_LOSS", f"{where} came where {self.next_index} is due")
        if index == self.next_index:
            self._seen.append(token_id)
            return True
        if index >= self.first_index and self._seen[index - self.first_index] != token_id:
            raise StreamCorrupt("DATA_LOSS", f"{where} came twice, differing")
        return False

    def broke(self, code: grpc.StatusCode, message: str, now: float) -> float:
        """The stream broke before its end: seconds to wait before `step()`, or a ClientError."""
        assert not self.done
        if code not in _BROKEN:
            raise ClientError(code.name, message)
        if any(words in message for words in _NOT_TRUSTED):
            raise Unreachable("UNAUTHENTICATED", f"the server is not trusted: {message}")
        if self._failures == 0:
            self._failing_since = now
        if now - self._failing_since >= self.retry_s:
            raise Unreachable("UNAVAILABLE", f"{message} (for {self.retry_s:g} s)")
        delay: float = min(BACKOFF_S_MAX, BACKOFF_S_MIN * 2 ** min(self._failures, 8))
        self._failures += 1
        return delay

    def time_left(self, now: float) -> float | None:
        """Seconds for the next call; None without a deadline."""
        if self.deadline is None:
            return None
        if now >= self.deadline:
            raise ClientError("DEADLINE_EXCEEDED", f"{self.request_id}: timeout_s has passed")
        return self.deadline - now


class _Calls:
    """The part of both clients that only builds messages."""

    def __init__(self, channel: Any, retry_s: float) -> None:
        self._channel, self._retry_s = channel, retry_s
        self._inference: Any = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
        self._cluster: Any = cluster_pb2_grpc.ClusterStub(channel)  # type: ignore[no-untyped-call]

    def _cursor(
        self, prompt: str | Sequence[int], timeout_s: float | None, options: GenerateOptions
    ) -> _Cursor:
        request = generate_request(prompt, options)
        return _Cursor(request.request_id, request, self._retry_s, deadline=_deadline(timeout_s))

    def _resumed(self, request_id: str, from_index: int, timeout_s: float | None) -> _Cursor:
        return _Cursor(request_id, None, self._retry_s, from_index, _deadline(timeout_s))

    def _open(self, cursor: _Cursor) -> Any:
        """Starts the call that `cursor` wants next."""
        timeout = cursor.time_left(time.monotonic())
        if cursor.step() == "generate":
            return self._inference.Generate(cursor.request, timeout=timeout)
        request = inference_pb2.ResumeRequest(
            request_id=cursor.request_id, from_index=cursor.next_index
        )
        return self._inference.Resume(request, timeout=timeout)


def _deadline(timeout_s: float | None) -> float | None:
    return None if timeout_s is None else time.monotonic() + timeout_s


def _raise(error: Any) -> NoReturn:
    """An RpcError as the ClientError it stands for."""
    code, message = error.code(), error.details() or "no details"
    kind = Unreachable if code is grpc.StatusCode.UNAVAILABLE else ClientError
    raise kind(code.name, message) from None


class Client(_Calls, Closing):
    """A blocking client; one may be used from many threads. `address` is host:port or unix:path;
    `keys_dir` is what `baton keys` has made, for a cluster that runs with keys.

    Errors are ClientErrors. A request that was accepted and then failed is no error but a `failed`
    event, always the last one.
    """

    def __init__(self, address: str, *, retry_s: float = 30.0, keys_dir: str = "") -> None:
        super().__init__(open_channel(grpc, address, keys_dir), retry_s)

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        timeout_s: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Iterator[inference_pb2.GenerateEvent]:
        """Streams a completion, each token index once; the request is sent at the first `next()`.

        Reconnects and resumes while the scheduler is away for at most `retry_s` seconds. A stream
        that is abandoned is cancelled by the scheduler after `orphan_ms`.
        """
        return self._follow(self._cursor(prompt, timeout_s, options))

    def resume(
        self, request_id: str, from_index: int = 0, *, timeout_s: float | None = None
    ) -> Iterator[inference_pb2.GenerateEvent]:
        """Follows a request that is known already, from a token index on."""
        return self._follow(self._resumed(request_id, from_index, timeout_s))

    def cancel(self, request_id: str) -> bool:
        """Ends a request; tells whether it was still running."""
        request = inference_pb2.CancelRequest(request_id=request_id)
        return bool(self._unary(self._inference.Cancel, request).was_running)

    def models(self) -> list[inference_pb2.Model]:
        answer = self._unary(self._inference.ListModels, inference_pb2.ListModelsRequest())
        return list(answer.models)

    def view(self) -> cluster_pb2.ClusterView:
        view: cluster_pb2.ClusterView = self._unary(
            self._cluster.GetView, cluster_pb2.GetViewRequest()
        )
        return view

    def close(self) -> None:
        self._channel.close()

    def _unary(self, method: Callable[..., Any], request: Any) -> Any:
        try:
            return method(request, timeout=UNARY_TIMEOUT_S)
        except grpc.RpcError as error:
            _raise(error)

    def _follow(self, cursor: _Cursor) -> Iterator[inference_pb2.GenerateEvent]:
        while True:
            call = self._open(cursor)
            code, message = grpc.StatusCode.UNAVAILABLE, "the stream ended early"
            try:
                for event in call:
                    if cursor.accept(event):
                        yield event
                    if cursor.done:
                        return
            except grpc.RpcError as error:
                code, message = error.code(), error.details() or message
            finally:
                call.cancel()
            time.sleep(cursor.broke(code, message, time.monotonic()))


class AsyncClient(_Calls):
    """`Client` for asyncio: make it inside a running loop."""

    def __init__(self, address: str, *, retry_s: float = 30.0, keys_dir: str = "") -> None:
        super().__init__(open_channel(grpc.aio, address, keys_dir), retry_s)

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        timeout_s: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncIterator[inference_pb2.GenerateEvent]:
        """See `Client.generate`."""
        return self._follow(self._cursor(prompt, timeout_s, options))

    def resume(
        self, request_id: str, from_index: int = 0, *, timeout_s: float | None = None
    ) -> AsyncIterator[inference_pb2.GenerateEvent]:
        """See `Client.resume`."""
        return self._follow(self._resumed(request_id, from_index, timeout_s))

    async def cancel(self, request_id: str) -> bool:
        """Ends a request; tells whether it was still running."""
        request = inference_pb2.CancelRequest(request_id=request_id)
        return bool((await self._unary(self._inference.Cancel, request)).was_running)

    async def models(self) -> list[inference_pb2.Model]:
        answer = await self._unary(self._inference.ListModels, inference_pb2.ListModelsRequest())
        return list(answer.models)

    async def view(self) -> cluster_pb2.ClusterView:
        view: cluster_pb2.ClusterView = await self._unary(
            self._cluster.GetView, cluster_pb2.GetViewRequest()
        )
        return view

    async def close(self) -> None:
        await self._channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def _unary(self, method: Callable[..., Any], request: Any) -> Any:
        try:
            return await method(request, timeout=UNARY_TIMEOUT_S)
        except grpc.RpcError as error:
            _raise(error)

    async def _follow(self, cursor: _Cursor) -> AsyncIterator[inference_pb2.GenerateEvent]:
        while True:
            call = self._open(cursor)
            code, message = grpc.StatusCode.UNAVAILABLE, "the stream ended early"
            try:
                async for event in call:
                    if cursor.accept(event):
                        yield event
                    if cursor.done:
                        return
            except grpc.RpcError as error:
                code, message = error.code(), error.details() or message
            finally:
                call.cancel()
            await asyncio.sleep(cursor.broke(code, message, time.monotonic()))
