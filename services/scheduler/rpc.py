"""The scheduler's services: translate messages, decide nothing."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Any

from baton.v1 import (
    cluster_pb2,
    cluster_pb2_grpc,
    control_pb2,
    control_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
)
from services.ops.errors import Forbidden
from services.scheduler import validate
from services.scheduler.runtime import Scheduler
from services.wire.rpc import streaming, unary
from services.wire.tls import caller

Event = inference_pb2.GenerateEvent


class InferenceServicer(inference_pb2_grpc.InferenceServicer):  # type: ignore[misc]
    """For clients."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    @streaming
    async def Generate(self, request: Any, context: Any) -> AsyncIterator[Event]:
        deadline = context.time_remaining()
        async for event in self._scheduler.generate(request, deadline):
            yield event

    @streaming
    async def Resume(self, request: Any, context: Any) -> AsyncIterator[Event]:
        validate.check_request_id(request.request_id)
        async for event in self._scheduler.follow(request.request_id, request.from_index):
            yield event

    @unary
    async def Cancel(self, request: Any, context: Any) -> inference_pb2.CancelResponse:
        validate.check_request_id(request.request_id)
        was_running = self._scheduler.cancel(request.request_id)
        return inference_pb2.CancelResponse(was_running=was_running)

    @unary
    async def ListModels(self, request: Any, context: Any) -> inference_pb2.ListModelsResponse:
        config = self._scheduler.identity.config
        model = inference_pb2.Model(
            id=self._scheduler.model, architecture=config.architecture,
            max_context=config.max_context, vocab_size=config.vocab_size,
            fingerprint=self._scheduler.identity.fingerprint,
        )  # fmt: skip
        return inference_pb2.ListModelsResponse(models=[model])


class ClusterServicer(cluster_pb2_grpc.ClusterServicer):  # type: ignore[misc]
    """For whoever wants to look."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    @unary
    async def GetView(self, request: Any, context: Any) -> cluster_pb2.ClusterView:
        return await self._scheduler.view(os.getpid())


class ControlServicer(control_pb2_grpc.ControlServicer):  # type: ignore[misc]
    """For workers: one stream each, whose end is the first sign of a death."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    @streaming
    async def Attach(self, requests: Any, context: Any) -> AsyncIterator[control_pb2.WorkerCommand]:
        first = await anext(requests)
        _check_role(caller(context), first.register.worker.role)
        commands = self._scheduler.attach(first.register)
        worker_id = first.register.worker.worker_id
        listening = asyncio.create_task(self._listen(requests, worker_id, commands))
        try:
            while (command := await commands.get()) is not None:
                yield command
        finally:
            listening.cancel()
            self._scheduler.detach(worker_id, commands)

    async def _listen(
        self, requests: Any, worker_id: str,
        commands: asyncio.Queue[control_pb2.WorkerCommand | None],
    ) -> None:  # fmt: skip
        try:
            async for event in requests:
                self._scheduler.heard(worker_id, event)
        finally:
            self._scheduler.detach(worker_id, commands)
            commands.put_nowait(None)


def _check_role(certified: str, role: int) -> None:
    """A worker with a certificate may only be what that says. Raises Forbidden."""
    name = cluster_pb2.Role.Name(role).removeprefix("ROLE_").lower()
    if certified and certified != name:
        raise Forbidden(f"certificate: a {certified} may not register as {name}")
