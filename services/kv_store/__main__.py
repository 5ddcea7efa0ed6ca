"""`python -m services.kv_store`: one host's KV store."""

from __future__ import annotations

import asyncio
import sys

from baton.v1 import store_pb2_grpc
from services.engine.identity import identify
from services.kv import locks
from services.kv_store.config import KvStoreConfig
from services.kv_store.ingest import Ingest
from services.kv_store.rpc import KvStoreServicer
from services.kv_store.runtime import KvStore
from services.ops import config, lifecycle, log
from services.wire.rpc import Server

SWEEP_S = 0.1
FORGET_SWEEPS = 600  # sweeps between two removals of dead workers' lock files


async def _sweep(store: KvStore) -> None:
    while True:
        locks.forget_dead(store.arena.directory)
        for _ in range(FORGET_SWEEPS):
            await asyncio.sleep(SWEEP_S)
            store.sweep()


async def serve(settings: KvStoreConfig) -> None:
    """Runs the store until it is told to stop."""
    stopping = lifecycle.stop_event()
    identity = identify(
        settings.model, kv_dtype=settings.kv_dtype, layers_per_group=settings.layers_per_group,
        prefill_device=settings.prefill_device, decode_device=settings.decode_device,
    )  # fmt: skip
    store = KvStore(settings, identity)
    ingest = Ingest(store, settings.ingest_listen, settings.ingest_advertise)
    servicer = KvStoreServicer(store, settings.model, settings.listen, ingest.address)
    server = Server(
        {"baton.v1.KvStore": lambda s: store_pb2_grpc.add_KvStoreServicer_to_server(servicer, s)}
    )
    address = await server.start(settings.listen)
    tasks = [asyncio.create_task(ingest.run()), asyncio.create_task(_sweep(store))]
    await server.ready()
    lifecycle.announce_ready(address=address, ingest=ingest.address, store_id=store.store_id)
    await lifecycle.until_stopped(stopping, tasks)
    await server.stop(0.5)
    ingest.close()


def main() -> int:
    settings = config.load(KvStoreConfig)
    log.configure(settings.name, settings.log_level)
    lifecycle.pin(settings.cores)
    return lifecycle.run(lambda: serve(settings))


if __name__ == "__main__":
    sys.exit(main())
