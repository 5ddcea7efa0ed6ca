"""A whole `baton chaos` command: clusters, the reference, many runs, the controls, the verdict."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from baton.chaos import leftovers, report
from baton.chaos.asks import read_corpus
from baton.chaos.failures import Guard
from baton.chaos.judge import Verdict, judge_stream, recomputed
from baton.chaos.lab import Lab
from baton.chaos.plan import draw
from baton.chaos.reference import ReferenceProcess
from baton.chaos.report import Control, Result
from baton.chaos.runner import Outcome, Run
from baton.chaos.scenario import Ask, Scenario
from baton.chaos.setups import SETUPS
from baton.cluster import ClusterSpec, default_model

CONTROL_RUNS_MAX = 5


@dataclass(frozen=True)
class Settings:
    """What the command line says."""

    model: str
    seed: int
    medium: str = "shm"
    record: Path | None = None
    keys_dir: str = ""


@dataclass
class Session:
    """Owns a directory below /tmp and the reference process; use as a context manager."""

    settings: Settings
    results: list[Result] = field(default_factory=list)
    controls: list[Control] = field(default_factory=list)
    reprefilled: list[Result] = field(default_factory=list)
    good: bool = False  # what it gave has been looked at, and keeps no log
    leaked_shm_files: int = 0  # of all clusters with every guard on
    skipped: dict[str, str] = field(default_factory=dict)  # rows that cannot be had here, and why

    def __enter__(self) -> Session:
        for left in leftovers.remove():
            say(f"{left} was left behind by a run that was killed: removed")
        self._root = leftovers.Root()
        self.root = self._root.path
        say(f"working in {self.root}")
        self._reference = ReferenceProcess(self.settings.model)
        self._clusters = 0
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._reference.close()
        keep = kind is not None or not self.good
        self._root.close(keep=keep)
        if keep:
            say(f"logs and recordings are kept in {self.root}")

    # --- runs ---

    def perform(self, scenarios: Iterable[Scenario]) -> list[Result]:
        """Runs scenarios, those of one configuration on one cluster, and keeps what they gave."""
        groups: dict[tuple[tuple[str, ...], str, str], list[Scenario]] = {}
        for scenario in scenarios:
            kind = (scenario.unsafe, scenario.recover, scenario.setup)
            groups.setdefault(kind, []).append(scenario)
        found: list[Result] = []
        for group in groups.values():
            results, files = asyncio.run(self._on_one_cluster(group))
            found += results
            self.leaked_shm_files += files
        return found

    def spec(
        self, setup: str, unsafe: tuple[str, ...] = (), recover: str = "takeover"
    ) -> ClusterSpec:
        """A cluster of its own."""
        self._clusters += 1
        spec = ClusterSpec(
            run_dir=str(self.root / str(self._clusters)), model=self.settings.model,
            medium=self.settings.medium, listen="127.0.0.1:0", recover=recover, unsafe=unsafe,
            keys_dir=self.settings.keys_dir,
        )  # fmt: skip
        return SETUPS[setup].applied(spec)

    def tokens_of(self, ask: Ask) -> list[int]:
        """The undisturbed run's."""
        return self._reference.tokens(ask)

    async def _on_one_cluster(
        self, scenarios: Sequence[Scenario], until: str = ""
    ) -> tuple[list[Result], int]:
        """Runs scenarios of one kind. Stops early once the count named `until` has moved. Gives also
        the files that the cluster has left behind."""
        found: list[Result] = []
        first = scenarios[0]
        spec = self.spec(first.setup, first.unsafe, first.recover)
        with Lab(spec, SETUPS[first.setup]) as lab:
            connection = lab.connect()
            for number, scenario in enumerate(scenarios, 1):
                expected = [self.tokens_of(ask) for ask in scenario.requests]
                outcome = await Run(lab, connection, scenario).perform()
                result = self._judge(outcome, expected)
                found.append(result)
                say(f"{number}/{len(scenarios)} {scenario.label} {_line(outcome, result)}")
                if getattr(result.verdict, until, 0) > 0:
                    break
            await connection.close()
        return found, lab.leaked_shm_files

    def _judge(self, outcome: Outcome, expected: Sequence[Sequence[int]]) -> Result:
        scenario = outcome.scenario
        verdict = Verdict(leaked_pages=outcome.leaked_pages)
        for stream, tokens in zip(outcome.streams, expected, strict=True):
            verdict += judge_stream(stream.seen, stream.endings, tokens)
            if stream.breaks and not (scenario.crash.kills_scheduler or scenario.crash.expires):
                verdict += Verdict(broken_streams=1)
            if scenario.crash.keeps_epoch and stream.timing is not None:
                verdict += Verdict(epochs_lost=stream.timing.takeovers)
        if outcome.work is not None and scenario.crash.counts_the_prompt:
            verdict += Verdict(prompt_tokens_recomputed=recomputed(outcome.work))
        trouble = outcome.trouble
        if scenario.crash.keeps_epoch and not outcome.false_suspicions:
            trouble = trouble or "the false suspicion was not counted"
        if scenario.crash.expires and not outcome.leases_expired:
            trouble = trouble or "no lease has run out"
        result = Result(
            scenario.name, scenario.label, verdict, tuple(outcome.stalls_ms()),
            len(outcome.streams), outcome.streams_hit(), outcome.reached,
            scenario.crash.only_a_decode, trouble, outcome.stale_refused,
            outcome.false_suspicions, outcome.quarantined,
        )  # fmt: skip
        control = scenario.unsafe or scenario.recover != "takeover"
        if self.settings.record is not None and not control:
            scenario.write(self.settings.record)
        if result.good or control:
            return result
        path = scenario.write(self.root / "failed")
        for stream in outcome.streams:
            if stream.story:
                say(f"  {stream.request_id}: {stream.endings} {stream.story}")
        return dataclasses.replace(result, replay=self._replay(path))

    def _replay(self, path: Path) -> str:
        """The command that performs a recording again as it was performed here."""
        words = ["baton chaos replay", str(path)]
        if self.settings.medium != "shm":
            words.append(f"--medium {self.settings.medium}")
        if self.settings.model != default_model():
            words.append(f"--model {self.settings.model}")
        return " ".join(words)

    # --- controls ---

    def run_controls(self, guards: Mapping[str, Guard], seed: int, runs: int) -> None:
        """Switches each guard off in turn, on a cluster of its own."""
        corpus = read_corpus(self.settings.model)
        for name, guard in guards.items():
            counter = guard.counter or name
            whole = counter == "leaked_shm_files"  # known when the cluster has ended
            numbers = range(1 if whole else CONTROL_RUNS_MAX)
            drawn = [draw(guard.scenario, seed, run, corpus) for run in numbers]
            scenarios = [dataclasses.replace(s, unsafe=guard.unsafe) for s in drawn]
            found, files = asyncio.run(self._on_one_cluster(scenarios, until=counter))
            count = files if whole else getattr(report.total(found), counter)
            self.controls.append(self.control(name, guard.unsafe, len(found), count))
        same = [draw("random", seed, run, corpus) for run in self._random_runs(max(5, runs // 10))]
        found = self.perform(dataclasses.replace(s, recover="reprefill") for s in same)
        count = report.total(found).prompt_tokens_recomputed
        self.controls.append(
            Control("prompt_tokens_recomputed", "--recover=reprefill", len(found), count)
        )
        self.reprefilled = [self._forgive(result) for result in found]

    def _random_runs(self, count: int) -> list[int]:
        """Run numbers of random kills, those that were performed first."""
        done = [int(r.label.rpartition("-")[2]) for r in self.results if r.name == "random"]
        return [*done, *range(len(self.results), len(self.results) + count)][:count]

    @staticmethod
    def control(name: str, unsafe: tuple[str, ...], runs: int, count: int) -> Control:
        """What has become of a count with guards off."""
        found = Control(name, f"--unsafe={','.join(unsafe)}", runs, count)
        say(f"control {found.guard_off}: {name} {count}")
        return found

    @staticmethod
    def _forgive(result: Result) -> Result:
        """Recomputation is what that control does; everything else still counts."""
        kept = dataclasses.replace(result.verdict, prompt_tokens_recomputed=0)
        return dataclasses.replace(result, verdict=kept)

    # --- the verdict ---

    def problems(self) -> list[str]:
        """Why the command fails; nothing when every promise was kept and every control moved."""
        found = [f"{r.label}: {r.why()}" for r in self.results if not r.good]
        found += [f"reprefill {r.label}: {r.why()}" for r in self.reprefilled if not r.good]
        found += [
            f"control {c.guard_off}: {c.counter} stayed 0" for c in self.controls if not c.works
        ]
        found += [miss] if (miss := report.missed(self.results)) else []
        if self.leaked_shm_files:
            found.append(f"{self.leaked_shm_files} files were left in shared memory")
        zombies = [r for r in self.results if r.name.startswith("zombie")]
        if zombies and not sum(r.stale_refused for r in zombies):
            found.append("no woken decode was ever refused")
        return found

    def summary(self, group: Callable[[str], str] | None = None) -> dict[str, Any]:
        """The JSON object; its table has one line per `group` of scenarios."""
        counts = report.total(self.results)
        everything = [*self.results, *self.reprefilled]
        return {
            "runs": len(self.results),
            "seed": self.settings.seed,
            "medium": self.settings.medium,
            **{name: getattr(counts, name) for name in report.COUNTS},
            "disordered": counts.disordered,
            "bad_endings": counts.bad_endings,
            "broken_streams": counts.broken_streams,
            "leaked_shm_files": self.leaked_shm_files,
            "streams": sum(r.streams for r in self.results),
            "streams_hit": sum(r.hit for r in self.results),
            "interrupted_streams": sum(len(r.stalls_ms) for r in self.results),
            "stale_epoch_refused": sum(r.stale_refused for r in self.results),
            "false_suspicions": sum(r.false_suspicions for r in self.results),
            "quarantined_pages_max": max((r.quarantined for r in self.results), default=0),
            **report.paired(self.results, self.reprefilled),
            "scenarios": report.table(self.results, group),
            "controls": {
                c.counter: {"guard_off": c.guard_off, "runs": c.runs, "count": c.count}
                for c in self.controls
            },
            "controls_ok": all(c.works for c in self.controls) if self.controls else None,
            "machine": report.machine(),
            "skipped": self.skipped,
            "failures": report.failures(everything),
            "problems": self.problems(),
        }


def _line(outcome: Outcome, result: Result) -> str:
    stalls = "/".join(f"{ms:.0f}" for ms in result.stalls_ms) or "none"
    dead = "+".join(death.process for death in outcome.deaths) or "nobody"
    return f"killed {dead}, stalls {stalls} ms: {result.why()}"


def say(line: str) -> None:
    """Progress, for people."""
    print(line, file=sys.stderr, flush=True)
