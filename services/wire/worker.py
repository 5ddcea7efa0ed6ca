"""The asyncio shell that prefill and decode share: join, attach, report, drain."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Iterable
from typing import Protocol

from baton.v1 import cluster_pb2, control_pb2
from services.kv.worker import ArenaHold
from services.ops import lifecycle
from services.ops.keys import Keys
from services.wire.link import SchedulerLink


class WorkerConfig(Protocol):
    """What every worker's configuration has."""

    @property
    def name(self) -> str: ...
    @property
    def host(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def scheduler(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def cores(self) -> tuple[int, ...]: ...
    @property
    def heartbeat_ms(self) -> int: ...


def registration(
    config: WorkerConfig, hold: ArenaHold, role: cluster_pb2.Role, address: str,
    running: Iterable[control_pb2.RunningStream],
) -> control_pb2.Register:  # fmt: skip
    """The worker's present description of itself."""
    running = list(running)
    return control_pb2.Register(
        worker=cluster_pb2.Worker(
            worker_id=hold.worker_id, name=config.name, role=role,
            state=cluster_pb2.WORKER_STATE_READY, address=address, pid=os.getpid(),
            cores=sorted(os.sched_getaffinity(0)), device=config.device,
            running_requests=[stream.request_id for stream in running],
            store_id=hold.arena.plan.store_id, host=config.host or socket.gethostname(),
        ),
        model=config.model, fingerprint=hold.arena.plan.fingerprint, running=running,
    )  # fmt: skip


async def attached(
    config: WorkerConfig,
    stopping: asyncio.Event,
    register: Callable[[], control_pb2.Register],
    on_command: Callable[[control_pb2.WorkerCommand], None],
    *,
    keys: Keys | None,
    link_ready: Callable[[SchedulerLink], None],
    streams: Callable[[], int],
    others: Iterable[asyncio.Task[None]] = (),
) -> None:
    """Runs the scheduler link until the process is told to stop."""
    link = SchedulerLink(
        config.scheduler,
        config.heartbeat_ms / 1000,
        register,
        on_command,
        config.name,
        streams,
        keys,
    )
    link_ready(link)
    tasks = [asyncio.create_task(link.run()), *others]
    ready = asyncio.create_task(_announce(link, config.name))
    await lifecycle.until_stopped(stopping, tasks)
    ready.cancel()


async def _announce(link: SchedulerLink, name: str) -> None:
    await link.attached.wait()
    lifecycle.announce_ready(name=name)
