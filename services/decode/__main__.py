"""`python -m services.decode`: a decode worker."""

from __future__ import annotations

import asyncio
import sys

import zmq

from baton.v1 import cluster_pb2, control_pb2
from services.decode.config import DecodeConfig
from services.decode.engine_loop import DecodeEngine
from services.decode.stream import Report, as_event
from services.engine.identity import digest_of
from services.engine.load import load_engine
from services.kv.worker import ArenaHold, join
from services.ops import config, lifecycle, log
from services.ops.errors import BatonError
from services.ops.keys import Keys
from services.ops.keys import load as load_keys
from services.wire import sockets
from services.wire.link import SchedulerLink
from services.wire.stream import Announce, unpack
from services.wire.worker import attached, registration

_logger = log.get("decode")
ANNOUNCERS = frozenset({"prefill", "kv-store"})


class DecodeWorker:
    """Translates between the scheduler's commands, the announcements and the engine thread."""

    def __init__(self, settings: DecodeConfig, hold: ArenaHold, keys: Keys | None) -> None:
        self._settings, self._hold = settings, hold
        self._loop = asyncio.get_running_loop()
        self._link: SchedulerLink | None = None
        self._context = sockets.async_context(keys=keys)
        self._socket = sockets.listener(self._context, zmq.PULL, ANNOUNCERS)
        self._socket.bind(settings.announce_listen)
        self._address = sockets.bound_address(self._socket, settings.announce_advertise)
        backend = load_engine(settings, hold.identity, hold.arena, settings.decode_device)
        self.engine = DecodeEngine(settings, hold.arena, backend, self._report)

    def use(self, link: SchedulerLink) -> None:
        self._link = link

    def register(self) -> control_pb2.Register:
        running = [
            control_pb2.RunningStream(request_id=request_id, epoch=epoch)
            for request_id, epoch in list(self.engine.running.items())
        ]
        return registration(
            self._settings, self._hold, cluster_pb2.ROLE_DECODE, self._address, running
        )

    def command(self, command: control_pb2.WorkerCommand) -> None:
        kind = command.WhichOneof("command")
        if kind == "decode":
            self.engine.submit(command.decode)
        elif kind == "stop":
            self.engine.submit(command.stop)

    async def listen(self) -> None:
        """Wakes the engine at each announcement; what is ready it reads in the arena itself."""
        while True:
            message = await self._socket.recv()
            try:
                announced = unpack(message)
            except BatonError as error:
                _logger.warning("announcement refused", reason=error.message)
                continue
            mine = bytes.fromhex(self._hold.identity.fingerprint)
            if isinstance(announced, Announce) and announced.fingerprint == mine:
                self.engine.announced()

    def _report(self, report: Report) -> None:
        self._loop.call_soon_threadsafe(self._send, report)

    def _send(self, report: Report) -> None:
        assert self._link is not None
        self._link.steps, self._link.fenced = self.engine.steps, self.engine.fenced
        self._link.send(as_event(report))

    def close(self) -> None:
        self.engine.close()
        self._context.destroy(linger=0)


async def serve(settings: DecodeConfig) -> None:
    """Runs the worker until it is told to stop."""
    stopping = lifecycle.stop_event()
    keys = load_keys(settings.keys_dir, "decode")
    hold = join(settings.arena_dir, settings.model, settings.prefill_device, settings.decode_device)
    worker = DecodeWorker(settings, hold, keys)
    worker.engine.start()
    listening = asyncio.create_task(worker.listen())
    await attached(
        settings, stopping, worker.register, worker.command, keys=keys, link_ready=worker.use,
        streams=lambda: len(worker.engine.running),
        others=[listening],
    )  # fmt: skip
    worker.close()


def prepare() -> None:
    """What a spare does ahead: reads the weights' identity, which takes longer the larger they are."""
    digest_of(config.load(DecodeConfig).model)


def main() -> int:
    settings = config.load(DecodeConfig)
    log.configure(settings.name, settings.log_level)
    lifecycle.pin(settings.cores)
    return lifecycle.run(lambda: serve(settings))


if __name__ == "__main__":
    sys.exit(main())
