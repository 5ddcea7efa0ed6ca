"""Workers that are to let go of a request: whom the scheduler has told so, and who has answered.

A store holds pages back for as long as somebody may still write to them. So every Stop is remembered
until its answer is here, and said again to a worker that comes back. What a worker that comes back
does not work on, it has let go of: that is told to the stores at every registration, so what has been
forgotten here, or was lost on the way, is made good then. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from baton.v1 import store_pb2
from services.scheduler import orders
from services.scheduler.books import Books
from services.scheduler.request import CallStore, Phase, Request, WorkerInfo

STOPS_MAX = 10_000  # unanswered stops that are remembered
STOP_KEEP_S = 600.0  # for a worker that is away


@dataclass
class Stop:
    """The epoch up to which a worker is to let go; since when it has been away."""

    epoch: int
    away_since: float | None = None


class Stops:
    """Unanswered stops, by (request, worker)."""

    def __init__(self, books: Books) -> None:
        self._books = books
        self._waiting: dict[tuple[str, str], Stop] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def tell(self, request_id: str, worker_id: str, epoch: int) -> None:
        """Tells a worker to let go of a request, and remembers it until it has answered."""
        if not worker_id:
            return  # it has refused, and is nobody's any more
        stop = self._waiting.setdefault((request_id, worker_id), Stop(epoch))
        stop.epoch = max(stop.epoch, epoch)
        self._books.send(worker_id, orders.stop(request_id, stop.epoch))
        while len(self._waiting) > STOPS_MAX:
            del self._waiting[next(iter(self._waiting))]

    def waited_for(self, request_id: str, workers: Iterable[str]) -> None:
        """A store cannot free all that a request held before these have spoken. One whom nobody has
        told is told now: after a restart only the store may know him."""
        for worker_id in workers:
            self.awaited(request_id, worker_id, self._books.epoch)

    def awaited(self, request_id: str, worker_id: str, epoch: int) -> None:
        """The same of one worker, up to an epoch; what it has now is not meant."""
        request = self._books.requests.get(request_id)
        if request and request.phase is Phase.RECOVERING:
            return  # what it has now is not known yet
        present = request.epoch_of(worker_id) if request else 0
        upto = min(epoch, present - 1) if present else epoch
        told = self._waiting.get((request_id, worker_id))
        if told is None or told.epoch < upto:
            self.tell(request_id, worker_id, upto)

    def tick(self, now: float) -> None:
        """Forgets what has waited too long for a worker that is away: if it ever comes back, its
        registration settles the same."""
        for key, stop in list(self._waiting.items()):
            if key[1] in self._books.workers:
                stop.away_since = None
            elif stop.away_since is None:
                stop.away_since = now
            elif now - stop.away_since >= STOP_KEEP_S:
                del self._waiting[key]

    def repeat(self, worker_id: str) -> None:
        """A worker is back: what it was told may be lost. It answers again."""
        for (request_id, stopping), stop in self._waiting.items():
            if stopping == worker_id:
                self._books.send(worker_id, orders.stop(request_id, stop.epoch))

    def answered(self, request_id: str, worker_id: str, epoch: int) -> None:
        """The worker has let go of what it got for this request up to this epoch."""
        info = self._books.workers.get(worker_id)
        if info and info.running.get(request_id, epoch + 1) <= epoch:
            del info.running[request_id]
        stop = self._waiting.get((request_id, worker_id))
        if stop is not None and stop.epoch <= epoch:
            del self._waiting[request_id, worker_id]
        message = store_pb2.RetireRequest(request_id=request_id, writer=worker_id, epoch=epoch)
        request = self._books.requests.get(request_id)
        its = [store for store in request.stores if store] if request else []
        for store in dict.fromkeys([*self._books.ingest, *its]):  # it may not have been seen yet
            self._books.call(request_id, store, "Retire", message)

    def foreign(self, info: WorkerInfo) -> None:
        """Stops what a worker that registers runs and what is nobody's any more, or another's."""
        for request_id in info.running:
            request = self._books.requests.get(request_id)
            recovering = request is not None and request.phase is Phase.RECOVERING
            if not recovering and not (request and request.epoch_of(info.worker_id)):
                self.tell(request_id, info.worker_id, self._books.epoch)

    def settle(self, info: WorkerInfo) -> list[CallStore]:
        """What it does not work on, it has let go of: its word may have been lost, with a link or with
        the scheduler before this one. What it has got since is not meant: a store may hear of
        this late; nor what it was asked again since, and has yet to answer the Stop for. Of what is its
        own now, it lets go of the epochs before."""
        mine = [r for r in self._books.requests.values() if self._present(r, info.worker_id)]
        for request in mine:
            self.tell_before(request, info.worker_id)
        told = [
            request_id for request_id, worker_id in self._waiting if worker_id == info.worker_id
        ]
        running = {*info.running, *(request.request_id for request in mine), *told}
        message = store_pb2.RetireRequest(
            writer=info.worker_id, still_running=sorted(running), epoch=info.epoch
        )
        return [CallStore("", store, "Retire", message) for store in self._books.ingest]

    @staticmethod
    def _present(request: Request, worker_id: str) -> bool:
        if request.phase is Phase.RECOVERING:  # which epoch it has is not known yet
            return worker_id in (request.prefill_worker, request.decode_worker)
        return bool(request.epoch_of(worker_id))

    def tell_before(self, request: Request, worker_id: str) -> None:
        """It lets go of all that it got for this request before what it has now."""
        epoch = request.epoch_of(worker_id)
        if epoch:
            self.tell(request.request_id, worker_id, epoch - 1)

    def recovered(self, request: Request, placed: set[str]) -> None:
        """Where the request stands is known again: workers that are back let go of all that is not
        theirs. `placed`: who had it as far as the journal knew."""
        for info in self._books.workers.values():
            if request.epoch_of(info.worker_id):
                self.tell_before(request, info.worker_id)
            elif request.request_id in info.running or info.worker_id in placed:
                self.tell(request.request_id, info.worker_id, self._books.epoch)
