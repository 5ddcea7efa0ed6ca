"""Requests whose pages lie on a host that does not come back, computed again on another one.

A decode or prefill that dies is started again beside its arena, and a partition heals: both cost less
than computing anew, so they are waited for, `lost_ms` long. And if there is no other place, for as
long as the request lives. Pure.
"""

from __future__ import annotations

from policies.placement import Hold
from policies.view import RequestView
from services.scheduler.books import Books
from services.scheduler.placing import Placing
from services.scheduler.request import Phase, Request

_PLACED = (Phase.OPENING, Phase.RUNNING, Phase.RECOVERING)


class Stranded:
    """Since when each request has been without a worker that reaches its pages."""

    def __init__(self, books: Books, placing: Placing) -> None:
        self._books, self._placing = books, placing
        self._since: dict[str, float] = {}

    def give_up(self, now: float) -> None:
        """Computes again elsewhere what has waited long enough, if there is an elsewhere."""
        books = self._books
        if books.recovering:
            return  # workers are still on their way back
        view = books.view()
        decodes = {worker.store_id for worker in view.of("decode")}
        prefills = {worker.store_id for worker in view.of("prefill")}
        stranded = {
            request.request_id: self._since.get(request.request_id, now)
            for request in books.requests.values()
            if request.phase in _PLACED and not _supplied(request, decodes, prefills)
        }
        self._since = stranded
        for request_id, since in stranded.items():
            if (now - since) * 1e3 < books.config.lost_ms:
                continue
            request = books.requests[request_id]
            wish = RequestView(request_id, len(request.prompt), request.sampling.max_tokens)
            if isinstance(books.policy.place(wish, books.view()), Hold):
                continue
            request.tell("its host is given up")
            self._placing.compute_again(request, now, fresh=False)


def _supplied(request: Request, decodes: set[str], prefills: set[str]) -> bool:
    """Whether whoever it waits for is there: stores with a ready decode, stores with a ready prefill."""
    if not request.decode_store:
        return True  # nothing of it lies anywhere
    if request.needs_decode and request.decode_store not in decodes:
        return False
    needs_prefill = not request.prefill_done or (request.handing_over and request.needs_decode)
    return not needs_prefill or request.prefill_store in prefills
