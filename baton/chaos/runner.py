"""Performs one scenario on a live cluster and writes down what a client sees, event by event."""

from __future__ import annotations

import asyncio
import signal
import time
import uuid
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from baton.chaos.flip import announced, find_stream, open_arena
from baton.chaos.judge import PromptWork, stall_s
from baton.chaos.lab import POLL_S, Connection, Death, Lab, of_stores, pages_in_use, rest
from baton.chaos.scenario import Scenario
from baton.chaos.setups import SHORT_LEASE_MS
from baton.chaos.streams import Stream, follow
from baton.v1 import cluster_pb2

ON_ITS_WAY_S = 0.2
RELEASED_S_MAX = 5 * SHORT_LEASE_MS / 1e3  # for streams that nobody renews
_SIGNALS = {"KILL": signal.SIGKILL, "STOP": signal.SIGSTOP}


@dataclass
class Outcome:
    """What one run gave, before it is judged."""

    scenario: Scenario
    streams: list[Stream]
    deaths: list[Death] = field(default_factory=list)  # pauses, too
    owners: dict[str, str] = field(default_factory=dict)  # request id -> decode, when first seen
    work: PromptWork | None = None
    stale_refused: int = 0
    false_suspicions: int = 0
    leases_expired: int = 0
    quarantined: int = 0  # pages, the most that was seen
    waited: int = 0  # requests that were accepted and had to wait for pages, the most at once
    trouble: str = ""  # why the cluster did not come to rest
    leaked_pages: int = 0

    @property
    def struck(self) -> bool:
        return bool(self.deaths)

    @property
    def reached(self) -> bool:
        """Whether everything that was to die has died."""
        crash = self.scenario.crash
        if crash.trigger == "pressure":
            return self.waited > 0
        return len(self.deaths) >= 1 + bool(crash.also or crash.then)

    def hit_at(self, stream: Stream) -> float | None:
        """When something that this stream needs died: its decode, or, where that is not what the run
        aims at, whatever died."""
        crash, owner = self.scenario.crash, self.owners.get(stream.request_id)
        everyone = crash.victim not in ("owner", "busiest") or not crash.spares_the_prompt

        def needed(process: str) -> bool:
            breaks = process == "scheduler" and crash.kills_scheduler
            return process == owner or breaks or (everyone and not process.startswith("decode"))

        return min((d.at for d in self.deaths if needed(d.process)), default=None)

    def streams_hit(self) -> int:
        """Streams that were going on when what worked for them died; prefill makes one token."""
        of_prefill = not self.scenario.crash.spares_the_prompt
        works_until = 0 if of_prefill and self.scenario.crash.victim != "owner" else -1
        pairs = [(stream.times, self.hit_at(stream)) for stream in self.streams]
        return sum(at is not None and (not t or t[works_until] > at) for t, at in pairs)

    def stalls_ms(self) -> list[float]:
        """The pause of each stream that was interrupted between two tokens."""
        crash, found = self.scenario.crash, []
        for stream in self.streams:
            at, timing = self.hit_at(stream), stream.timing
            spared = timing is not None and not timing.takeovers  # all its tokens were on their way
            if at is None or (spared and crash.moves_streams and not crash.kills_scheduler):
                continue
            found.append(stall_s(stream.times, at, first_too=not crash.spares_the_prompt))
        return [gap * 1e3 for gap in found if gap is not None]


