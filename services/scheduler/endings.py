"""How a request ends, exactly once, and how its pages and workers are let go of. Pure."""

from __future__ import annotations

from baton.v1 import inference_pb2, store_pb2
from services.scheduler import orders, timing
from services.scheduler.books import Books
from services.scheduler.request import Phase, Request
from services.scheduler.stops import Stops

CANCELLED = inference_pb2.FINISH_REASON_CANCELLED


class Endings:
    """Final events, and releases."""

    def __init__(self, books: Books, stops: Stops) -> None:
        self._books, self._stops = books, stops

    def end(
        self, request: Request, now: float, reason: inference_pb2.FinishReason,
        finished_by: str = "",
    ) -> None:  # fmt: skip
        """The one way a request ends well. `finished_by` has stopped writing by itself."""
        assert not request.done
        books = self._books
        if reason == CANCELLED:
            books.counts.cancelled += 1
        else:
            books.counts.finished += 1
        finished = inference_pb2.Finished(
            reason=reason, usage=timing.usage(request),
            timing=timing.timing(
                request, now, books.name(request.prefill_worker), books.name(request.decode_worker)
            ),
        )  # fmt: skip
        event = inference_pb2.GenerateEvent(request_id=request.request_id, finished=finished)
        self._conclude(request, now, event, finished_by)

    def fail(
        self, request: Request, now: float, code: str, message: str, *, retryable: bool
    ) -> None:
        """The one way a request ends badly."""
        assert not request.done
        self._books.counts.failed += 1
        failed = inference_pb2.Failed(
            code=code, message=message, retryable=retryable, story=request.story
        )
        event = inference_pb2.GenerateEvent(request_id=request.request_id, failed=failed)
        self._conclude(request, now, event, "")

    def _conclude(
        self, request: Request, now: float, event: inference_pb2.GenerateEvent, finished_by: str
    ) -> None:
        if request.phase is not Phase.WAITING and request.decode_store:
            self.release(request, keep=True, finished_by=finished_by)
        request.phase = Phase.DONE
        request.final = event
        request.orphan_at = None
        request.forget_at = now + request.retain_s
        self._books.write(orders.ended(request))
        self._books.notify(request)

    def expire(self, request: Request, now: float) -> None:
        """Time has passed: deadlines, orphans, and forgetting."""
        if request.done:
            over = request.forget_at is not None and now >= request.forget_at
            if over and not request.readers:
                del self._books.requests[request.request_id]
                self._books.forgotten += 1
        elif request.deadline_at is not None and now >= request.deadline_at:
            request.tell("deadline passed")
            self.end(request, now, CANCELLED)
        elif request.orphan_at is not None and now >= request.orphan_at:
            request.tell("no reader")
            self.end(request, now, CANCELLED)

    def release(self, request: Request, *, keep: bool, finished_by: str = "") -> None:
        """Tells the workers to stop and gives the pages back; those that a worker may still write
        to wait in quarantine until it has said so. They are told to let go of all that they have got
        until now: a reassignment may be under way whose answer will not be waited for."""
        if request.phase is Phase.RECOVERING:
            self._release_unknown(request, keep=keep)
            return
        live = [] if request.prefill_stopped else [request.prefill_worker]
        if request.decode_told and finished_by != request.decode_worker:
            live.append(request.decode_worker)
        fenced = [getattr(request, f"{role}_worker") for role in request.moving]
        for worker in dict.fromkeys([*live, *fenced]):
            self._stops.tell(request.request_id, worker, self._books.epoch)
        for store in request.stores:
            self.release_store(request, store, keep=keep, live=live)

    def _release_unknown(self, request: Request, *, keep: bool) -> None:
        """The journal is behind: who works on it, the record says, and it has not been read yet. The
        store waits for everybody who may; everybody is told. Nor is its epoch known: any is meant."""
        placed = [request.prefill_worker, request.decode_worker]
        for worker in dict.fromkeys([*placed, *self._books.workers]):
            self._stops.tell(request.request_id, worker, self._books.epoch)
        for store in request.stores:
            message = store_pb2.ReleaseRequest(
                request_id=request.request_id, keep_blocks=keep, writers_unknown=True
            )
            self._books.call(request.request_id, store, "Release", message)

    def release_store(self, request: Request, store: str, *, keep: bool, live: list[str]) -> None:
        message = store_pb2.ReleaseRequest(
            request_id=request.request_id, keep_blocks=keep, live_writers=live,
            epoch=self._books.epoch,
        )  # fmt: skip
        self._books.call(request.request_id, store, "Release", message)
