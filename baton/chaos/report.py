"""From judged runs to figures: percentiles, the table, the JSON object. Pure but for `machine()`."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from baton.chaos.judge import Verdict

COUNTS = (
    "lost", "duplicated", "mismatched", "prompt_tokens_recomputed", "wrong_answers", "epochs_lost",
    "leaked_pages", "leaked_disk_files",
)  # fmt: skip
ZEROS = (*COUNTS, "leaked_shm_files")  # known of whole clusters only, which rows share


@dataclass(frozen=True)
class Result:
    """One run, judged."""

    name: str
    label: str
    verdict: Verdict
    stalls_ms: tuple[float, ...]  # of each stream that was interrupted between two tokens
    streams: int
    hit: int  # streams that the dead process was working for
    reached: bool  # what was to die has died
    only_a_decode: bool = True  # has died, and everything else lives
    trouble: str = ""
    stale_refused: int = 0
    false_suspicions: int = 0  # of processes that were only slow; a pause on purpose counts too
    quarantined: int = 0
    replay: str = ""  # the command, for a run that failed

    @property
    def good(self) -> bool:
        return self.verdict.clean and self.reached and not self.trouble

    def why(self) -> str:
        """What is wrong with it, for people."""
        parts = [] if self.verdict.clean else [self.verdict.story()]
        parts += [] if self.reached else ["the crash did not happen"]
        return "; ".join([*parts, *([self.trouble] if self.trouble else [])]) or "clean"


@dataclass(frozen=True)
class Control:
    """A guard switched off on purpose: its count must not be zero, or the zero proves nothing."""

    counter: str
    guard_off: str
    runs: int
    count: int

    @property
    def works(self) -> bool:
        return self.count > 0


def percentile(values: Iterable[float], q: float) -> float | None:
    """The nearest-rank percentile; None of nothing."""
    ranked = sorted(values)
    return ranked[max(0, math.ceil(q / 100 * len(ranked)) - 1)] if ranked else None


def pauses(results: Iterable[Result]) -> dict[str, float | int | None]:
    """p50 and p99 in milliseconds of all interrupted streams, and how many they are."""
    values = [ms for result in results for ms in result.stalls_ms]
    figures = {f"p{q}": percentile(values, q) for q in (50, 99)}
    rounded = {k: None if v is None else round(v, 1) for k, v in figures.items()}
    return {**rounded, "max": round(max(values), 1) if values else None, "streams": len(values)}


def total(results: Iterable[Result]) -> Verdict:
    return reduce(lambda a, b: a + b, (r.verdict for r in results), Verdict())


def row(results: Sequence[Result]) -> dict[str, Any]:
    """One line of the table of scenarios."""
    counts, stalls = total(results), pauses(results)
    return {
        "runs": len(results),
        "streams": sum(r.streams for r in results),
        "streams_hit": sum(r.hit for r in results),
        "interrupted_streams": sum(len(r.stalls_ms) for r in results),
        "runs_without_interruption": sum(not r.stalls_ms for r in results),
        **{name: getattr(counts, name) for name in COUNTS},
        "stall_ms": stalls,
        "stall_ms_p50": stalls["p50"],
        "stall_ms_p99": stalls["p99"],
        "failures": sum(not r.good for r in results),
    }


def table(
    results: Sequence[Result], group: Callable[[str], str] | None = None
) -> dict[str, dict[str, Any]]:
    """One line per scenario, or per `group` of scenarios."""
    groups: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda r: r.name):
        groups.setdefault(group(result.name) if group else result.name, []).append(result)
    return {name: row(members) for name, members in sorted(groups.items())}


def missed(results: Sequence[Result]) -> str:
    """Complains when most random kills have hit nothing: then the zeros would prove little."""
    aimed = [r for r in results if r.name == "random"]
    misses = sum(not r.stalls_ms for r in aimed)
    return f"{misses} of {len(aimed)} random kills hit no stream" if 2 * misses > len(aimed) else ""


def paired(results: Sequence[Result], reprefilled: Sequence[Result]) -> dict[str, Any]:
    """Pauses when a decode dies, of the control that computes the prompt again, of takeover in the
    same runs as that control, and of runs in which several processes die or another one."""
    labels = {result.label for result in reprefilled}
    same = [result for result in results if result.label in labels]
    return {
        "stall_ms": pauses(result for result in results if result.only_a_decode),
        "reprefill_ms": pauses(reprefilled),
        "stall_ms_of_the_same_runs": pauses(same),
        "stall_ms_when_more_dies": pauses(r for r in results if not r.only_a_decode),
    }


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in info if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load_1m": round(os.getloadavg()[0], 2),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def failures(results: Iterable[Result]) -> list[dict[str, str]]:
    bad = [r for r in results if not r.good]
    return [{"run": r.label, "why": r.why(), "replay": r.replay} for r in bad]
