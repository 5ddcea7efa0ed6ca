"""One cluster, one seed: everything from the first request to the last page given back."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import services.decode.engine_loop as decode_module
import services.decode.stream as stream_module
import services.kv_store.runtime as store_module
import services.prefill.engine_loop as prefill_module
import services.scheduler.runtime as scheduler_module
from tests.sim.checker import Checker
from tests.sim.client import Client
from tests.sim.faults import FAULTS_S, Faults
from tests.sim.hub import Hub, Process, Violation
from tests.sim.medium import Wires
from tests.sim.net import Net
from tests.sim.scheduler import SchedulerProcess
from tests.sim.store import StoreProcess
from tests.sim.workers import DECODE, PREFILL, WORKERS, WorkerProcess

REST_S = 60.0  # by then everything must have come to rest
LOOK_S = 0.25
CLOCKS = (
    scheduler_module, prefill_module, decode_module, stream_module, store_module,
)  # fmt: skip
PROMPTS = (1, 5, 62, 63, 64, 65, 100, 127, 128, 129, 190)


class World:
    """Everybody, and what each seed makes of them."""

    def __init__(self, seed: int, directory: Path, verbose: bool = False) -> None:
        self.hub = Hub(seed, verbose)
        self.directory = directory
        self.net = Net(self.hub)
        self.wires = Wires(self.net)
        self.workers: list[WorkerProcess] = []
        self.clients: list[Client] = []
        self.stores: list[StoreProcess] = []

    def build(self) -> None:
        rng = self.hub.rng
        stores = rng.choice([1, 1, 2])
        for n in range(stores):
            path = self.directory / f"s{n}"
            self._mortal(store := StoreProcess(self.hub, f"s{n}", path, self.wires))
            self.stores.append(store)
        self.scheduler = SchedulerProcess(self.hub, self.stores, self.net)
        self._mortal(self.scheduler)
        self.checker = Checker(self)
        self.scheduler.asked = self.checker.called
        for role, count in ((PREFILL, rng.choice([1, 2])), (DECODE, rng.choice([2, 2, 3]))):
            for n in range(count):
                home = self.stores[n % stores]
                worker = WORKERS[role](
                    self.hub, f"{role}-{n}", home, self.scheduler, self.net, self.wires
                )
                self._mortal(worker)
                self.workers.append(worker)
        for n in range(rng.choice([2, 4, 7])):
            self._client(n)
        self.hub.checks.append(self.checker.after)
        self.faults = Faults(self)

    def _mortal(self, process: Process) -> None:
        """Whoever dies is started again."""
        ended = process.ended

        def dies() -> None:
            ended()
            self.faults.restart(process)

        process.ended = dies  # type: ignore[method-assign]

    def _client(self, number: int) -> None:
        rng = self.hub.rng
        family = rng.choice([1, 2])  # of one family, one prompt begins as the other does
        prompt = [(family * 31 + at * 7) % 60 + 1 for at in range(rng.choice(PROMPTS))]
        tokens = rng.choice([1, 2, 3, 6, 12, 30])
        ends: dict[str, Any] = rng.choice(
            [{}, {}, {}, {"stop_at": tokens // 2}, {"stop_text_at": tokens // 2}]
        )
        leaving: dict[str, Any] = rng.choice(
            [{}, {}, {}, {"cancel_s": rng.uniform(0, 2)}, {"leave_s": rng.uniform(0, 2)},
             {"deadline_s": rng.uniform(0.05, 3)}]
        )  # fmt: skip
        client = Client(
            self.hub, f"r{number}", self.scheduler, self.net, prompt, tokens,
            tenant=rng.choice(["", "", "t"]), **ends, **leaving,
        )  # fmt: skip
        self.clients.append(client)
        self.hub.after(rng.uniform(0.0, FAULTS_S * 0.75), client.start)

    def processes(self) -> list[Process]:
        return [*self.stores, self.scheduler, *self.workers]

    # --- the run ---

    def run(self) -> None:
        """Raises Violation."""
        self.build()
        self.hub.run(FAULTS_S)
        while why := self.checker.unquiet() if self._all_up() else "somebody is still down":
            if self.hub.now > REST_S:
                raise Violation(f"it does not come to rest: {why}")
            self.hub.run(self.hub.now + LOOK_S)
        self.checker.ended_once()

    def _all_up(self) -> bool:
        return all(process.runs for process in self.processes())

    def close(self) -> None:
        """Nothing of it stays open."""
        self.hub.checks.clear()
        for process in self.processes() if hasattr(self, "scheduler") else self.stores:
            if process.alive:
                process.ended = type(process).ended.__get__(process)  # type: ignore[method-assign]
                process.kill()


@contextmanager
def virtual(world: World) -> Iterator[None]:
    """The services see the world's time and network instead of the machine's."""
    hub = world.hub
    clock = SimpleNamespace(
        monotonic=lambda: hub.now, time=lambda: hub.unix_s, time_ns=lambda: int(hub.unix_s * 1e9)
    )

    with ExitStack() as stack:
        for module in CLOCKS:
            stack.enter_context(patch.object(module, "time", clock))
        stack.enter_context(patch.object(prefill_module, "ZmqMedium", world.wires.medium))
        yield


def run_seed(seed: int, scratch: Path, verbose: bool = False) -> World:
    """Raises Violation, or whatever the services raise."""
    shutil.rmtree(scratch, ignore_errors=True)
    world = World(seed, scratch, verbose)
    with virtual(world):
        try:
            world.run()
        finally:
            world.close()
            shutil.rmtree(scratch, ignore_errors=True)
    return world
