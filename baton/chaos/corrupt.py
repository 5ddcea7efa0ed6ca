"""Rounds of corruption: some requests, some of their bytes changed where they lie, and what becomes of
them. A round is drawn from (seed, where, number) and leaves its cluster at rest.

    announced  prefill is done and decode, which is held off, has not looked yet
    cached     in the prefix cache, before a second request with the same prompt
    held       by a decode that has just been killed, its open tail included, before the takeover
    wire       in ZeroMQ messages between the stores, their headers included
    disk       in files of the tier on disk, before the prompt is asked for again (`corrupt_disk`)

At rest every flip lies in a block of its own, so that each that matters is noticed once and costs those
64 tokens, unless the store was there first: the scrub, or a header written anew.
On the wire a byte may be one that nobody reads, or be refused and sent again.
"""

from __future__ import annotations

import asyncio
import dataclasses
import signal
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from random import Random

from baton.chaos.asks import Corpus, ask
from baton.chaos.damage import Damage
from baton.chaos.flip import (
    Flip,
    Held,
    announced,
    cached,
    committed,
    find_stream,
    flip,
    open_arena,
)
from baton.chaos.judge import Verdict, judge_stream, stall_s
from baton.chaos.lab import POLL_S, Connection, Lab, of_stores, pages_in_use, rest
from baton.chaos.scenario import Ask
from baton.chaos.streams import Stream, follow
from baton.v1 import cluster_pb2
from services.kv.arena import Arena
from services.kv.record import StreamRecord

STREAMS = 8
FLIPS_PER_STREAM_MAX = 4
WIRE_FLIPS = 16
FILLED_S_MAX = 30.0
SETUP_OF = {
    "announced": "patient", "cached": "patient", "held": "standard", "wire": "linked", "disk": "disk",
}  # fmt: skip
WHERE = tuple(SETUP_OF)


