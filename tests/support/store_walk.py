"""A store world in which anything can happen next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from services.ops.errors import Overloaded
from tests.support.kv_world import Choose
from tests.support.store_actors import FAMILIES
from tests.support.store_world import StoreWorld


@dataclass
class StoreWalk:
    """A store world that goes from one possible event to the next; `choose` takes every decision."""

    world: StoreWorld
    restarts: bool = True
    tiers_and_time: bool = True
    story: list[str] = field(default_factory=list)

    def step(self, choose: Choose) -> None:
        act = choose(self.acts())
        self.story.append(act.__name__)

        def noting(options: Sequence[Any]) -> Any:
            choice = choose(options)
            self.story[-1] += f" {choice}" if isinstance(choice, str | int) else " ..."
            return choice

        try:
            act(noting)
        except Overloaded:
            self.story[-1] += " (no room)"
        self.world.check()

    def acts(self) -> list[Any]:
        world = self.world
        acts: list[Any] = [self.restart] * self.restarts
        if len(world.asked) + len(world.opening) < 3:
            acts += [self.open] * 2
        if world.asked:
            acts += [self.compute, self.decode] * 3
            acts += [self.move_prefill, self.move_decode, self.publish, self.release]
        if any(worker.alive for worker in world.workers.values()):
            acts += [self.dies]
        if world.zombies():
            acts += [self.stops] + [self.wakes] * 2
        if self.tiers_and_time:
            acts += [self.passes, self.renew, self.pin, self.unpin]
        if world.tiers:
            acts += [self.write_back, self.evict]
            acts += [self.disk_works] * (4 if world.tiers.threads.jobs else 0)
        return acts

    def _one(self, choose: Choose) -> str:
        return str(choose(sorted(self.world.asked)))

    def open(self, choose: Choose) -> None:
        prompt, new = choose([1, 64, 65, 100, 128, 190]), choose([0, 1, 2, 40, 100])
        open_now = self.world.begin_open if self.world.tiers else self.world.open
        open_now(choose(FAMILIES), prompt, new, choose(["p0", "p1"]), choose(["d0", "d1"]))

    def evict(self, choose: Choose) -> None:
        """Somebody needed the room, for a moment."""
        blocks = self.world.store.begin_fill(choose([2, 100]), [])
        self.world.store.end_fill([], blocks, [])

    def passes(self, choose: Choose) -> None:
        """Mostly the scheduler renews in time; sometimes it is away, or the store is stopped."""
        seconds = choose([0.5, 2.0, 4.0, 11.0, -300.0])
        if seconds < 0:
            self.world.stands_still(-seconds)
        else:
            self.world.passes(seconds)

    def renew(self, choose: Choose) -> None:
        self.world.renew()

    def pin(self, choose: Choose) -> None:
        self.world.pin(choose(["a", "b"]), choose(FAMILIES), choose([1, 2]))

    def unpin(self, choose: Choose) -> None:
        self.world.unpin(choose(["a", "b"]))

    def write_back(self, choose: Choose) -> None:
        assert self.world.tiers
        self.world.tiers.write_back()

    def disk_works(self, choose: Choose) -> None:
        """One of its jobs: until now whatever else could happen has happened."""
        assert self.world.tiers
        self.world.tiers.work()
        self.world.arrive()

    def compute(self, choose: Choose) -> None:
        self.world.compute(self._one(choose), choose([64, 128, 190, 191]))

    def decode(self, choose: Choose) -> None:
        request_id = self._one(choose)
        self.world.compute(request_id, 191)
        self.world.decode(request_id, choose([0, 1, 27, 28, 40, 100]))

    def move_prefill(self, choose: Choose) -> None:
        request_id = self._one(choose)
        if choose([True, False]):
            self.world.dies(self.world.asked[request_id].prefill.worker)
        self.world.move_prefill(request_id, choose(["p0", "p1", "p2"]))

    def move_decode(self, choose: Choose) -> None:
        request_id = self._one(choose)
        asked = self.world.asked[request_id]
        if asked.decode is None:
            return
        if choose([True, False]):
            self.world.dies(asked.decode.worker)
        self.world.move_decode(request_id, choose(["d0", "d1", "d2"]))

    def publish(self, choose: Choose) -> None:
        self.world.publish(self._one(choose))

    def release(self, choose: Choose) -> None:
        self.world.release(
            self._one(choose), keep=choose([True, True, False]), stopped=choose([True, False])
        )

    def stops(self, choose: Choose) -> None:
        self.world.stops(choose(self.world.zombies()))

    def wakes(self, choose: Choose) -> None:
        self.world.wakes(choose(self.world.zombies()))

    def dies(self, choose: Choose) -> None:
        self.world.dies(choose([w for w in self.world.workers.values() if w.alive]))
        self.world.store.sweep()

    def restart(self, choose: Choose) -> None:
        self.world.restart()
