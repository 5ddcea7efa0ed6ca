"""`python -m services.scheduler`: the scheduler."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from baton.v1 import cluster_pb2_grpc, control_pb2_grpc, inference_pb2_grpc
from services.engine.identity import ModelIdentity, identify
from services.ops import config, lifecycle, log
from services.ops.errors import Unavailable
from services.ops.keys import Keys
from services.ops.keys import load as load_keys
from services.scheduler.config import SchedulerConfig
from services.scheduler.rpc import ClusterServicer, ControlServicer, InferenceServicer
from services.scheduler.runtime import Scheduler
from services.scheduler.stores import describe
from services.wire.server import Server

STORES_S = 30.0
WORKERS, CLIENTS = frozenset({"prefill", "decode"}), frozenset({"client"})


async def _identity(settings: SchedulerConfig, keys: Keys | None) -> ModelIdentity:
    """The model as the stores see it: they know the layout, the scheduler only the directory."""
    layout = await describe(settings.stores[0], STORES_S, keys)
    identity = identify(
        settings.model, kv_dtype=layout.kv_dtype, layers_per_group=layout.layers_per_group,
        prefill_device=layout.prefill_device, decode_device=layout.decode_device,
    )  # fmt: skip
    if identity.fingerprint != layout.fingerprint:
        raise Unavailable(f"stores: {settings.stores[0]} holds KV of another model")
    return identity


async def serve(settings: SchedulerConfig) -> None:
    """Runs the scheduler until it is told to stop."""
    stopping = lifecycle.stop_event()
    keys = load_keys(settings.keys_dir, "scheduler")
    scheduler = Scheduler(settings, await _identity(settings, keys), settings.listen, keys)
    watching = asyncio.create_task(scheduler.stores.watch(scheduler.stores_changed))

    def add_control(server: Any) -> None:
        control_pb2_grpc.add_ControlServicer_to_server(ControlServicer(scheduler), server)

    def add_inference(server: Any) -> None:
        inference_pb2_grpc.add_InferenceServicer_to_server(InferenceServicer(scheduler), server)

    def add_cluster(server: Any) -> None:
        cluster_pb2_grpc.add_ClusterServicer_to_server(ClusterServicer(scheduler), server)

    control = Server({"baton.v1.Control": add_control}, keys, admits=WORKERS)
    public = Server(
        {"baton.v1.Inference": add_inference, "baton.v1.Cluster": add_cluster}, keys, admits=CLIENTS
    )
    await control.start(settings.control_listen)
    scheduler.address = await public.start(settings.listen)
    ticking = asyncio.create_task(scheduler.tick())
    renewing = asyncio.create_task(scheduler.renew())
    await control.ready()
    await public.ready()
    lifecycle.announce_ready(address=scheduler.address)
    await lifecycle.until_stopped(stopping, [watching, ticking, renewing])
    await public.stop(0.5)
    await control.stop(0.1)
    await scheduler.close()


def main() -> int:
    settings = config.load(SchedulerConfig)
    log.configure(settings.name, settings.log_level)
    lifecycle.pin(settings.cores)
    return lifecycle.run(lambda: serve(settings))


if __name__ == "__main__":
    sys.exit(main())
