"""`python -m services.kv_store`: one host's KV store."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from baton.v1 import store_pb2_grpc
from services.engine.identity import identify
from services.kv import locks
from services.kv_store.config import KvStoreConfig
from services.kv_store.disk import DiskTier
from services.kv_store.ingest import Ingest
from services.kv_store.prefetch import Prefetcher
from services.kv_store.rpc import KvStoreServicer
from services.kv_store.runtime import KvStore
from services.kv_store.scrub import Scrub
from services.kv_store.writeback import WriteBack
from services.ops import config, lifecycle, log
from services.ops.keys import load as load_keys
from services.wire.server import Server

SWEEP_S = 0.1
WRITE_BACK_S = 0.05
FORGET_SWEEPS = 10  # sweeps between two removals of dead workers' lock files


async def _sweep(store: KvStore) -> None:
    scrub = Scrub(store)
    while True:
        locks.forget_dead(store.arena.directory)
        for _ in range(FORGET_SWEEPS):
            await asyncio.sleep(SWEEP_S)
            store.sweep()
            scrub.step()


def _disk(settings: KvStoreConfig, store: KvStore) -> DiskTier | None:
    if not settings.disk_dir:
        return None
    return DiskTier(
        Path(settings.disk_dir), store.arena, settings.disk_bytes,
        keep_halves="halves" in settings.unsafe,
    )  # fmt: skip


async def _write_back(writer: WriteBack, store: KvStore) -> None:
    while True:
        writer.step(store.clock())
        await asyncio.sleep(WRITE_BACK_S)


async def serve(settings: KvStoreConfig) -> None:
    """Runs the store until it is told to stop."""
    stopping = lifecycle.stop_event()
    identity = identify(
        settings.model, kv_dtype=settings.kv_dtype, layers_per_group=settings.layers_per_group,
        prefill_device=settings.prefill_device, decode_device=settings.decode_device,
    )  # fmt: skip
    keys = load_keys(settings.keys_dir, "kv-store")
    store = KvStore(settings, identity)
    store.disk = disk = _disk(settings, store)
    ingest = Ingest(store, settings.ingest_listen, settings.ingest_advertise, keys)
    prefetcher = Prefetcher(store, [disk] if disk else [], settings.prefetch_ms / 1e3)
    servicer = KvStoreServicer(
        store, prefetcher, ingest.peers, settings.model, settings.listen, ingest.address
    )
    server = Server(
        {"baton.v1.KvStore": lambda s: store_pb2_grpc.add_KvStoreServicer_to_server(servicer, s)},
        keys, admits=frozenset({"scheduler"}),
    )  # fmt: skip
    address = await server.start(settings.listen)
    tasks = [asyncio.create_task(ingest.run()), asyncio.create_task(_sweep(store))]
    if disk:
        writer = WriteBack(store, disk, settings.write_back_ms / 1e3)
        tasks.append(asyncio.create_task(_write_back(writer, store)))
    await server.ready()
    lifecycle.announce_ready(address=address, ingest=ingest.address, store_id=store.store_id)
    await lifecycle.until_stopped(stopping, tasks)
    await server.stop(0.5)
    ingest.close()
    if disk:
        await writer.flush(settings.flush_ms / 1e3)
        disk.close()


def main() -> int:
    settings = config.load(KvStoreConfig)
    log.configure(settings.name, settings.log_level)
    lifecycle.pin(settings.cores)
    lifecycle.keep_freed_memory()
    return lifecycle.run(lambda: serve(settings))


if __name__ == "__main__":
    sys.exit(main())