class Run:
    """One scenario in progress."""

    def __init__(self, lab: Lab, connection: Connection, scenario: Scenario) -> None:
        self._lab, self._connection, self.scenario = lab, connection, scenario
        nonce = uuid.uuid4().hex[:8]
        self.streams = [
            Stream(ask, f"{scenario.label.replace('+', '.')}-{i}-{nonce}")
            for i, ask in enumerate(scenario.requests)
        ]
        self.outcome = Outcome(scenario, self.streams)
        self._placed = asyncio.Event()
        self._helpers: list[asyncio.Task[None]] = []

    async def perform(self) -> Outcome:
        """Streams, crash, end, rest. Leaves the cluster at rest, or says why not."""
        self._lab.disarm()
        crash = self.scenario.crash
        before, _ = await rest(self._lab, self._connection)
        if crash.trigger == "failpoint":
            self._lab.arm(crash.point, crash.index, crash.signal.lower())
            self._help(self._watch())
        self._help(self._look())
        self._help(self._on_placement())
        try:
            await asyncio.gather(*(self._follow(stream) for stream in self.streams))
        finally:
            self._lab.revive()
            for helper in self._helpers:
                helper.cancel()
        for done in await asyncio.gather(*self._helpers, return_exceptions=True):
            if isinstance(done, Exception):  # not that it has been cancelled
                raise done
        self._note_failpoints()
        after, self.outcome.trouble = await rest(self._lab, self._connection)
        self._lab.disarm()
        self._account(before, after)
        return self.outcome

    def _help(self, work: Coroutine[Any, Any, None]) -> None:
        self._helpers.append(asyncio.create_task(work))

    # --- streams ---

    async def _follow(self, stream: Stream) -> None:
        await follow(self._connection, stream, self._on_token)

    # --- who runs what ---

    async def _look(self) -> None:
        """Keeps the owners known from before the crash until every request has one."""
        while not self.outcome.struck:
            view = await self._connection.view()
            if view is not None and not self.outcome.struck:
                self._read_owners(view)
                self.outcome.waited = max(self.outcome.waited, view.requests.waiting)
            if len(self.outcome.owners) == len(self.streams):
                return
            await asyncio.sleep(POLL_S)

    def _read_owners(self, view: cluster_pb2.ClusterView) -> None:
        ours = {stream.request_id for stream in self.streams}
        for worker in view.workers:
            if worker.role == cluster_pb2.ROLE_DECODE:
                for request_id in ours & set(worker.running_requests):
                    self.outcome.owners.setdefault(request_id, worker.name)
        if self.outcome.owners:
            self._placed.set()

    def _victim(self) -> str:
        crash, owners = self.scenario.crash, self.outcome.owners
        if crash.victim not in ("owner", "busiest") and crash.between != "scheduler/owner":
            return self._lab.process_of(crash.victim)
        live = [s.request_id for s in self.streams if not s.over and s.request_id in owners]
        busiest = Counter(owners[request_id] for request_id in live).most_common(1)
        chosen = owners.get(self.streams[crash.stream].request_id)
        if crash.victim != "busiest" and chosen:
            return chosen
        return busiest[0][0] if busiest else "decode-0"

    # --- the crash ---

    async def _on_token(self, stream: Stream, index: int) -> None:
        crash = self.scenario.crash
        due = crash.trigger == "token" and stream is self.streams[crash.stream]
        if due and not self.outcome.struck and index >= (crash.index or 0):
            await self._placed.wait()
            self._strike()

    async def _on_placement(self) -> None:
        await self._placed.wait()
        if self.scenario.crash.trigger == "placed":
            self._strike()

    def _strike(self) -> None:
        crash = self.scenario.crash
        if crash.then:
            self._lab.arm(crash.then)
        victim = self._victim()
        names = [victim, self._lab.process_of(crash.also)] if crash.also else [victim]
        now = time.monotonic()
        if crash.signal == "CUT":
            self._lab.cut(crash.between, victim)
        elif crash.signal == "LOSE":
            self._lab.lose(victim)
        else:
            for name in names:
                self._lab.signal(name, _SIGNALS[crash.signal])
        self.outcome.deaths.extend(Death(name, now) for name in names)
        if crash.signal in ("STOP", "CUT") or (crash.signal == "LOSE" and crash.pause_ms):
            self._help(self._revive())

    async def _revive(self) -> None:
        """Wakes the paused process: after a time, or while its successor is in the middle of the
        same streams, or once that has died too."""
        if pause_ms := self.scenario.crash.pause_ms:
            await asyncio.sleep(pause_ms / 1e3)
            self._lab.revive()
            return
        if self.scenario.crash.expires:
            end = time.monotonic() + RELEASED_S_MAX
            await _until(lambda: not self._unreleased() or time.monotonic() > end)
            self.outcome.leaked_pages = self._unreleased()
            self._lab.revive()
            return
        await asyncio.sleep(ON_ITS_WAY_S)  # what it had sent before it was stopped
        mine = [s for s in self.streams if self.outcome.hit_at(s) and not s.over]
        counts = [len(s.seen) for s in mine]

        def taken_over() -> bool:
            if self.scenario.crash.then:
                return bool(self._lab.fired())
            return any(s.over or len(s.seen) > n for s, n in zip(mine, counts, strict=True))

        await _until(lambda: not mine or taken_over())
        view = await self._connection.view()
        if view is not None:
            self.outcome.quarantined = sum(s.pages_quarantined for s in view.stores)
        self._lab.revive()

    def _unreleased(self) -> int:
        """Pages that the stores still hold for these streams."""
        arenas = [open_arena(directory) for directory in self._lab.arenas]
        ours = [stream.request_id for stream in self.streams]
        found = [(arena, find_stream(arena, name)) for arena in arenas for name in ours]
        return sum(len(announced(r)) * a.layout.groups for a, r in found if r is not None)

    async def _watch(self) -> None:
        """Waits for the failpoint that is the crash."""
        await _until(lambda: bool(self._lab.fired()))
        self._note_failpoints()
        if self.scenario.crash.signal == "STOP":
            for death in self.outcome.deaths:
                self._lab.note_stopped(death.process)
            await self._revive()

    def _note_failpoints(self) -> None:
        """Adds who has reached a failpoint to the deaths."""
        self.outcome.deaths.extend(d for d in self._lab.fired() if d not in self.outcome.deaths)

    # --- afterwards ---

    def _account(
        self, before: cluster_pb2.ClusterView | None, after: cluster_pb2.ClusterView | None
    ) -> None:
        """Fills in what the cluster's own counters say of this run."""
        if before is None or after is None:
            self.outcome.trouble = self.outcome.trouble or "no view"
            return
        pages = pages_in_use(after)
        self.outcome.leaked_pages += max(0, pages - self._lab.leaked)
        self._lab.leaked = pages
        lived = before.scheduler_pid == after.scheduler_pid
        base = before.requests if lived else cluster_pb2.RequestCounts()
        now = after.requests
        self.outcome.stale_refused = now.stale_epoch_refused - base.stale_epoch_refused
        self.outcome.false_suspicions = now.false_suspicions - base.false_suspicions
        self.outcome.leases_expired = of_stores(after, "leases_expired", before)
        usages = [s.finished.usage for s in self.streams if s.finished is not None]
        self.outcome.work = PromptWork(
            computed=now.prompt_tokens_computed - base.prompt_tokens_computed,
            recomputed=now.prompt_tokens_recomputed - base.prompt_tokens_recomputed,
            usage_recomputed=sum(usage.recomputed_tokens for usage in usages),
            due=sum(u.prompt_tokens - u.cached_tokens for u in usages) if lived else self._late(),
            done_by_the_dead=self._done_by_the_dead(),
        )

    def _done_by_the_dead(self) -> int:
        """What a prefill that died or was fenced in mid-chunk had announced: all before the chunk."""
        in_a_chunk = self.scenario.crash.point == "prefill.mid_chunk" and self.outcome.deaths
        return (self.scenario.crash.index or 0) if in_a_chunk else 0

    def _late(self) -> int:
        """Prompt tokens that a scheduler which came back may still have seen computed: those of the
        requests that had given no token when its predecessor died."""
        struck = min((death.at for death in self.outcome.deaths), default=0.0)
        late = [s for s in self.streams if not s.times or s.times[0] >= struck]
        return sum(len(s.ask.token_ids) for s in late)


async def _until(condition: Callable[[], bool]) -> None:
    """Polls a condition that nothing announces; whoever started it cancels it in time."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(POLL_S)
