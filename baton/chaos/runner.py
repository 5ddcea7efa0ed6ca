"""Performs one scenario on a live cluster and writes down what a client sees, event by event.

Streams are read off the wire without the client library, whose own filter would hide a duplicate. Only
when a stream itself breaks, because the scheduler died, does it ask again as that library does.
"""

from __future__ import annotations

import asyncio
import signal
import time
import uuid
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import grpc

from baton.chaos.judge import PromptWork, stall_s
from baton.chaos.lab import POLL_S, Connection, Death, Lab, pages_in_use, rest
from baton.chaos.scenario import Ask, Scenario
from baton.v1 import cluster_pb2, inference_pb2

STREAM_S_MAX = 90.0
RETRY_S = 0.05
ON_ITS_WAY_S = 0.2
_BROKEN = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
_SIGNALS = {"KILL": signal.SIGKILL, "STOP": signal.SIGSTOP}


@dataclass
class Stream:
    """One request as the client sees it; times are of this machine's monotonic clock."""

    ask: Ask
    request_id: str
    seen: list[tuple[int, int]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    endings: list[str] = field(default_factory=list)
    finished: inference_pb2.Finished | None = None
    story: list[str] = field(default_factory=list)
    breaks: int = 0  # times that the call ended without a final event
    over: bool = False

    @property
    def timing(self) -> inference_pb2.Timing | None:
        return None if self.finished is None else self.finished.timing

    @property
    def next_index(self) -> int:
        return max((index for index, _ in self.seen), default=-1) + 1

    def body(self) -> inference_pb2.GenerateRequest:
        ask = self.ask
        return inference_pb2.GenerateRequest(
            request_id=self.request_id, token_ids=inference_pb2.TokenIds(ids=ask.token_ids),
            sampling=inference_pb2.SamplingParams(
                max_tokens=ask.max_tokens, temperature=ask.temperature, top_p=ask.top_p,
                top_k=ask.top_k, seed=ask.seed, ignore_eos=True,
            ),
        )  # fmt: skip

    def take(self, event: inference_pb2.GenerateEvent) -> None:
        kind = event.WhichOneof("event")
        if kind == "token":
            self.seen.append((event.token.index, event.token.token_id))
            self.times.append(time.monotonic())
        elif kind == "finished":
            self.finished = event.finished
            self.endings.append(inference_pb2.FinishReason.Name(event.finished.reason))
        else:
            self.endings.append(event.failed.code)
            self.story.extend([event.failed.message, *event.failed.story])


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
    quarantined: int = 0  # pages, the most that was seen
    trouble: str = ""  # why the cluster did not come to rest
    leaked_pages: int = 0

    @property
    def struck(self) -> bool:
        return bool(self.deaths)

    @property
    def reached(self) -> bool:
        """Whether everything that was to die has died."""
        crash = self.scenario.crash
        return len(self.deaths) >= 1 + bool(crash.also or crash.then)

    def hit_at(self, stream: Stream) -> float | None:
        """When the process that worked for this stream died; None when it has not."""
        owner = self.owners.get(stream.request_id)
        breaks = {"scheduler"} if self.scenario.crash.kills_scheduler else set()
        if not self.scenario.crash.spares_the_prompt:
            breaks.add("prefill-0")
        return min((d.at for d in self.deaths if d.process in {owner, *breaks}), default=None)

    def streams_hit(self) -> int:
        """Streams that were going on when what worked for them died; prefill makes one token."""
        works_until = -1 if self.scenario.crash.spares_the_prompt else 0
        pairs = [(stream.times, self.hit_at(stream)) for stream in self.streams]
        return sum(at is not None and (not t or t[works_until] > at) for t, at in pairs)

    def stalls_ms(self) -> list[float]:
        """The pause of each stream that was interrupted between two tokens."""
        found = []
        for stream in self.streams:
            at, timing = self.hit_at(stream), stream.timing
            spared = timing is not None and not timing.takeovers  # all its tokens were on their way
            if at is None or (spared and not self.scenario.crash.kills_scheduler):
                continue
            found.append(stall_s(stream.times, at))
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
        end = time.monotonic() + STREAM_S_MAX
        while not stream.endings and (left := end - time.monotonic()) > 0:
            call = self._open(stream, left)
            try:
                async for event in call:
                    stream.take(event)
                    if event.HasField("token"):
                        await self._on_token(stream, event.token.index)
            except grpc.aio.AioRpcError as error:
                if error.code() not in _BROKEN:
                    stream.endings.append(error.code().name)
                    stream.story.append(str(error.details()))
            if not stream.endings:
                stream.breaks += 1
                await asyncio.sleep(RETRY_S)
        stream.over = True

    def _open(self, stream: Stream, timeout: float) -> grpc.aio.UnaryStreamCall:
        if not stream.seen:
            return self._connection.inference.Generate(stream.body(), timeout=timeout)
        request = inference_pb2.ResumeRequest(
            request_id=stream.request_id, from_index=stream.next_index
        )
        return self._connection.inference.Resume(request, timeout=timeout)

    # --- who runs what ---

    async def _look(self) -> None:
        """Keeps the owners known from before the crash until every request has one."""
        while not self.outcome.struck:
            view = await self._connection.view()
            if view is not None and not self.outcome.struck:
                self._read_owners(view)
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
        if crash.victim == "prefill":
            return self._lab.process_of("prefill")
        live = [s.request_id for s in self.streams if not s.over and s.request_id in owners]
        busiest = Counter(owners[request_id] for request_id in live).most_common(1)
        chosen = owners.get(self.streams[crash.stream].request_id)
        if crash.victim == "owner" and chosen:
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
        for name in names:
            self._lab.signal(name, _SIGNALS[crash.signal])
        self.outcome.deaths.extend(Death(name, now) for name in names)
        if crash.signal == "STOP":
            self._help(self._revive())

    async def _revive(self) -> None:
        """Wakes the paused process: after a time, or while its successor is in the middle of the
        same streams, or once that has died too."""
        if pause_ms := self.scenario.crash.pause_ms:
            await asyncio.sleep(pause_ms / 1e3)
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
        self.outcome.leaked_pages = max(0, pages - self._lab.leaked)
        self._lab.leaked = pages
        lived = before.scheduler_pid == after.scheduler_pid
        base = before.requests if lived else cluster_pb2.RequestCounts()
        now = after.requests
        self.outcome.stale_refused = now.stale_epoch_refused - base.stale_epoch_refused
        self.outcome.false_suspicions = now.false_suspicions - base.false_suspicions
        usages = [s.finished.usage for s in self.streams if s.finished is not None]
        self.outcome.work = PromptWork(
            computed=now.prompt_tokens_computed - base.prompt_tokens_computed,
            recomputed=now.prompt_tokens_recomputed - base.prompt_tokens_recomputed,
            usage_recomputed=sum(usage.recomputed_tokens for usage in usages),
            due=sum(u.prompt_tokens - u.cached_tokens for u in usages) if lived else self._late(),
        )

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
