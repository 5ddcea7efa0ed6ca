"""A kv-store with its arena, real lock files, and workers that write real rows into real pages.

As in `kv_world`, the world keeps its own books. Here it also plays the workers, the fenced ones that
wake up included; `store_books` looks at the bytes. All requests of one family have the same endless
text, so any worker that computes a position computes the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from baton.closing import Closing
from baton.v1 import control_pb2, store_pb2
from services.decode.stream import DecodeStream
from services.kv.arena import Arena
from services.kv.layout import PAGE_TOKENS
from services.ops.errors import Overloaded, StaleEpoch
from tests.support.store_actors import (
    Decoding,
    Prefilling,
    Worker,
    end_store,
    new_store,
    tokens_of,
)
from tests.support.store_books import Asked, Session, StoreBooks
from tests.support.store_tiers import StoreTiers

LEASE_S = 10.0


@dataclass
class StoreWorld(StoreBooks, Closing):
    """A store to which things happen; at every moment its books must agree with its arena."""

    def __post_init__(self) -> None:
        self._start_store()
        self.arena = Arena(self.directory)

    def _start_store(self) -> None:
        self.store = new_store(self.directory, clock=lambda: self.now, one_class=self.one_class)
        self.renewed |= dict.fromkeys(self.store.state.streams, self.lease_now)
        if self.disk_blocks:
            self.tiers = StoreTiers(self.store, self.directory / "disk", self.disk_blocks)

    def _end_store(self) -> None:
        self.opening.clear()
        if self.tiers:
            self.tiers.die()
        end_store(self.store)

    def close(self) -> None:
        for worker in self.workers.values():
            worker.die()
        self._end_store()

    # --- who is there ---

    def worker(self, name: str) -> Worker:
        """The living worker of this name; one that has died is followed by another."""
        if name not in self.workers or not self.workers[name].alive:
            number = 1 + max((w.number for w in self.workers.values()), default=0)
            gone = self.workers.pop(name, None)
            if gone:
                self.workers[f"{name}/{gone.number}"] = gone
            self.workers[name] = Worker(name, number, self.directory)
        return self.workers[name]

    def next_epoch(self) -> int:
        self.epoch += 1
        return self.epoch

    def _begin(
        self, worker: Worker, request_id: str, slot: int, role: Prefilling | Decoding
    ) -> Session:
        session = Session(worker, request_id, slot, role)
        if worker.alive:
            self.sessions.append(session)
        return session

    def _by_id(self, worker_id: str) -> Worker:
        return next(w for w in self.workers.values() if w.id == worker_id)

    def _end(self, session: Session | None) -> None:
        if session is not None:
            self.sessions = [s for s in self.sessions if s is not session]

    def present(self, session: Session | None) -> bool:
        return any(s is session for s in self.sessions)

    def zombies(self) -> list[Session]:
        return [s for s in self.sessions if s.fenced]

    # --- what happens ---

    def open(
        self, family: int, prompt: int, max_new: int, prefill: str = "p0", decode: str = "d0"
    ) -> str:
        """The new request's id. Raises Overloaded."""
        request = self.wish(family, prompt, max_new, prefill, decode)
        reply = self.tiers.open(request) if self.tiers else self.store.open(request)
        self._opened(request, reply, family)
        return str(request.request_id)

    def begin_open(
        self, family: int, prompt: int, max_new: int, prefill: str = "p0", decode: str = "d0"
    ) -> None:
        """Asks for a stream, which is opened once its prefix has come from disk."""
        assert self.tiers
        request = self.wish(family, prompt, max_new, prefill, decode)
        self.opening.append((self.tiers.begin_open(request), request, family))
        self.arrive()

    def arrive(self) -> None:
        """What has been opened meanwhile, or refused for lack of room, is known."""
        done = [entry for entry in self.opening if entry[0].done()]
        self.opening = [entry for entry in self.opening if not entry[0].done()]
        for task, request, family in done:
            if not isinstance(task.exception(), Overloaded):
                self._opened(request, task.result(), family)

    def _opened(
        self, request: store_pb2.OpenStreamRequest, reply: store_pb2.OpenStreamResponse,
        family: int,
    ) -> None:  # fmt: skip
        """Its workers begin, those that are still there."""
        request_id, prompt = str(request.request_id), len(request.token_ids)
        self.renewed[request_id] = self.lease_now
        max_new = request.max_new_tokens
        role = Prefilling(self.arena, reply.slot, family, prompt, request.attempt)
        assert role.at == reply.cached_tokens
        self.asked[request_id] = Asked(
            family, prompt, max_new,
            self._begin(self._by_id(request.prefill_writer), request_id, reply.slot, role), None,
        )  # fmt: skip
        if max_new:
            decode = self._by_id(request.decode_writer)
            self._prepare(request_id, decode, reply.slot, request.epoch)

    def wish(
        self, family: int, prompt: int, max_new: int, prefill: str = "p0", decode: str = "d0"
    ) -> store_pb2.OpenStreamRequest:
        """What its store is told of a new request."""
        self.opened += 1
        return store_pb2.OpenStreamRequest(
            request_id=f"r{self.opened}", token_ids=tokens_of(family, prompt).tolist(),
            max_new_tokens=max_new, epoch=self.next_epoch(), attempt=self.next_epoch(),
            prefill_writer=self.worker(prefill).id,
            decode_writer=self.worker(decode).id if max_new else "",
        )  # fmt: skip

    def _prepare(self, request_id: str, worker: Worker, slot: int, epoch: int) -> None:
        asked, stream = self.asked[request_id], self.store.state.streams[request_id]
        command = control_pb2.PrepareDecode(
            request_id=request_id, slot=slot, epoch=epoch,
            sampling=control_pb2.ResolvedSampling(max_tokens=asked.max_new, top_p=1.0),
        )  # fmt: skip
        own = stream.decode_table[(asked.prompt + asked.steps) // PAGE_TOKENS :]
        decoding = Decoding(DecodeStream(command, self.arena), asked.family, left=set(own))
        asked.decode = self._begin(worker, request_id, slot, decoding)

    def compute(self, request_id: str, upto: int) -> None:
        """Prefill goes on; past the prompt's end it samples the first token."""
        asked = self.asked[request_id]
        role = asked.prefill.role
        assert isinstance(role, Prefilling)
        if asked.first or asked.prefill.fenced or not self.present(asked.prefill):
            return
        assert role.compute(upto), "the present prefill has been fenced"
        if upto > asked.prompt:
            assert role.first(), "the present prefill has been fenced"
            asked.first = True

    def decode(self, request_id: str, steps: int) -> None:
        asked = self.asked[request_id]
        if not asked.decode or not self.present(asked.decode) or asked.decode.fenced:
            return
        role = asked.decode.role
        assert isinstance(role, Decoding)
        if not role.attach():
            return
        for _ in range(min(steps, asked.max_new - 1 - asked.steps)):
            assert role.step(), "the present decode has been fenced"
            asked.steps += 1
        assert role.stream.steps == asked.steps

    def move_decode(self, request_id: str, name: str) -> None:
        """Raises Overloaded; then nobody has been fenced."""
        asked, epoch = self.asked[request_id], self.next_epoch()
        with self._fenced(asked.decode):
            reply = self.store.reassign(
                store_pb2.ReassignRequest(
                    request_id=request_id, role=store_pb2.WRITER_ROLE_DECODE, epoch=epoch,
                    writer=self.worker(name).id,
                )
            )  # fmt: skip
        assert reply.committed == asked.steps
        self._prepare(request_id, self.worker(name), reply.slot, epoch)

    @contextmanager
    def _fenced(self, session: Session | None) -> Iterator[None]:
        """What happens inside fences it, unless there is no room."""
        before = session.fenced if session else False
        if session:
            session.fenced = True
        try:
            yield
        except Overloaded:
            if session:
                session.fenced = before
            raise

    def move_prefill(self, request_id: str, name: str) -> None:
        """Raises Overloaded; then nobody has been fenced."""
        asked, attempt = self.asked[request_id], self.next_epoch()
        with self._fenced(None if asked.first else asked.prefill):  # a finished one stays as it is
            reply = self.store.reassign(
                store_pb2.ReassignRequest(
                    request_id=request_id, role=store_pb2.WRITER_ROLE_PREFILL, epoch=attempt,
                    writer=self.worker(name).id,
                )
            )  # fmt: skip
        if asked.first:
            return
        role = Prefilling(self.arena, reply.slot, asked.family, asked.prompt, attempt)
        assert role.at == reply.committed
        asked.prefill = self._begin(self.worker(name), request_id, reply.slot, role)

    def publish(self, request_id: str) -> None:
        asked = self.asked[request_id]
        if asked.first:
            self._end(asked.prefill)
            self.store.publish(request_id)
            asked.published = True

    def release(self, request_id: str, *, keep: bool = True, stopped: bool = True) -> None:
        """As the scheduler does: it lists those of the present workers that have not stopped."""
        self.store.release(self.forget(request_id, keep=keep, stopped=stopped))

    def forget(
        self, request_id: str, *, keep: bool = True, stopped: bool = True
    ) -> store_pb2.ReleaseRequest:
        """The request is no longer asked for; what its store is to be told."""
        asked = self.asked.pop(request_id)
        present = [s for s in (asked.prefill, asked.decode) if s is not None]
        for session in present:
            if stopped and not session.fenced:
                self._end(session)
            session.fenced = True
        live = [s.worker.id for s in present if self.present(s)]
        return store_pb2.ReleaseRequest(request_id=request_id, keep_blocks=keep, live_writers=live)

    def invalidate(self, request_id: str, block: int) -> None:
        self.store.invalidate(request_id, [block])

    def stops(self, session: Session) -> None:
        """Its worker says Stopped for this request: for all that it had been fenced from."""
        said = (session.request_id, session.worker.id)
        for other in self.zombies():
            if (other.request_id, other.worker.id) == said:
                self._end(other)
        self.store.sweep(said)

    def dies(self, worker: Worker) -> None:
        worker.die()
        self.sessions = [s for s in self.sessions if s.worker is not worker]

    def wakes(self, session: Session) -> None:
        """A fenced worker goes on as if nothing had happened: it writes one row or one token where it
        thinks that it may, and is told that it may not."""
        role = session.role
        if isinstance(role, Decoding):
            try:
                went_on = (
                    role.attach() and role.stream.steps < role.stream.max_new - 1 and role.step()
                )
            except StaleEpoch:
                went_on = False
        else:
            went_on = role.at < role.prompt and role.compute(role.at + 1)
            went_on = went_on or role.first()
        assert not went_on, f"{session} has been fenced and went on"

    def passes(self, seconds: float) -> None:
        """Time, in which the store looks at the clock every eighth of a second."""
        for _ in range(round(seconds * 8)):
            self.now += 0.125
            self.lease_now += 0.125
            self.store.sweep()
        gone = [r for r in self.asked if self.lease_now - self.renewed[r] >= LEASE_S]
        for request_id in gone:
            self.forget(request_id, stopped=False)
        assert set(self.store.state.streams) == set(self.asked), "leases"

    def stands_still(self, seconds: float) -> None:
        """The store is stopped for so long: no lease runs meanwhile, but for a first moment."""
        self.now += seconds
        self.lease_now += min(seconds, LEASE_S / 8)
        self.store.sweep()
        self.passes(0)

    def renew(self) -> None:
        """The scheduler is there, and wants all it has asked for."""
        assert self.store.renew([*self.asked, "nobody's"]) == ["nobody's"]
        self.renewed |= dict.fromkeys(self.asked, self.lease_now)

    def pin(self, name: str, family: int, blocks: int) -> None:
        """Raises Overloaded."""
        tokens = tokens_of(family, blocks * PAGE_TOKENS).tolist()
        request = store_pb2.PinRequest(name=name, token_ids=tokens)
        self.pins[name] = self.store.pin(request)

    def unpin(self, name: str) -> None:
        assert self.store.unpin(name) == (self.pins.pop(name, None) is not None)

    def restart(self) -> None:
        """The store dies and starts again; what it knows must be what it knew."""
        lost = self.store.state
        self.begin_anew()
        self.same(lost, self.store.state)

    def begin_anew(self) -> None:
        self._end_store()
        self._start_store()

    def begin_from_nothing(self) -> None:
        """The machine starts again: the arena is gone, and so is everybody."""
        for worker in self.workers.values():
            self.dies(worker)
        self._end_store()
        self.asked.clear()
        self.kept.clear()
        (self.directory / "arena").unlink()
        self._start_store()
        self.arena = Arena(self.directory)

    def end(self) -> None:
        """Everything is released and everybody goes: nothing is left but the cache."""
        for name in list(self.pins):
            self.unpin(name)
        for request_id in list(self.asked):
            self.release(request_id, stopped=False)
            self.check()
        if self.tiers:
            self.tiers.settle()
            self.arrive()
            assert not self.opening
        for request_id in list(self.asked):
            self.release(request_id, stopped=False)
        self.store.reconcile([])
        for worker in self.workers.values():
            self.dies(worker)
        self.store.sweep()
        self.check()
        self.check_empty()


def ready(world: StoreWorld, prompt: int = 100, max_new: int = 100, steps: int = 0) -> str:
    """A stream whose prefill has left and whose decode has committed `steps`."""
    request_id = world.open(0, prompt, max_new)
    world.compute(request_id, prompt + 1)
    world.publish(request_id)
    world.decode(request_id, steps)
    return request_id


def fill(world: StoreWorld) -> str:
    """A stream that takes every free block."""
    return world.open(1, PAGE_TOKENS * len(world.store.state.pool.free), 1)