class Round:
    """One round in progress."""

    def __init__(
        self, lab: Lab, connection: Connection, where: str, seed: int, number: int, corpus: Corpus
    ) -> None:
        self._lab, self._connection = lab, connection
        self.where, self.number = where, number
        self._rng = Random(f"{seed}/{number}/{where}")
        self._corpus = corpus
        self._tenant = uuid.uuid4().hex  # nothing is cached for it yet
        self._flips: list[Flip] = []
        self._wire_flips = 0
        self._struck: dict[str, float] = {}  # request -> when, on this machine's monotonic clock
        self.streams: list[Stream] = []

    async def perform(self, tokens_of: Callable[[Ask], list[int]]) -> Damage:
        """Requests, flips, ends, rest; `tokens_of` is the undisturbed run."""
        before, trouble = await rest(self._lab, self._connection)
        try:
            if not trouble:
                await self._strike_all()
        except TimeoutError as error:
            trouble = str(error)
        finally:
            self._lab.revive()
        after, unrest = await rest(self._lab, self._connection)
        verdict = Verdict()
        for stream in self.streams:
            verdict += judge_stream(stream.seen, stream.endings, tokens_of(stream.ask))
        if before is None or after is None:
            return Damage(self.where, self.number, verdict=verdict, trouble=trouble or "no view")
        pages = pages_in_use(after)
        verdict += Verdict(leaked_pages=max(0, pages - self._lab.leaked))
        self._lab.leaked = pages
        return self._damage(before, after, verdict, trouble or unrest)

    def _damage(
        self, before: cluster_pb2.ClusterView, after: cluster_pb2.ClusterView, verdict: Verdict,
        trouble: str,
    ) -> Damage:  # fmt: skip
        counters = (
            "corrupt_blocks", "blocks_repaired", "tokens_repaired", "repair_mismatches",
            "prompt_tokens_recomputed",
        )  # fmt: skip
        moved = {n: getattr(after.requests, n) - getattr(before.requests, n) for n in counters}
        moved["headers_mended"] = of_stores(after, "headers_repaired", before)
        moved["cached_dropped"] = of_stores(after, "corrupt_cached", before)
        moved["corrupt_messages"] = of_stores(after, "corrupt_messages", before)
        parts = Counter(f.part for f in self._flips)
        mattering, dropped = sum(f.matters for f in self._flips), 0
        if self.where == "wire":
            mattering, dropped = self._on_wire(parts)
        return Damage(
            self.where, self.number, flips=len(self._flips) + self._wire_flips,
            mattering=mattering, dropped=dropped, parts=tuple(sorted(parts.items())),
            verdict=verdict, trouble=trouble, streams=len(self.streams),
            stalls_ms=tuple(self._stalls_ms()), **moved,
        )  # fmt: skip

    def _on_wire(self, parts: Counter[str]) -> tuple[int, int]:
        """Of this round's damaged messages, how many mattered, and of how many nobody knows; as far as
        the relay could read them."""
        relay, layout = self._lab.link, self._arena(self._lab.spec.stores - 1).layout
        assert relay is not None
        found = relay.tally.take()
        headers = found.headers + sum(tap.unread for tap in relay.taps)
        parts["header"] += headers
        for hit in found.hits:
            parts.update("row_crc" if frame == 1 else "payload" for frame, _ in hit.flips)
        mattering = sum(hit.matters(layout) for hit in found.hits) + headers
        return mattering, found.dropped

    def _stalls_ms(self) -> list[float]:
        pauses = [
            stall_s(stream.times, self._struck[stream.request_id], first_too=True)
            for stream in self.streams
            if stream.request_id in self._struck
        ]
        return [pause * 1e3 for pause in pauses if pause is not None]

    # --- the pieces ---

    def _ask(self, length: int, new_tokens: int) -> Ask:
        drawn = ask(self._rng, self._corpus, length)
        return dataclasses.replace(drawn, max_tokens=new_tokens)

    def _open(self, asks: Sequence[Ask]) -> list[Stream]:
        name = f"{self.where}-{self.number}-{uuid.uuid4().hex[:8]}"
        return [Stream(ask, f"{name}-{i}", self._tenant) for i, ask in enumerate(asks)]

    def _start(self, streams: Sequence[Stream]) -> list[asyncio.Task[None]]:
        return [asyncio.create_task(follow(self._connection, stream)) for stream in streams]

    def _arena(self, store: int) -> Arena:
        return open_arena(self._lab.spec.arena_dir(store))

    def _strike(self, arena: Arena, held: Sequence[Held], stream: Stream) -> None:
        """Up to FLIPS_PER_STREAM_MAX flips, each in a block of its own, the last block the likeliest:
        it is the open tail."""
        count = min(len(held), self._rng.randint(1, FLIPS_PER_STREAM_MAX))
        chosen = [*self._rng.sample(held[:-1], count - 1), held[-1]]
        if self._rng.random() < 0.5:
            chosen = self._rng.sample(list(held), count)
        self._flips += [flip(arena, block, self._rng) for block in chosen]
        self._struck[stream.request_id] = time.monotonic()

    # --- where the bytes lie ---

    async def _strike_all(self) -> None:
        method = {
            "announced": self._announced, "cached": self._cached, "held": self._held,
            "wire": self._wire,
        }[self.where]  # fmt: skip
        await method()

    async def _announced(self) -> None:
        asks = [self._ask(self._rng.randint(100, 320), 10) for _ in range(STREAMS)]
        self.streams = self._open(asks)
        self._lab.signal("decode-0", signal.SIGSTOP)
        tasks = self._start(self.streams)
        arena = self._arena(self._lab.spec.stores - 1)
        for stream in self.streams:
            record = await _record_when(arena, stream, lambda record: record.first()[1])
            await self._left_prefill(stream)
            self._strike(arena, announced(record), stream)
        self._lab.revive()
        await asyncio.gather(*tasks)

    async def _left_prefill(self, stream: Stream) -> None:
        """With an arena of its own, prefill may send a page again, over a flipped one, until all of
        them have been acknowledged and its own are given back."""
        if self._lab.spec.stores > 1:
            arena, name = self._arena(0), stream.request_id
            await until(lambda: find_stream(arena, name) is None, f"the end of {name} at prefill")

    async def _cached(self) -> None:
        asks = [self._ask(self._rng.randint(200, 450), 8) for _ in range(STREAMS)]
        await asyncio.gather(*self._start(self._open(asks)))
        await rest(self._lab, self._connection)
        arena = self._arena(self._rng.randrange(self._lab.spec.stores))
        self.streams = self._open(asks)
        for stream in self.streams:
            if held := cached(arena, self._tenant, stream.ask.token_ids):
                self._strike(arena, held, stream)
        await asyncio.gather(*self._start(self.streams))

    async def _held(self) -> None:
        asks = [self._ask(self._rng.randint(40, 250), 150) for _ in range(STREAMS)]
        self.streams = self._open(asks)
        tasks = self._start(self.streams)
        index = self._rng.randint(10, 80)
        await until(lambda: all(len(s.seen) > index for s in self.streams), "tokens of all streams")
        owners = await self._owners()
        victim = Counter(owners.values()).most_common(1)[0][0]
        self._lab.signal("scheduler", signal.SIGSTOP)  # until then nobody may take over
        self._lab.signal(victim, signal.SIGKILL)
        arena = self._arena(self._lab.spec.stores - 1)
        for stream in self.streams:
            record = find_stream(arena, stream.request_id)
            if record is not None and owners.get(stream.request_id) == victim:
                self._strike(arena, committed(record), stream)
        self._lab.revive()
        await asyncio.gather(*tasks)

    async def _owners(self) -> dict[str, str]:
        """Request id -> decode."""
        view = await self._connection.view()
        if view is None:
            raise TimeoutError("no view")
        return {
            request_id: worker.name
            for worker in view.workers
            if worker.role == cluster_pb2.ROLE_DECODE
            for request_id in worker.running_requests
        }

    async def _wire(self) -> None:
        assert self._lab.link is not None
        flipper = self._lab.link.flipper
        assert flipper is not None
        self._lab.link.tally.take()
        before = flipper.flipped
        flipper.arm(WIRE_FLIPS)
        asks = [self._ask(self._rng.randint(100, 450), 10) for _ in range(STREAMS)]
        self.streams = self._open(asks)
        await asyncio.gather(*self._start(self.streams))
        flipper.left = 0
        self._wire_flips = flipper.flipped - before


async def _record_when(
    arena: Arena, stream: Stream, condition: Callable[[StreamRecord], bool]
) -> StreamRecord:
    """The request's record once it is there and fulfils the condition. Raises TimeoutError."""
    found: list[StreamRecord] = []

    def there() -> bool:
        record = find_stream(arena, stream.request_id)
        if record is None or not condition(record):
            return False
        found.append(record)
        return True

    await until(there, f"{stream.request_id} in the arena")
    return found[0]


async def until(condition: Callable[[], bool], what: str, deadline_s: float = FILLED_S_MAX) -> None:
    """Polls what nothing announces. Raises TimeoutError."""
    end = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not after {deadline_s:g} s")
        await asyncio.sleep(POLL_S)
