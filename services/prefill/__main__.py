"""`python -m services.prefill`: a prefill worker."""

from __future__ import annotations

import asyncio
import sys

from baton.v1 import cluster_pb2, control_pb2
from services.engine.load import load_engine
from services.kv.worker import ArenaHold, join
from services.ops import config, lifecycle, log
from services.ops.keys import Keys
from services.ops.keys import load as load_keys
from services.prefill.config import PrefillConfig
from services.prefill.engine_loop import PrefillEngine
from services.wire.link import SchedulerLink
from services.wire.worker import attached, registration


class PrefillWorker:
    """Translates between the scheduler's commands and the engine thread."""

    def __init__(self, settings: PrefillConfig, hold: ArenaHold, keys: Keys | None) -> None:
        self._settings, self._hold = settings, hold
        self._loop = asyncio.get_running_loop()
        self._link: SchedulerLink | None = None
        backend = load_engine(settings, hold.identity, hold.arena, settings.prefill_device)
        self.engine = PrefillEngine(settings, hold.arena, backend, self._report, keys)

    def use(self, link: SchedulerLink) -> None:
        self._link = link

    def register(self) -> control_pb2.Register:
        running = [
            control_pb2.RunningStream(request_id=request_id, epoch=attempt)
            for request_id, attempt in list(self.engine.jobs)
        ]
        return registration(self._settings, self._hold, cluster_pb2.ROLE_PREFILL, "", running)

    def command(self, command: control_pb2.WorkerCommand) -> None:
        kind = command.WhichOneof("command")
        if kind == "prefill":
            self.engine.submit(command.prefill)
        elif kind == "stop":
            self._stop(command.stop)
        elif kind == "move":
            for job in self.engine.of(command.move.request_id):
                job.announce = command.move.announce_address

    def _stop(self, stop: control_pb2.StopRequest) -> None:
        if self.engine.stop(stop.request_id, stop.epoch):
            return  # said when it has come to its end
        stopped = control_pb2.Stopped(request_id=stop.request_id, epoch=stop.epoch)
        self._report(control_pb2.WorkerEvent(stopped=stopped))

    def _report(self, event: control_pb2.WorkerEvent) -> None:
        assert self._link is not None
        self._loop.call_soon_threadsafe(self._link.send, event)


async def serve(settings: PrefillConfig) -> None:
    """Runs the worker until it is told to stop."""
    stopping = lifecycle.stop_event()
    keys = load_keys(settings.keys_dir, "prefill")
    hold = join(settings.arena_dir, settings.model, settings.prefill_device, settings.decode_device)
    worker = PrefillWorker(settings, hold, keys)
    worker.engine.start()
    await attached(
        settings, stopping, worker.register, worker.command, keys=keys, link_ready=worker.use,
        streams=lambda: len(worker.engine.jobs),
    )  # fmt: skip
    worker.engine.close()


def main() -> int:
    settings = config.load(PrefillConfig)
    log.configure(settings.name, settings.log_level)
    lifecycle.require_core(settings.io_core, "io_core")
    lifecycle.pin(settings.cores)
    return lifecycle.run(lambda: serve(settings))


if __name__ == "__main__":
    sys.exit(main())
