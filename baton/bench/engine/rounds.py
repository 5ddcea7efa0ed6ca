"""What is measured, and the rounds: each engine in its turn, each round in another order."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from baton.bench.engine import engines
from baton.bench.engine.cache import Cache
from baton.bench.engine.engines import Setup
from baton.bench.engine.players import Player, PlayerFailed, missing
from baton.bench.engine.shapes import SHAPES, Shape

STEPS_MIN, STEPS_MAX, PROBE_STEPS = 4, 64, 4
AGREE_TOKENS = list(range(17, 33))
READ = "read"  # the engine's packed weights, read and nothing else
PEAK = "peak"  # a large matrix product


@dataclass(frozen=True)
class Case:
    """`decode-8@512`: 8 streams, each with 512 tokens of context; `prefill-2048`: one prompt."""

    name: str

    @property
    def decode(self) -> tuple[int, int]:
        streams, _, context = self.name.removeprefix("decode-").partition("@")
        return int(streams), int(context)

    @property
    def is_decode(self) -> bool:
        return self.name.startswith("decode-")

    @property
    def prompt(self) -> int:
        return 0 if self.is_decode else int(self.name.removeprefix("prefill-"))


@dataclass(frozen=True)
class Cell:
    """What is compared with one another: one shape in one format with so many threads."""

    shape: str
    format: str
    threads: int

    def __str__(self) -> str:
        return f"{self.shape} {self.format} {self.threads}t"


@dataclass(frozen=True)
class Sample:
    """One engine, one case, one round. `rate`: tokens per second of all streams; of `read`, GB/s; of
    `peak`, GFLOP/s."""

    shape: str
    format: str
    threads: int
    case: str
    engine: str
    round: int
    rate: float


@dataclass
class Measured:
    """All cells so far."""

    samples: list[Sample] = field(default_factory=list)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)  # "cell engine" -> its facts
    skipped: dict[str, str] = field(default_factory=dict)  # engine, or "cell engine" -> why
    agreement: dict[str, float] = field(default_factory=dict)  # cell -> cosine


def measure(
    options: argparse.Namespace, cells: Iterable[Cell], cases: list[Case], cache: Cache, log: Path
) -> Measured:
    """Every cell after the other; those of one are interleaved."""
    measured = Measured()
    measured.skipped = dict.fromkeys(options.without, "left out")
    present = []
    for name in engines.MODULES:
        if name not in measured.skipped:
            why = missing(name, Path(options.peers))
            measured.skipped.update({name: why} if why else {})
            present += [] if why else [name]
    for cell in cells:
        began = time.monotonic()
        with ExitStack() as stack:
            players = _players(stack, options, cell, cases, cache, log, present, measured)
            _agree(cell, players, measured)
            run = _Run(cell, cases, players, measured, options.sample_s)
            run.rounds(options.rounds)
            run.memory()
        print(f"{cell}: {time.monotonic() - began:.0f} s", file=sys.stderr)
    return measured


def setup_of(engine: str, cell: Cell, cases: list[Case], cache: Cache, cores: list[int]) -> Setup:
    """What the engine needs to run these cases; makes its files where they are not there."""
    shape = SHAPES[cell.shape]
    decodes = [case.decode for case in cases if case.is_decode]
    return Setup(
        engine=engine, shape=cell.shape, format=cell.format, threads=cell.threads,
        cores=cores, checkpoint=str(cache.checkpoint(shape)),
        weights=_weights(engine, shape, cell.format, cache),
        contexts=sorted({context for _, context in decodes}),
        streams_max=max((streams for streams, _ in decodes), default=1),
        prefill_max=max((case.prompt for case in cases), default=0),
    )  # fmt: skip


def _weights(engine: str, shape: Shape, format_: str, cache: Cache) -> str:
    """The engine's own file, where it does not read the checkpoint; a peer that converts by itself is
    given a directory that is there once it has done so."""
    if engine == engines.LLAMA:
        return str(cache.gguf(shape, format_))
    if engine == engines.BATON:
        return str(cache.place(f"{shape.name}-packed"))
    if engine == engines.VLLM:
        return str(cache.root)
    return str(cache.place(f"{shape.name}-{format_}-{engine}"))


def _players(
    stack: ExitStack, options: argparse.Namespace, cell: Cell, cases: list[Case], cache: Cache,
    log: Path, present: list[str], measured: Measured,
) -> list[Player]:  # fmt: skip
    """Everybody who can take part. vLLM takes part at any format, with its own."""
    players = []
    for name in present:
        if cell.format not in engines.MODULES[name][2] and name != engines.VLLM:
            continue
        cores = options.cores[-cell.threads :]
        try:
            setup = setup_of(name, cell, cases, cache, cores)
            player = stack.enter_context(Player(setup, Path(options.peers), log))
        except PlayerFailed as error:
            measured.skipped[f"{cell} {name}"] = str(error)
            continue
        measured.facts[f"{cell} {name}"] = player.facts
        players.append(player)
    return players


def _agree(cell: Cell, players: list[Player], measured: Measured) -> None:
    """That two engines compute the same model: the cosine of their logits after a few tokens."""
    logits = {}
    for player in players:
        if player.name in (engines.BATON, engines.LLAMA):
            try:
                logits[player.name] = np.array(player.call("logits", AGREE_TOKENS))
            except PlayerFailed as error:
                measured.skipped[f"{cell} logits {player.name}"] = str(error)
    if len(logits) == 2:
        a, b = logits.values()
        cosine = float(a @ b / np.sqrt((a @ a) * (b @ b)))
        measured.agreement[f"{cell.shape} {cell.format}"] = round(cosine, 5)


class _Run:
    """The rounds of one cell. An engine that fails at something is not asked for it again."""

    def __init__(
        self, cell: Cell, cases: list[Case], players: list[Player], measured: Measured,
        sample_s: float,
    ) -> None:  # fmt: skip
        self._cell, self._cases, self._players = cell, cases, players
        self._measured, self._sample_s = measured, sample_s
        self._steps: dict[tuple[str, str], int] = {}  # of a sample, by engine and case
        self._failed: set[tuple[str, str]] = set()

    def rounds(self, count: int) -> None:
        """The first one more than `count` warms up, and tells how many steps fill a sample."""
        for number in range(count + 1):
            turn = number % max(1, len(self._players))
            order = self._players[turn:] + self._players[:turn]
            for case in self._cases:
                for player in order:
                    if "measures" not in player.facts:
                        self._take(player, case.name, number, partial(self._rate, player, case))
            for player in order:
                if "weight_bytes" in player.facts:
                    self._take(player, READ, number, partial(_read, player))
                if player.facts.get("measures") == PEAK:
                    self._take(player, PEAK, number, partial(player.call, "peak"))

    def memory(self) -> None:
        """What each process has come to hold."""
        for player in self._players:
            if player.process.poll() is None:
                name = f"{self._cell} {player.name}"
                self._measured.facts[name]["rss"] = player.call("memory")

    def _take(self, player: Player, case: str, number: int, take: Callable[[], Any]) -> None:
        if (player.name, case) in self._failed:
            return
        try:
            rate = take()
        except PlayerFailed as error:
            self._failed.add((player.name, case))
            self._measured.skipped[f"{self._cell} {case} {player.name}"] = str(error)
            return
        if number and rate is not None:
            shape, format_, threads = self._cell.shape, self._cell.format, self._cell.threads
            sample = Sample(shape, format_, threads, case, player.name, number, float(rate))
            self._measured.samples.append(sample)

    def _rate(self, player: Player, case: Case) -> float | None:
        """Tokens per second; None where the engine has no such case."""
        if not case.is_decode:
            return case.prompt / float(player.call("prefill", case.prompt))
        streams, context = case.decode
        if streams > player.facts.get("streams_max", streams):
            return None
        key = (player.name, case.name)
        times: list[float] = player.call(
            "decode", streams, context, self._steps.get(key, PROBE_STEPS)
        )
        steps = round(self._sample_s / min(times))
        self._steps.setdefault(key, max(STEPS_MIN, min(STEPS_MAX, steps)))
        return streams * len(times) / sum(times)


def _read(player: Player) -> float:
    """GB/s of a plain read of Baton's packed weights, by its own threads."""
    return float(player.facts["weight_bytes"]) / float(player.call("read")) / 1e9
