"""A kv-store process and the streams that are opened at it, one after the other."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from baton.bench.kv.actors import ServiceProcess
from baton.bench.kv.world import World
from baton.closing import Closing
from baton.v1 import store_pb2, store_pb2_grpc
from services.kv_store.config import KvStoreConfig
from services.ops.keys import load as load_keys
from services.wire.rpc import OPTIONS
from services.wire.tls import open_channel

RPC_S = 30.0
LEASE_MS = 3_600_000  # no scheduler is there to renew them


@dataclass(frozen=True)
class OpenStream:
    """A stream that waits for its KV."""

    slot: int
    attempt: int


class Store(Closing):
    """`services.kv_store` with an arena of its own; use as a context manager."""

    def __init__(self, world: World, model: Path, root: Path, name: str, **options: Any) -> None:
        self._arena_dir = Path(f"/dev/shm/{root.name}-{name}")
        config = KvStoreConfig(
            name=name, model=str(model), arena_dir=str(self._arena_dir), kv_dtype="bf16",
            arena_bytes=world.arena_bytes, layers_per_group=1, streams_max=4,
            listen=f"unix:{root}/{name}.sock", log_level="warning",
            lease_ms=LEASE_MS, **options,
        )  # fmt: skip
        self._numbers = itertools.count(1)
        self._request = store_pb2.OpenStreamRequest(
            token_ids=world.token_ids().tolist(), bypass_cache=True
        )
        self._process = ServiceProcess("services.kv_store", config, root / f"{name}.log")
        keys = load_keys(config.keys_dir, "scheduler")
        self._channel = open_channel(grpc, config.listen, keys, "kv-store", OPTIONS)
        self._stub: Any = store_pb2_grpc.KvStoreStub(self._channel)  # type: ignore[no-untyped-call]

    @property
    def arena_dir(self) -> Path:
        return self._arena_dir

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def ingest(self) -> str:
        """Where page frames go."""
        return str(self._process.facts["ingest"])

    def open(self) -> OpenStream:
        """A new stream in the place of the one before; the arena gives it the same pages again."""
        if self._request.request_id:
            self._stub.Release(
                store_pb2.ReleaseRequest(request_id=self._request.request_id), timeout=RPC_S
            )
        number = next(self._numbers)
        self._request.request_id = f"bench-{number}"
        self._request.epoch = self._request.attempt = number
        opened = self._stub.OpenStream(self._request, timeout=RPC_S)
        return OpenStream(opened.slot, number)

    def close(self) -> None:
        self._channel.close()
        self._process.close()
        shutil.rmtree(self._arena_dir, ignore_errors=True)
