"""Damaged KV: which workers a request needs so that the blocks at fault, and no others, are computed
again (design.md section 8). Pure.

    who refused          what follows
    decode               another epoch of decode gets fresh blocks for the damaged ones
    prefill              another attempt repairs what it had inherited, and computes again what may
                         have come of it
    whose proof failed   the whole stream is computed again
"""

from __future__ import annotations

from baton.v1 import control_pb2, store_pb2
from services.scheduler.books import Books
from services.scheduler.moving import DECODE, PREFILL, Moving
from services.scheduler.placing import Placing
from services.scheduler.request import Damage, Request

REPAIRS_MAX = 32  # of one stream; what is damaged more often does not get better by it


class Repairing:
    """Takes the refusals that speak of damaged KV."""

    def __init__(self, books: Books, placing: Placing, moving: Moving) -> None:
        self._books, self._placing, self._moving = books, placing, moving

    def refused(
        self, request: Request, now: float, refused: control_pb2.Refused, *, decoding: bool
    ) -> None:
        """A worker of the present epoch has found `bad_blocks`."""
        books = self._books
        books.counts.corrupt_blocks += len(refused.bad_blocks)
        books.counts.repair_mismatches += refused.irreparable
        books.interrupted(request, now, refused.code)
        request.repairs += 1
        nothing = not refused.bad_blocks and not refused.HasField("resume_at")
        if refused.irreparable or nothing or request.repairs > REPAIRS_MAX:
            self._invalidate(request, refused)
            self._placing.compute_again(request, now, fresh=True)
            return
        request.damage = self._damage(request, refused, decoding)
        request.left.add(request.damage.found_by)
        self._moving.ensure(request, now)

    def _damage(self, request: Request, refused: control_pb2.Refused, decoding: bool) -> Damage:
        blocks = tuple(refused.bad_blocks)
        if decoding:
            return Damage(DECODE, request.decode_store, blocks)
        resume_at = refused.resume_at if refused.HasField("resume_at") else None
        if resume_at is not None:
            request.recomputed += len(request.prompt) + request.base_index - resume_at
        return Damage(PREFILL, request.prefill_store, blocks, resume_at)

    def _invalidate(self, request: Request, refused: control_pb2.Refused) -> None:
        """Nobody finds these blocks in the cache again."""
        if not refused.bad_blocks:
            return
        message = store_pb2.InvalidateRequest(
            request_id=request.request_id, blocks=refused.bad_blocks
        )
        for store in request.stores:
            self._books.call(request.request_id, store, "Invalidate", message)

    def repaired(self, request: Request, blocks: int, tokens: int) -> None:
        """A worker has computed blocks again, and they came out as they had been stored."""
        counts = self._books.counts
        counts.blocks_repaired += blocks
        counts.tokens_repaired += tokens
        request.recomputed += tokens
