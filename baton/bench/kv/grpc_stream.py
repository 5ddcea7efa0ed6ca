"""The same bytes over gRPC: a put is a stream of messages from the client, a get one to it.

Messages are raw bytes of at most 4 MiB without a protobuf around them, made before the clock starts:
gRPC has to be given `bytes`, and is not charged for that copy. It is charged for the receiver's one
copy into its buffer, as the others are. Timed at the client, from the call until the server's answer
to a put, or until the last byte of a get lies in the client's buffer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from concurrent import futures
from typing import Any

import grpc
import numpy as np

from baton.bench.kv.world import MIB, World

MESSAGE_BYTES_MAX = 4 * MIB
CALL_S = 60.0
OPTIONS = [
    ("grpc.max_receive_message_length", 2 * MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", 2 * MESSAGE_BYTES_MAX),
    ("grpc.enable_http_proxy", 0),
]
_PUT, _GET = "/bench.Kv/Put", "/bench.Kv/Get"


class _Buffer:
    """One side's memory: messages to send, cut once, and a place to receive into."""

    def __init__(self, world: World) -> None:
        source = np.random.default_rng(1).integers(0, 256, world.total_bytes, np.uint8)
        self._source = source
        self._target = np.zeros_like(source) + np.uint8(1)
        self._cut: tuple[int, int] = (0, 0)
        self.messages: list[bytes] = []
        self._at = 0

    def cut(self, run_bytes: int, total_bytes: int) -> None:
        """Makes the messages of one run length; those of the one before are forgotten."""
        size = min(run_bytes, MESSAGE_BYTES_MAX)
        if self._cut != (size, total_bytes):
            pieces = self._source[:total_bytes].reshape(-1, size)
            self.messages = [piece.tobytes() for piece in pieces]
            self._cut = (size, total_bytes)
        self._at = 0

    def take(self, message: bytes) -> None:
        end = self._at + len(message)
        self._target[self._at : end] = np.frombuffer(message, np.uint8)
        self._at = end

    def received(self) -> int:
        """Bytes since `cut`, or since last asked."""
        count, self._at = self._at, 0
        return count


class SyncServer:
    """`grpc.server` with a thread per call."""

    def __init__(self, world: World) -> None:
        self._buffer = _Buffer(world)
        self._server = grpc.server(futures.ThreadPoolExecutor(2), options=OPTIONS)
        handlers = {
            "Put": grpc.stream_unary_rpc_method_handler(self._put),
            "Get": grpc.unary_stream_rpc_method_handler(self._get),
        }
        handler = grpc.method_handlers_generic_handler("bench.Kv", handlers)
        self._server.add_generic_rpc_handlers((handler,))
        self._port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    def cut(self, run_bytes: int, total_bytes: int) -> None:
        self._buffer.cut(run_bytes, total_bytes)

    def _put(self, messages: Iterator[bytes], context: Any) -> bytes:
        for message in messages:
            self._buffer.take(message)
        return str(self._buffer.received()).encode()

    def _get(self, request: bytes, context: Any) -> Iterator[bytes]:
        yield from self._buffer.messages

    def close(self) -> None:
        self._server.stop(None).wait()


class SyncClient:
    def __init__(self, world: World, address: str) -> None:
        self._buffer = _Buffer(world)
        self._channel = grpc.insecure_channel(address, options=OPTIONS)
        self._put, self._get = self._channel.stream_unary(_PUT), self._channel.unary_stream(_GET)

    def cut(self, run_bytes: int, total_bytes: int) -> None:
        self._buffer.cut(run_bytes, total_bytes)

    def put(self, total_bytes: int) -> float:
        start = time.monotonic()
        answer = self._put(iter(self._buffer.messages), timeout=CALL_S)
        seconds = time.monotonic() - start
        assert int(answer) == total_bytes, "the server has not received every byte"
        return seconds

    def get(self, total_bytes: int) -> float:
        start = time.monotonic()
        for message in self._get(b"", timeout=CALL_S):
            self._buffer.take(message)
        seconds = time.monotonic() - start
        assert self._buffer.received() == total_bytes, "the client has not received every byte"
        return seconds

    def close(self) -> None:
        self._channel.close()


class AioServer:
    """`grpc.aio.server`, its event loop in a thread beside the one that takes the calls."""

    def __init__(self, world: World) -> None:
        self._buffer = _Buffer(world)
        self._loop = asyncio.new_event_loop()
        self._thread = futures.ThreadPoolExecutor(1)
        self._thread.submit(self._loop.run_forever)
        self._port = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(CALL_S)

    async def _start(self) -> int:
        self._server = grpc.aio.server(options=OPTIONS)
        handlers = {
            "Put": grpc.stream_unary_rpc_method_handler(self._put),
            "Get": grpc.unary_stream_rpc_method_handler(self._get),
        }
        handler = grpc.method_handlers_generic_handler("bench.Kv", handlers)
        self._server.add_generic_rpc_handlers((handler,))
        port: int = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        return port

    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    def cut(self, run_bytes: int, total_bytes: int) -> None:
        self._buffer.cut(run_bytes, total_bytes)

    async def _put(self, messages: AsyncIterator[bytes], context: Any) -> bytes:
        async for message in messages:
            self._buffer.take(message)
        return str(self._buffer.received()).encode()

    async def _get(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        for message in self._buffer.messages:
            yield message

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._server.stop(None), self._loop).result(CALL_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.shutdown()


class AioClient:
    def __init__(self, world: World, address: str) -> None:
        self._buffer = _Buffer(world)
        self._runner = asyncio.Runner()
        self._runner.run(self._connect(address))

    async def _connect(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=OPTIONS)
        self._put, self._get = self._channel.stream_unary(_PUT), self._channel.unary_stream(_GET)

    def cut(self, run_bytes: int, total_bytes: int) -> None:
        self._buffer.cut(run_bytes, total_bytes)

    def put(self, total_bytes: int) -> float:
        return self._runner.run(self._do_put(total_bytes))

    async def _do_put(self, total_bytes: int) -> float:
        start = time.monotonic()
        answer = await self._put(iter(self._buffer.messages), timeout=CALL_S)
        seconds = time.monotonic() - start
        assert int(answer) == total_bytes, "the server has not received every byte"
        return seconds

    def get(self, total_bytes: int) -> float:
        return self._runner.run(self._do_get(total_bytes))

    async def _do_get(self, total_bytes: int) -> float:
        start = time.monotonic()
        async for message in self._get(b"", timeout=CALL_S):
            self._buffer.take(message)
        seconds = time.monotonic() - start
        assert self._buffer.received() == total_bytes, "the client has not received every byte"
        return seconds

    def close(self) -> None:
        self._runner.run(self._channel.close())
        self._runner.close()
