"""Requests that wait: who shall work on them, and the leasing of their pages. Pure."""

from __future__ import annotations

from policies.placement import Hold
from policies.view import RequestView
from services.scheduler import orders
from services.scheduler.books import Books
from services.scheduler.endings import Endings
from services.scheduler.request import Phase, Request

HOLD_RETRY_S = 0.05
PEERS_MAX = 8  # stores that are asked for a prefix


class Placing:
    """WAITING -> OPENING, and back again when KV is lost or there is no room."""

    def __init__(self, books: Books, endings: Endings) -> None:
        self._books, self._endings = books, endings

    def place_waiting(self, now: float) -> None:
        """Places what waits, first come first served."""
        books = self._books
        if books.recovering:
            return  # what the stores hold is not known yet
        for request in [r for r in books.requests.values() if r.phase is Phase.WAITING]:
            if now < request.held_until:
                return
            view = RequestView(request.request_id, len(request.prompt), request.sampling.max_tokens)
            placement = books.policy.place(view, books.view())
            if isinstance(placement, Hold):
                return
            request.prefill_worker, request.decode_worker = placement.prefill, placement.decode
            request.prefill_store = books.workers[placement.prefill].worker.store_id
            request.decode_store = books.workers[placement.decode].worker.store_id
            self._open(request, now)

    def _open(self, request: Request, now: float) -> None:
        """Leases pages in decode's store, and in prefill's when that is another."""
        books = self._books
        request.phase = Phase.OPENING
        request.epoch, request.attempt = books.next_epoch(), books.next_epoch()
        request.opened = request.epoch
        request.base_index = len(request.tokens)
        request.prefill_done = request.decode_told = request.kv_arrived = False
        request.slots, request.cached = {}, {}
        request.left.clear()
        request.dispatched_at = request.dispatched_at or now
        books.write(orders.placed(request))
        for store in request.stores:
            message = orders.open_stream(request, store, self._peers(request, store))
            books.call(request.request_id, store, "OpenStream", message)
        prefill, decode = books.name(request.prefill_worker), books.name(request.decode_worker)
        request.tell(f"placed on {prefill} and {decode}")

    def _peers(self, request: Request, store: str) -> list[str]:
        """Where `store` may fetch cached blocks: the other stores, decode's first."""
        if not self._books.config.peer_fetch:
            return []
        others = [name for name in self._books.ingest if name != store]
        others.sort(key=lambda name: (name != request.decode_store, name))
        return [self._books.ingest[name] for name in others[:PEERS_MAX]]

    def open_failed(self, request: Request, now: float, code: str, message: str) -> None:
        """A store would not open the stream: for want of room it waits, for as long as it takes. What
        would never have room is refused by another code."""
        if request.phase is not Phase.OPENING:
            return
        self._endings.release(request, keep=False)
        if code != "RESOURCE_EXHAUSTED":
            self._endings.fail(request, now, code, message, retryable=False)
            return
        request.phase = Phase.WAITING
        request.held_until = now + HOLD_RETRY_S

    def compute_again(self, request: Request, now: float, *, fresh: bool) -> None:
        """The stream's KV is lost or not to be trusted: prefill computes prompt and tokens anew."""
        request.tell("KV is computed again")
        request.recomputed += len(request.prompt)
        self._books.counts.prompt_tokens_recomputed += len(request.prompt)
        self._endings.release(request, keep=False)
        request.fresh_kv = fresh
        request.damage = None
        request.takeovers += 1
        request.phase = Phase.WAITING
        request.moving.clear()
        self.place_waiting(now)
