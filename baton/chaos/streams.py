"""One request as a client sees it, read off the wire without the client library, whose own filter would
hide a duplicate. Only when a stream itself breaks, because the scheduler died, does it ask again as that
library does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import grpc

from baton.chaos.lab import Connection
from baton.chaos.scenario import Ask
from baton.v1 import inference_pb2

STREAM_S_MAX = 90.0
RETRY_S = 0.05
_BROKEN = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
OnToken = Callable[["Stream", int], Awaitable[None]]


@dataclass
class Stream:
    """One request as the client sees it; times are of this machine's monotonic clock."""

    ask: Ask
    request_id: str
    tenant: str = ""
    retain_ms: int | None = None  # and how long a reader may be away; None: the scheduler's default
    orphan_ms: int | None = None
    seen: list[tuple[int, int]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    endings: list[str] = field(default_factory=list)
    finished: inference_pb2.Finished | None = None
    story: list[str] = field(default_factory=list)
    breaks: int = 0  # times that the call ended without a final event
    over: bool = False

    @property
    def timing(self) -> inference_pb2.Timing | None:
        return None if self.finished is None else self.finished.timing

    @property
    def next_index(self) -> int:
        return max((index for index, _ in self.seen), default=-1) + 1

    def body(self) -> inference_pb2.GenerateRequest:
        ask = self.ask
        return inference_pb2.GenerateRequest(
            request_id=self.request_id, tenant=self.tenant, retain_ms=self.retain_ms,
            orphan_ms=self.orphan_ms, token_ids=inference_pb2.TokenIds(ids=ask.token_ids),
            sampling=inference_pb2.SamplingParams(
                max_tokens=ask.max_tokens, temperature=ask.temperature, top_p=ask.top_p,
                top_k=ask.top_k, seed=ask.seed, ignore_eos=True,
            ),
        )  # fmt: skip

    def take(self, event: inference_pb2.GenerateEvent) -> None:
        kind = event.WhichOneof("event")
        if kind == "token":
            self.seen.append((event.token.index, event.token.token_id))
            self.times.append(time.monotonic())
        elif kind == "finished":
            self.finished = event.finished
            self.endings.append(inference_pb2.FinishReason.Name(event.finished.reason))
        else:
            self.endings.append(event.failed.code)
            self.story.extend([event.failed.message, *event.failed.story])


async def follow(connection: Connection, stream: Stream, on_token: OnToken | None = None) -> None:
    """Reads a stream to its end, or for STREAM_S_MAX; `on_token` hears of each index."""
    end = time.monotonic() + STREAM_S_MAX
    while not stream.endings and (left := end - time.monotonic()) > 0:
        call = _open(connection, stream, left)
        try:
            async for event in call:
                stream.take(event)
                if on_token is not None and event.HasField("token"):
                    await on_token(stream, event.token.index)
        except grpc.aio.AioRpcError as error:
            if error.code() not in _BROKEN:
                stream.endings.append(error.code().name)
                stream.story.append(str(error.details()))
        if not stream.endings:
            stream.breaks += 1
            await asyncio.sleep(RETRY_S)
    stream.over = True


def _open(connection: Connection, stream: Stream, timeout_s: float) -> grpc.aio.UnaryStreamCall:
    if not stream.seen:
        return connection.inference.Generate(stream.body(), timeout=timeout_s)
    request = inference_pb2.ResumeRequest(
        request_id=stream.request_id, from_index=stream.next_index
    )
    return connection.inference.Resume(request, timeout=timeout_s)
