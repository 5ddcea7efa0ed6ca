"""Running requests: keeping each one supplied with a prefill and a decode.

`ensure` compares the workers a request has with the workers there are, and starts whatever brings the
two together: the same few lines serve a crash, a paused worker, a restart of the scheduler and a
worker that was lost while pages were being leased. Pure.
"""

from __future__ import annotations

from baton.v1 import store_pb2
from policies.view import WorkerView
from services.scheduler import orders
from services.scheduler.books import Books
from services.scheduler.placing import HOLD_RETRY_S, Placing
from services.scheduler.request import CallStore, Move, Phase, Request, WorkerInfo
from services.scheduler.stops import Stops

PREFILL, DECODE = "prefill", "decode"


class Moving:
    """What a running request needs: another decode, another prefill."""

    def __init__(self, books: Books, stops: Stops, placing: Placing) -> None:
        self._books, self._stops, self._placing = books, stops, placing

    def launch(self, request: Request, now: float) -> None:
        """All pages are leased: decode gets ready while prefill computes."""
        request.phase = Phase.RUNNING
        request.fresh_kv = False
        request.cached_tokens = max(request.cached_tokens, min(request.cached.values()))
        self.ensure(request, now)
        if request.needs_decode and DECODE not in request.moving:
            self.send_decode(request)
        if PREFILL not in request.moving:
            self.send_prefill(request)

    # --- what workers are told ---

    def send_decode(self, request: Request) -> None:
        request.decode_told = True
        report_from = 0 if "dedupe" in self._books.config.unsafe else len(request.tokens)
        self._books.send(request.decode_worker, orders.prepare_decode(request, report_from))

    def send_prefill(self, request: Request) -> None:
        request.prefill_stopped = False
        decode = self._books.workers.get(request.decode_worker)
        announce = decode.worker.address if decode and request.needs_decode else ""
        command = orders.execute_prefill(request, announce, self._books.ingest)
        self._books.send(request.prefill_worker, command)

    def remind(self, request: Request, worker_id: str) -> None:
        """A worker is back: what it was told, and what it has said meanwhile, may be lost. The same
        epoch again only makes it report once more."""
        decodes = worker_id == request.decode_worker and DECODE not in request.left
        if decodes and request.needs_decode:
            self.send_decode(request)
        known = request.prefill_store in request.slots  # not after a recovery, in another arena
        prefills = worker_id == request.prefill_worker and PREFILL not in request.left
        if prefills and not request.prefill_done and known:
            self.send_prefill(request)

    def _present(self, request: Request, role: str) -> WorkerInfo | None:
        """Who has this role, if it is attached and has not refused."""
        worker = request.prefill_worker if role == PREFILL else request.decode_worker
        return None if role in request.left else self._books.workers.get(worker)

    # --- who is missing ---

    def ensure(self, request: Request, now: float) -> None:
        """Starts what a running request needs: another decode, another prefill."""
        if request.phase is not Phase.RUNNING or now < request.held_until:
            return
        if PREFILL not in request.moving:
            if not request.prefill_done or PREFILL in request.left:
                self._ensure_prefill(request)
            elif request.handing_over and request.needs_decode:
                self._ensure_handed_over(request)
        if request.needs_decode and DECODE not in request.moving:
            self._ensure_decode(request, now)

    def _ensure_handed_over(self, request: Request) -> None:
        """Prefill is gone and the transfer with it: another one of its arena sends the same pages,
        under the same attempt, since nobody writes to them any more."""
        present = self._books.workers.get(request.prefill_worker)
        if present and present.ready:
            return
        if able := self._prefills(request, but=request.prefill_worker):
            request.prefill_worker = min(able, key=lambda w: (w.load, w.worker_id)).worker_id
            self._books.write(orders.placed(request))
            self.send_prefill(request)

    def _prefills(self, request: Request, but: str) -> list[WorkerView]:
        """Those that reach the pages of its prefill, except one."""
        ready = self._books.view().of(PREFILL)
        return [w for w in ready if w.store_id == request.prefill_store and w.worker_id != but]

    def _ensure_decode(self, request: Request, now: float) -> None:
        books, decode = self._books, request.decode_worker
        present = self._present(request, DECODE)
        if present and present.ready:
            return
        if self._damaged(request, DECODE) and not request.prefill_done:
            return  # its report is on its way, or it is found to be lost
        gone = "" if DECODE in request.left else decode  # one that has refused may have it again
        successor = books.policy.successor(books.view(), request.decode_store, gone)
        if successor is None and present and not request.moving and self._hasty:
            successor = decode  # control: suspicion alone takes the stream away
        if successor is None:
            return  # only death or a ready successor bumps the epoch; a death waits for a restart
        if present:
            books.interrupted(request, now, f"decode {books.name(decode)} is silent")
        if books.config.recover == "reprefill" and request.prefill_done:
            self._placing.compute_again(request, now, fresh=True)
            return
        epoch = books.next_epoch()
        books.write(orders.placed(request, epoch=epoch, decode_worker=successor))
        request.moving[DECODE] = Move(epoch, successor, request.damage)
        message = orders.reassign(request, DECODE, epoch, successor, request.decode_store)
        books.call(request.request_id, request.decode_store, "Reassign", message)

    @property
    def _hasty(self) -> bool:
        return "suspicion" in self._books.config.unsafe

    def _ensure_prefill(self, request: Request) -> None:
        books, prefill = self._books, request.prefill_worker
        present = self._present(request, PREFILL)
        if present and present.ready:
            return
        able = self._prefills(request, but="" if PREFILL in request.left else prefill)
        if not able:
            return  # a silent one may still come to its end, and a lost one come back
        if present:
            request.tell(f"prefill {books.name(prefill)} is silent")
        worker = min(able, key=lambda w: (w.load, w.worker_id)).worker_id
        attempt = books.next_epoch()
        books.write(orders.placed(request, attempt=attempt, prefill_worker=worker))
        request.moving[PREFILL] = Move(attempt, worker, request.damage)
        request.moved.clear()
        together = request.prefill_store == request.decode_store
        for store in request.stores:
            writer = worker if together or store == request.prefill_store else ""
            message = orders.reassign(request, PREFILL, attempt, writer, store)
            books.call(request.request_id, store, "Reassign", message)

    # --- what the stores say to it ---

    def reassigned(
        self, request: Request, now: float, call: CallStore, reply: store_pb2.ReassignResponse
    ) -> None:
        """The former writer has been fenced in one store."""
        asked: store_pb2.ReassignRequest = call.message
        role = orders.role_of(asked)
        if request.phase is not Phase.RUNNING or not request.awaits(role, asked.epoch):
            return  # the request has been opened anew since
        request.slots[call.store_id] = reply.slot
        if role == PREFILL:
            self._prefill_moved(request, now, call, reply)
        else:
            self._decode_moved(request, now, asked, reply)

    def _prefill_moved(
        self, request: Request, now: float, call: CallStore, reply: store_pb2.ReassignResponse
    ) -> None:
        if reply.committed == len(request.prompt) + request.base_index:
            self._prefill_had_finished(request, now, gone=reply.previous_gone)
            return
        request.cached[call.store_id] = reply.committed
        request.moved[call.store_id] = reply.previous_gone
        if set(request.stores) - set(request.moved):
            return  # the other arena would still refuse what the new attempt sends
        move = request.moving[PREFILL]
        self._arrived(request, PREFILL)
        if not request.moved[request.prefill_store]:
            self.stop_fenced(request, PREFILL)
        request.left.discard(PREFILL)
        request.attempt, request.prefill_worker = move.epoch, move.writer
        self.ensure(request, now)
        if PREFILL not in request.moving:
            self.send_prefill(request)

    def _decode_moved(
        self, request: Request, now: float, asked: store_pb2.ReassignRequest,
        reply: store_pb2.ReassignResponse,
    ) -> None:  # fmt: skip
        books = self._books
        self._arrived(request, DECODE)
        if not reply.previous_gone:
            self.stop_fenced(request, DECODE)
        request.left.discard(DECODE)
        request.epoch, request.decode_worker = asked.epoch, asked.writer
        request.takeovers += request.prefill_done
        books.counts.takeovers += request.prefill_done
        request.tell(f"decode {books.name(asked.writer)} takes over at step {reply.committed}")
        self.ensure(request, now)
        if DECODE not in request.moving and asked.writer in books.workers:
            self.send_decode(request)
            self._move_announcements(request)

    @staticmethod
    def _damaged(request: Request, role: str) -> bool:
        return request.damage is not None and request.damage.found_by == role

    @staticmethod
    def _arrived(request: Request, role: str) -> None:
        """A move has succeeded: the damage that it was for is taken care of."""
        move = request.moving.pop(role)
        if (
            move.damage is not None
            and move.damage is request.damage
            and role == move.damage.found_by
        ):
            request.damage = None

    def stop_fenced(self, request: Request, role: str) -> None:
        """The worker that has just been fenced may wake up: its pages wait for its answer."""
        worker = request.prefill_worker if role == PREFILL else request.decode_worker
        epoch = request.attempt if role == PREFILL else request.epoch
        self._stops.tell(request.request_id, worker, epoch)

    def _prefill_had_finished(self, request: Request, now: float, *, gone: bool) -> None:
        """It died, or fell silent, after the first token was in the record and before its report was
        here."""
        del request.moving[PREFILL]
        if request.prefill_store != request.decode_store:
            # How far the other arena is, it alone knew.
            self._placing.compute_again(request, now, fresh=False)
            return
        request.prefill_stopped = gone
        message = store_pb2.ReadStreamRequest(request_id=request.request_id)
        self._books.call(request.request_id, request.decode_store, "ReadStream", message)

    def _move_announcements(self, request: Request) -> None:
        if request.prefill_done:
            return
        announce = self._books.workers[request.decode_worker].worker.address
        self._books.send(request.prefill_worker, orders.move_announcements(request, announce))

    def reassign_failed(self, request: Request, now: float, call: CallStore, code: str) -> None:
        """What the store lacks is computed again; what it has no room for is asked again later."""
        role = orders.role_of(call.message)
        if not request.awaits(role, call.message.epoch):
            return
        del request.moving[role]
        if code == "NOT_FOUND":
            self._placing.compute_again(request, now, fresh=False)
        else:
            request.held_until = now + HOLD_RETRY_S
