"""What goes wrong, and when. Each seed draws its own mix: some runs know only crashes, some only a bad
network, some everything at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from services.kv.arena import SEALED
from tests.sim.hub import Process

if TYPE_CHECKING:
    from tests.sim.world import World

FAULTS_S = 4.0  # from then on nothing goes wrong any more


class Faults:
    """Draws faults until `FAULTS_S`, then mends everything."""

    def __init__(self, world: World) -> None:
        self.world, self.hub, self.rng = world, world.hub, world.hub.rng
        kinds: list[Callable[[], None]] = [
            self.kill_worker, self.kill_worker, self.kill_store, self.kill_scheduler, self.pause,
            self.pause, self.kill_within, self.pause_within, self.cut, self.cut, self.part,
            self.drop_frames, self.torn_journal, self.skew, self.kill_store_within,
        ]  # fmt: skip
        self.kinds = [kind for kind in kinds if self.rng.random() < 0.5]
        self.every_s = self.rng.choice([0.1, 0.3, 0.8, 2.0])
        self.healed = False
        net = world.net
        net.loss = self.rng.choice([0.0, 0.0, 0.02, 0.15])
        net.slow = self.rng.choice([0.0, 0.0, 0.02, 0.1])
        if self.rng.random() < 0.1:
            self.kinds.append(self.corrupt)
        if self.kinds:
            self._next()
        self.hub.after(FAULTS_S, self.heal)

    def _next(self) -> None:
        self.hub.after(self.rng.expovariate(1 / self.every_s), self._strike)

    def _strike(self) -> None:
        if self.healed:
            return
        kind = self.rng.choice(self.kinds)
        kind()
        self._next()

    def _did(self, what: str, where: str) -> None:
        self.hub.counts[what] += 1
        self.hub.tell("fault", f"{what}: {where}")

    def _up(self, processes: list[Process]) -> list[Process]:
        return [process for process in processes if process.alive]

    # --- crashes ---

    def _crash(self, process: Process, what: str) -> None:
        self._did(what, process.name)
        if process.alive:
            process.kill()

    def kill_worker(self) -> None:
        worker = self.rng.choice(self.world.workers)
        if worker.alive:
            self._crash(worker, f"{worker.role} killed")

    def kill_store(self) -> None:
        store = self.rng.choice(self.world.stores)
        if store.alive:
            self._crash(store, "store killed")

    def kill_store_within(self) -> None:
        store = self.rng.choice(self.world.stores)
        if store.alive:
            store.doomed = True

    def kill_scheduler(self) -> None:
        if self.world.scheduler.alive:
            self._crash(self.world.scheduler, "scheduler killed")

    def kill_within(self) -> None:
        """It dies in the midst of a step or a layer group."""
        worker = self.rng.choice(self.world.workers)
        if worker.runs:
            worker.doomed = "kill"

    def torn_journal(self) -> None:
        if self.world.scheduler.runs:
            self.world.scheduler.disk.torn = self.rng.random()

    # --- pauses ---

    def pause(self) -> None:
        everybody: list[Process] = [*self.world.workers * 2, *self.world.stores]
        everybody.append(self.world.scheduler)
        process = self.rng.choice(everybody)
        if process.runs:
            self._did("paused", process.name)
            process.pause()
            self.hub.after(
                self.rng.choice([0.05, 0.5, 1.0, 2.5]), lambda: self._resume(process, process.life)
            )

    @staticmethod
    def _resume(process: Process, life: int) -> None:
        if process.life == life and process.paused:
            process.resume()

    def pause_within(self) -> None:
        """It is paused between two writes, and wakes up as if nothing had happened."""
        worker = self.rng.choice(self.world.workers)
        if worker.runs:
            worker.doomed = "pause"

    # --- the network ---

    def cut(self) -> None:
        links = self.world.net.links
        if links:
            link = self.rng.choice(links)
            self._did("link cut", " - ".join(end.process.name for end in link.ends))
            link.cut()

    def part(self) -> None:
        """Two processes cannot reach each other for a while."""
        scheduler, others = self.world.scheduler, [*self.world.workers, *self.world.stores]
        one: Process = self.rng.choice([scheduler, scheduler, *self.world.workers])
        other: Process = self.rng.choice([p for p in others if p is not one])
        if isinstance(one, type(self.world.workers[0])) and other not in self.world.stores:
            other = scheduler
        self._did("partition", f"{one.name} | {other.name}")
        self.world.net.part(one.name, other.name)
        names = (one.name, other.name)
        self.hub.after(self.rng.choice([0.1, 0.5, 1.5]), lambda: self.world.net.heal(*names))

    def drop_frames(self) -> None:
        """A ZeroMQ connection breaks with all that is under way on it."""
        worker = self.rng.choice([*self.world.workers, *self.world.stores])
        store = self.rng.choice(self.world.stores)
        self.world.wires.cut(worker.name, store.name)
        self._did("frames dropped", f"{worker.name} - {store.name}")

    # --- the rest ---

    def skew(self) -> None:
        """The wall clock is set."""
        self.hub.skew += self.rng.choice([-2.0, -0.3, 0.3, 2.0])
        self._did("clock set", f"{self.hub.skew:+.1f} s")

    def corrupt(self) -> None:
        """A byte of a sealed page flips."""
        store = self.rng.choice(self.world.stores)
        if not store.alive:
            return
        sealed = [i for i, s in enumerate(store.arena.headers["state"]) if s == SEALED]
        if sealed:
            page = store.arena.page(self.rng.choice(sealed))
            flat = page.reshape(-1)
            flat[self.rng.randrange(len(flat))] ^= 1 << self.rng.randrange(16)
            self._did("page corrupted", store.name)

    # --- mending ---

    def restart(self, process: Process) -> None:
        """Whoever has died comes back, as the supervisor would have it."""
        delay = self.rng.choice([0.01, 0.05, 0.3, 1.0])
        life = process.life
        self.hub.after(delay, lambda: process.start() if process.life == life else None)

    def heal(self) -> None:
        self.healed = True
        self.hub.tell("fault", "no more")
        net = self.world.net
        net.apart.clear()
        net.loss = net.slow = 0.0
        self.world.scheduler.disk.torn = None
        for store in self.world.stores:
            store.doomed = False
        for worker in self.world.workers:
            worker.doomed = ""
        for process in self.world.processes():
            if process.alive and process.paused:
                process.resume()
