"""A fake cluster in which anything can happen next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.support.fake_cluster import FakeCluster
from tests.support.fake_worker import FakeWorker

Choose = Callable[[Sequence[Any]], Any]


@dataclass
class ClusterWalk:
    """A cluster in which anything can happen next; `choose` takes every decision."""

    cluster: FakeCluster
    choose: Choose
    story: list[str] = field(default_factory=list)
    asked: int = 0
    restarts: bool = True  # of the scheduler

    def step(self) -> None:
        """Mostly something that was on its way, sometimes a fault."""
        acts = self.cluster.possible()
        if acts and self.choose(range(6)):
            self.choose(acts)()
        else:
            fault = self.choose(self._faults())
            self.story.append(fault.__name__)
            fault()

    def _faults(self) -> list[Callable[[], None]]:
        faults = [self.time, self.time, self.kill, self.pause, self.resume, self.cut, self.mend]
        restarts = [self.restart] if self.restarts else []
        return [*faults, self.ask, self.ask, self.cancel, self.leave, self.corrupt, *restarts]

    def _note(self, what: object) -> None:
        self.story[-1] += f" {what}"

    def _worker(self, fits: Callable[[FakeWorker], bool]) -> FakeWorker | None:
        able = [worker for worker in self.cluster.workers.values() if fits(worker)]
        worker: FakeWorker | None = self.choose(able) if able else None
        self._note(worker.name if worker else "nobody")
        return worker

    def _request(self) -> str | None:
        open_now = [r for r, request in self.cluster.scheduler.requests.items() if not request.done]
        name: str | None = self.choose(open_now) if open_now else None
        self._note(name)
        return name

    def ask(self) -> None:
        if self.asked == 5:
            return
        self.asked += 1
        ends = self.choose([{}, {}, {"stop_at": self.choose(range(4))}, {"stop_token_at": 2}])
        tokens = self.choose([1, 2, 3, 6])
        self._note(f"r{self.asked} {tokens} {ends}")
        self.cluster.ask(
            f"r{self.asked}", max_tokens=tokens, reader=self.choose([True, True, False]),
            deadline_s=self.choose([None, None, 0.5]), **ends,
        )  # fmt: skip

    def time(self) -> None:
        seconds = self.choose([0.05, 0.3, 1.0])
        self._note(seconds)
        self.cluster.pass_time(seconds)

    def kill(self) -> None:
        worker = self._worker(lambda w: w.alive)
        if worker:
            self.cluster.kill(worker.name)
            self.cluster.start(worker.name)

    def pause(self) -> None:
        worker = self._worker(lambda w: w.runs)
        if worker:
            worker.paused = True

    def resume(self) -> None:
        worker = self._worker(lambda w: w.paused)
        if worker:
            worker.paused = False

    def cut(self) -> None:
        worker = self._worker(lambda w: w.attached)
        if worker:
            self.cluster.detach(worker, noticed=self.choose([True, False]))

    def mend(self) -> None:
        worker = self._worker(lambda w: w.runs and not w.attached)
        if worker:
            self.cluster.attach(worker)

    def cancel(self) -> None:
        request_id = self._request()
        if request_id:
            state = self.cluster.scheduler
            self.cluster.run(state.cancel(self.cluster.now, request_id, "cancelled"))

    def leave(self) -> None:
        request_id = self._request()
        if request_id and self.cluster.scheduler.requests[request_id].readers:
            self.cluster.run(self.cluster.scheduler.reader_left(self.cluster.now, request_id))

    def corrupt(self) -> None:
        request_id = self._request()
        if request_id:
            self.cluster.corrupt.add(request_id)

    def restart(self) -> None:
        """Some of the workers are back at once, some of the readers come back."""
        self.cluster.restart_scheduler(compact=self.choose([True, False]))
        for request_id, request in self.cluster.scheduler.requests.items():
            if not request.done and self.choose([True, True, False]):
                self.cluster.scheduler.reader_joined(request_id)
        for worker in list(self.cluster.workers.values()):
            if worker.runs and self.choose([True, False]):
                self.cluster.attach(worker)

    def end(self) -> None:
        """No more faults: everybody is back, everything comes to its end and nothing is left."""
        cluster = self.cluster
        cluster.corrupt.clear()
        for worker in cluster.workers.values():
            worker.paused = False
        cluster.reattach()
        rounds = 0
        while rounds < 5 or (rounds < 50 and cluster.unfinished()):
            cluster.settle()
            cluster.pass_time(0.2)
            rounds += 1
        cluster.settle()
        cluster.check_quiet()
