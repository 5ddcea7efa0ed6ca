"""An abort storm: very many requests, each given up at some stage of its life, by Cancel or by its
client's going away. Performs them on one cluster and counts what is left; judges nothing."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import grpc

from baton.chaos.asks import Corpus, ask
from baton.chaos.flip import open_arena
from baton.chaos.footprint import Footprint, footprint, journal_rows, least
from baton.chaos.judge import Verdict, judge_stream
from baton.chaos.lab import POLL_S, Connection, Lab, pages_in_use, rest
from baton.chaos.scenario import Ask
from baton.chaos.stages import STAGES, Watch, Watched, reached
from baton.chaos.streams import STREAM_S_MAX, Stream, follow
from baton.v1 import cluster_pb2, inference_pb2

CANCEL, DISCONNECT = "cancel", "disconnect"
AT_ONCE = 48
PROMPTS = 12  # different ones; tenants keep their pages apart
WANTED, WANTED_SHORT = 160, 8  # tokens: of a request that is to be cut off, and of one near its end
WANTED_LONG = 1400  # of one that would go on for long
WARM_UP = 48
ORPHAN_MS, RETAIN_MS = 300, 4000
SETTLE_S = 2.0  # beyond orphan_ms and retain_ms, for everything to be counted as gone
SAMPLES = 5
_ENDED = ("FINISH_REASON_CANCELLED", "FINISH_REASON_LENGTH")


@dataclass(frozen=True)
class Aim:
    """What is to become of one request."""

    ask: Ask
    stage: str
    how: str


@dataclass
class Left:
    """What is held, counted once everything has had its time to go."""

    pages: int = 0
    streams: int = 0
    worker_streams: int = 0
    readers: int = 0
    stops_unanswered: int = 0
    known: int = 0
    journal_rows: int = 0


@dataclass
class Storm:
    """One storm on one cluster."""

    lab: Lab
    connection: Connection
    rng: Random
    corpus: Corpus
    hits: Counter[tuple[str, str]] = field(default_factory=Counter)  # (stage, how)
    too_late: int = 0  # had ended before it could be given up
    verdict: Verdict = field(default_factory=Verdict)
    story: list[str] = field(default_factory=list)
    left: Left = field(default_factory=Left)
    pages_back_ms: float | None = None  # after the last request was given up; None: they were not
    journal_back_ms: float | None = None
    before: dict[str, Footprint] = field(default_factory=dict)
    after: dict[str, Footprint] = field(default_factory=dict)
    rss_kb: list[dict[str, int]] = field(default_factory=list)  # over time

    def __post_init__(self) -> None:
        self.prompts = [
            dataclasses.replace(
                ask(self.rng, self.corpus, self.rng.randint(150, 500)), max_tokens=WANTED
            )
            for _ in range(PROMPTS)
        ]
        self._tokens: dict[Ask, list[int]] = {}
        self._watch = Watch(open_arena(self.lab.spec.arena_dir(self.lab.spec.stores - 1)))
        self._last_at = 0.0

    async def perform(self, requests: int, tokens_of: Callable[[Ask], list[int]]) -> None:
        """Warm-up, storm, and what is left of it."""
        self._tokens = {prompt: tokens_of(prompt) for prompt in self.prompts}
        watching = asyncio.create_task(self._watch.run())
        try:
            await self._give_up(self._aims(WARM_UP))
            await self._settle()
            self.before = await self._footprints()
            self.hits.clear()
            self.too_late, self.rss_kb = 0, []
            await self._give_up(self._aims(requests))
            await self._settle()
        finally:
            watching.cancel()
        self.after = await self._footprints()

    def _aims(self, count: int) -> list[Aim]:
        """Every stage, either way, in an order of their own."""
        kinds = [(stage, how) for stage in STAGES for how in (CANCEL, DISCONNECT)]
        aims = []
        for number in range(count):
            stage, how = kinds[number % len(kinds)]
            prompt = self.rng.choice(self.prompts)
            wanted = WANTED_SHORT if stage == "finishing" else WANTED
            aims.append(Aim(dataclasses.replace(prompt, max_tokens=wanted), stage, how))
        self.rng.shuffle(aims)
        return aims

    async def abandon(self, requests: int) -> None:
        """Many long requests, all of whose clients go away: what is held once orphan_ms has passed."""
        longer = [dataclasses.replace(prompt, max_tokens=WANTED_LONG) for prompt in self.prompts]
        streams = []
        for number in range(requests):
            name = uuid.uuid4().hex
            streams.append(Stream(longer[number % PROMPTS], name, name, RETAIN_MS, ORPHAN_MS))
        await asyncio.gather(*(self._abandon(stream) for stream in streams))
        self._last_at = time.monotonic()
        await self._until_gone(ORPHAN_MS, lambda left: not left.streams)
        for stream in streams:
            await self._cancel(stream)

    async def _abandon(self, stream: Stream) -> None:
        call = self.connection.inference.Generate(stream.body(), timeout=STREAM_S_MAX)
        await call.read()
        call.cancel()

    async def _give_up(self, aims: Sequence[Aim]) -> None:
        """AT_ONCE at a time."""
        room = asyncio.Semaphore(AT_ONCE)
        sample_every = max(1, len(aims) // 20)

        async def one(number: int, aim: Aim) -> None:
            async with room:
                if number % sample_every == 0:
                    self._sample_rss()
                await self._one(aim)

        await asyncio.gather(*(one(number, aim) for number, aim in enumerate(aims)))

    # --- one request ---

    async def _one(self, aim: Aim) -> None:
        request_id = uuid.uuid4().hex
        stream = Stream(aim.ask, request_id, request_id, RETAIN_MS, ORPHAN_MS)
        watched = self._watch.requests[request_id] = Watched(request_id, aim.ask.max_tokens)
        call = self.connection.inference.Generate(stream.body(), timeout=STREAM_S_MAX)
        reading = asyncio.create_task(self._read(call, stream, watched))
        await reached(watched, aim.stage, lambda: bool(stream.endings))
        self._watch.look()
        stage = watched.stage
        if aim.how == CANCEL:
            hit = await self._cancel(stream)
            await reading
        else:
            hit = not stream.endings
            call.cancel()
            await reading
            self._last_at = time.monotonic()
            await asyncio.sleep(ORPHAN_MS / 1e3 + 0.1)
            stream.seen.clear()
            stream.endings.clear()
            await follow(self.connection, stream)
        del self._watch.requests[request_id]
        if hit:
            self.hits[stage, aim.how] += 1
        else:
            self.too_late += 1
        self._judge(stream)

    async def _read(self, call: grpc.aio.UnaryStreamCall, stream: Stream, watched: Watched) -> None:
        """To the end of the call, whoever ends it."""
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
            async for event in call:
                stream.take(event)
                if event.HasField("token"):
                    watched.tokens = event.token.index + 1
                    if watched.tokens in (1, 2) or watched.tokens >= watched.wanted - 3:
                        self._watch.look()

    async def _cancel(self, stream: Stream) -> bool:
        """Whether the request was still running. One that is not known yet is cancelled as soon as it
        is."""
        request = inference_pb2.CancelRequest(request_id=stream.request_id)
        end = time.monotonic() + STREAM_S_MAX
        while True:  # bounded by the deadline
            try:
                answer = await self.connection.inference.Cancel(request, timeout=STREAM_S_MAX)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.NOT_FOUND or time.monotonic() > end:
                    raise
                await asyncio.sleep(POLL_S)
                continue
            self._last_at = time.monotonic()
            return bool(answer.was_running)

    def _judge(self, stream: Stream) -> None:
        """What came must be the beginning of the undisturbed run, and one final event its end. A
        client that went away before it was heard starts the request anew, and gets all of it."""
        whole = dataclasses.replace(stream.ask, max_tokens=WANTED)
        expected = self._tokens[whole][: len(stream.seen)]
        verdict = judge_stream(stream.seen, stream.endings, expected)
        well = len(stream.endings) == 1 and stream.endings[0] in _ENDED
        self.verdict += dataclasses.replace(verdict, bad_endings=int(not well), wrong_answers=0)
        if not (well and verdict.mismatched == verdict.duplicated == verdict.disordered == 0):
            self.story.append(f"{stream.request_id}: {stream.endings} {stream.story[-3:]}")

    # --- what is left ---

    async def _settle(self) -> None:
        """Waits for pages until orphan_ms has passed, and for the journal until retain_ms has."""
        await self._until_gone(ORPHAN_MS, lambda left: not left.pages)
        self.pages_back_ms = None if self.left.pages else self._since_last_ms()
        gone = Left()
        await self._until_gone(RETAIN_MS, lambda left: left == gone)
        self.journal_back_ms = None if self.left.journal_rows else self._since_last_ms()

    def _since_last_ms(self) -> float:
        return (time.monotonic() - self._last_at) * 1e3

    async def _until_gone(self, after_ms: int, gone: Callable[[Left], bool]) -> None:
        end = self._last_at + after_ms / 1e3 + SETTLE_S
        async for left in self._looks():
            self.left = left
            if gone(left) or time.monotonic() > end:
                return

    async def _looks(self) -> AsyncIterator[Left]:
        while True:
            view = await self.connection.view()
            if view is not None:
                yield self._count(view)
            await asyncio.sleep(POLL_S)

    def _count(self, view: cluster_pb2.ClusterView) -> Left:
        counts = view.requests
        return Left(
            pages=pages_in_use(view), streams=sum(store.streams for store in view.stores),
            worker_streams=sum(worker.streams for worker in view.workers), readers=counts.readers,
            stops_unanswered=counts.stops_unanswered, known=counts.known,
            journal_rows=journal_rows(Path(self.lab.spec.run_dir) / "journal"),
        )  # fmt: skip

    async def _footprints(self) -> dict[str, Footprint]:
        """Of every process, at rest."""
        await rest(self.lab, self.connection)
        samples = []
        for _ in range(SAMPLES):
            samples.append({name: footprint(pid) for name, pid in self._pids().items()})
            await asyncio.sleep(POLL_S)
        return {name: least(sample[name] for sample in samples) for name in samples[0]}

    def _pids(self) -> dict[str, int]:
        entries = self.lab.handle.state()["processes"]
        return {entry["name"]: entry["pid"] for entry in entries}

    def _sample_rss(self) -> None:
        self.rss_kb.append({name: footprint(pid).rss_kb for name, pid in self._pids().items()})
