"""A decode process from inside: what a step costs beside the native call, and how soon its event loop
answers a ping meanwhile.

The decode engine of `services/decode` works on streams that a kv-store has opened, in a process with
an event loop, as a worker's: the engine computes, checks, samples, commits and reports on its thread,
and the loop takes the reports. What a worker has besides, the gRPC stream to the scheduler, is left out.
Prompts are random bytes with true checksums: nothing is prefilled.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import struct
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import uvloop
import zmq
import zmq.asyncio

from baton.bench.engine import own, report
from baton.bench.engine.rounds import Cell
from baton.bench.figures import quartiles
from baton.bench.kv.actors import Actor, ServiceProcess
from baton.v1 import control_pb2, store_pb2, store_pb2_grpc
from services.decode.config import DecodeConfig
from services.decode.engine_loop import DecodeEngine
from services.decode.stream import Report, as_event
from services.kv.identity import RowIdentity
from services.kv.layout import PAGE_TOKENS
from services.kv.record import StreamRecord
from services.kv.worker import join
from services.kv_store.config import KvStoreConfig
from services.wire.rpc import OPTIONS
from services.wire.tls import open_channel

PROMPT, TOKENS_MAX = 512, 4000
PING_MS, PINGS_S = 5, 6.0
OVERHEAD_MAX, PING_P99_MS_MAX = 0.02, 5.0
LEASE_MS = 3_600_000  # no scheduler is there to renew them
RPC_S = 30.0
_STAMP = struct.Struct(
    "<d"
)  # when the loop had the ping: what its sender waits for later is its own
_NATIVE = ("begin", "run_group", "logits", "step")


class Timed:
    """A backend whose native calls are counted in seconds."""

    def __init__(self, backend: Any) -> None:
        self._backend, self.seconds = backend, 0.0
        for name in _NATIVE:
            if hasattr(backend, name):
                setattr(self, name, self._timed(getattr(backend, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            value = call(*arguments, **options)
            self.seconds += time.perf_counter() - start
            return value

        return timed


@dataclass(frozen=True)
class Opened:
    """A stream that waits for its KV."""

    request_id: str
    slot: int
    number: int  # its epoch and its attempt


class Decoder:
    """The process: the engine on its thread, the loop on another, the pipe's calls on the first."""

    def __init__(
        self, model: str, arena_dir: str, format_: str, cache: str, cores: list[int], ping: str
    ) -> None:
        os.sched_setaffinity(0, cores)
        self._hold = join(arena_dir, model, *own.device_classes(format_))
        backend = own.backend(
            model, self._hold.identity.config, self._hold.arena, format_, cache, cores
        )
        self._timed = Timed(backend)
        self._reports = 0
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._run, args=(ping,), daemon=True)
        self._thread.start()
        config = DecodeConfig(model=model, arena_dir=arena_dir)
        self._engine = DecodeEngine(config, self._hold.arena, self._timed, self._report)
        self._engine.start()

    def worker_id(self) -> str:
        return self._hold.worker_id

    def _run(self, ping: str) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._answer(ping))

    async def _answer(self, address: str) -> None:
        context = zmq.asyncio.Context()
        socket = context.socket(zmq.REP)
        socket.bind(address)
        while True:
            await socket.recv()
            await socket.send(_STAMP.pack(time.monotonic()))

    def _report(self, report: Report) -> None:
        self._loop.call_soon_threadsafe(self._count, report)

    def _count(self, report: Report) -> None:
        self._reports += len(as_event(report).SerializeToString()) > 0

    def prepare(self, opened: list[Opened]) -> None:
        """Streams whose prompts are there, and their first tokens."""
        for stream in opened:
            record = StreamRecord(self._hold.arena, stream.slot)
            self._fill(record, stream.number)
            record.publish_first(stream.number, 1, 0.0)
            sampling = control_pb2.ResolvedSampling(max_tokens=TOKENS_MAX, top_p=1.0)
            command = control_pb2.PrepareDecode(
                request_id=stream.request_id,
                slot=stream.slot,
                epoch=stream.number,
                sampling=sampling,
            )
            self._engine.submit(command)

    def _fill(self, record: StreamRecord, attempt: int) -> None:
        arena, random_ = self._hold.arena, np.random.default_rng(attempt)
        identity = RowIdentity(record.root, record.tokens[:PROMPT], PROMPT)
        blocks = np.array(record.prefill_table[: PROMPT // PAGE_TOKENS])
        for group in range(arena.layout.groups):
            for block in blocks:
                page = np.frombuffer(arena.run(group, int(block), 1), np.uint16)
                values = random_.standard_normal(page.size, np.float32)
                page[:] = values.view(np.uint32) >> 16
            arena.native.stamp_tokens(blocks, 0, identity.seeds, group)
            for number, block in enumerate(blocks):
                arena.native.seal(
                    arena.page_id(int(block), group), group, PAGE_TOKENS, identity.key(number)
                )
            record.set_ready(group, attempt, PROMPT)

    def running(self) -> int:
        return self._engine.steps

    def so_far(self) -> tuple[int, float, float]:
        """Steps, seconds in native calls, and now."""
        return self._engine.steps, self._timed.seconds, time.perf_counter()

    def close(self) -> None:
        self._engine.close()


def measure(model: Path, cell: Cell, cache: str, cores: list[int], streams: int) -> dict[str, Any]:
    """One cell: pings while `streams` streams are decoded, and the step's overhead in the same time."""
    with tempfile.TemporaryDirectory(prefix="bl-", dir="/tmp") as scratch:
        root = Path(scratch)
        arena_dir = Path(f"/dev/shm/{root.name}")
        prefill, decode = own.device_classes(cell.format)
        config = KvStoreConfig(
            name="loop", model=str(model), arena_dir=str(arena_dir), kv_dtype="bf16",
            arena_bytes=own.arena_bytes(model, streams, PROMPT + TOKENS_MAX), streams_max=32,
            listen=f"unix:{root}/store.sock", log_level="warning", lease_ms=LEASE_MS,
            prefill_device=prefill, decode_device=decode,
        )  # fmt: skip
        ping = f"ipc://{root}/ping"
        try:
            with (
                ServiceProcess("services.kv_store", config, root / "store.log"),
                Actor(Decoder, str(model), str(arena_dir), cell.format, cache,
                      cores[-cell.threads :], ping) as decoder,
            ):  # fmt: skip
                decoder.call("prepare", _open(config.listen, decoder.call("worker_id"), streams))
                return {"shape": cell.shape, "format": cell.format, "threads": cell.threads,
                        "streams": streams, **_watch(decoder, ping)}  # fmt: skip
        finally:
            shutil.rmtree(arena_dir, ignore_errors=True)


def _open(listen: str, worker: str, streams: int) -> list[Opened]:
    channel = open_channel(grpc, listen, None, "kv-store", OPTIONS)
    stub: Any = store_pb2_grpc.KvStoreStub(channel)  # type: ignore[no-untyped-call]
    opened = []
    for number in range(1, streams + 1):
        tokens = np.random.default_rng(number).integers(1, 4000, PROMPT)
        request = store_pb2.OpenStreamRequest(
            request_id=f"loop-{number}", token_ids=tokens.tolist(), max_new_tokens=TOKENS_MAX,
            epoch=number, attempt=number, prefill_writer=worker, decode_writer=worker,
            bypass_cache=True,
        )  # fmt: skip
        slot = stub.OpenStream(request, timeout=RPC_S).slot
        opened.append(Opened(request.request_id, slot, number))
    channel.close()
    return opened


def _watch(decoder: Actor, ping: str) -> dict[str, Any]:
    while decoder.call("running") < 3:
        time.sleep(0.01)
    draw = random.Random(1)
    before = decoder.call("so_far")
    times = []
    with zmq.Context() as context, context.socket(zmq.REQ) as socket:
        socket.connect(ping)
        end = time.monotonic() + PINGS_S
        while time.monotonic() < end:
            start = time.monotonic()
            socket.send(b"")
            [answered] = _STAMP.unpack(socket.recv())
            times.append((answered - start) * 1e3)
            time.sleep(draw.uniform(0, 2 * PING_MS) / 1e3)
    after = decoder.call("so_far")
    steps, native, elapsed = (b - a for a, b in zip(before, after, strict=True))
    return {
        "steps": steps, "step_ms": round(elapsed / steps * 1e3, 3),
        "overhead": round(1 - native / elapsed, 4), "pings": len(times),
        "ping_ms": quartiles(times), "ping_ms_p99": round(float(np.percentile(times, 99)), 3),
    }  # fmt: skip


def goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for row in rows:
        cell, case = (
            Cell(row["shape"], row["format"], row["threads"]),
            f"decode-{row['streams']}@512",
        )
        bounds = [("ping of the event loop, p99 in ms", row["ping_ms_p99"], PING_P99_MS_MAX)]
        if cell.shape == "m05" and row["streams"] == 1:
            bounds.append(("step overhead outside the native call", row["overhead"], OVERHEAD_MAX))
        for text, figure, bound in bounds:
            found.append(report.row(4, text, cell, case, [figure] * 3, bound, "", at_most=True))
    return found
