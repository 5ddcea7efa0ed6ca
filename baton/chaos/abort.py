"""`baton chaos abort-storm`: one storm, the controls, and the JSON object. `storm` performs it."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from baton.chaos import report
from baton.chaos.asks import read_corpus
from baton.chaos.footprint import Footprint, grown
from baton.chaos.lab import Lab
from baton.chaos.report import Control
from baton.chaos.session import Session
from baton.chaos.stages import STAGES
from baton.chaos.storm import CANCEL, DISCONNECT, ORPHAN_MS, RETAIN_MS, SETTLE_S, Left, Storm

CONTROL_REQUESTS = 60
ABANDONED = 12
RSS_KB_MAX = 8192  # growth of one process from the storm's middle to its end
THREADS_SLACK = 2  # of pools that grow and shrink by themselves
CONTROLS = {
    "leaked_pages": (("quarantine",), "pages"),
    "leaked_journal_rows": (("journal",), "journal_rows"),
}


def perform(session: Session, requests: int, unsafe: tuple[str, ...] = ()) -> Storm:
    """One storm on a cluster of its own; 0 requests: clients of long ones only go away."""
    return asyncio.run(_perform(session, requests, unsafe))


async def _perform(session: Session, requests: int, unsafe: tuple[str, ...]) -> Storm:
    rng = Random(f"{session.settings.seed}/storm")
    corpus = read_corpus(session.settings.model)
    with Lab(session.spec("standard", unsafe)) as lab:
        connection = lab.connect()
        storm = Storm(lab, connection, rng, corpus)
        if requests:
            await storm.perform(requests, session.tokens_of)
        else:
            await storm.abandon(ABANDONED)
        await connection.close()
    if not unsafe:
        session.leaked_shm_files += lab.leaked_shm_files
    return storm


def controls(session: Session) -> list[Control]:
    """Each guard off once."""
    found = []
    for counter, (unsafe, left) in CONTROLS.items():
        storm = perform(session, CONTROL_REQUESTS, unsafe)
        count = getattr(storm.left, left)
        found.append(session.control(counter, unsafe, CONTROL_REQUESTS, count))
    storm = perform(session, 0, ("orphan",))
    found.append(session.control("leaked_streams", ("orphan",), ABANDONED, storm.left.streams))
    return found


def summary(session: Session, storm: Storm, found: Sequence[Control]) -> dict[str, Any]:
    """The JSON object."""
    settings, verdict = session.settings, storm.verdict
    replay = f"baton chaos abort-storm --seed {settings.seed} --medium {settings.medium}"
    problems = _problems(storm)
    problems += [f"control {c.guard_off}: {c.counter} stayed 0" for c in found if not c.works]
    if session.leaked_shm_files:
        problems.append(f"{session.leaked_shm_files} files were left in shared memory")
    return {
        "seed": settings.seed,
        "medium": settings.medium,
        "requests": sum(storm.hits.values()) + storm.too_late,
        "hit": sum(storm.hits.values()),
        "too_late": storm.too_late,
        "stages": {
            stage: {how: storm.hits[stage, how] for how in (CANCEL, DISCONNECT)} for stage in STAGES
        },
        "orphan_ms": ORPHAN_MS,
        "retain_ms": RETAIN_MS,
        "settle_ms": SETTLE_S * 1e3,
        "pages_back_ms": _rounded(storm.pages_back_ms),
        "journal_back_ms": _rounded(storm.journal_back_ms),
        **{f"leaked_{name}": count for name, count in dataclasses.asdict(storm.left).items()},
        "leaked_fds": sum(grown(storm.before, storm.after, "fds").values()),
        "leaked_threads": sum(grown(storm.before, storm.after, "threads").values()),
        "leaked_shm_files": session.leaked_shm_files,
        "rss_kb_grown_late": rss_grown_late(storm.rss_kb),
        **{name: getattr(verdict, name) for name in ("duplicated", "mismatched", "disordered")},
        "bad_endings": verdict.bad_endings,
        "processes": {
            name: {
                "before": dataclasses.asdict(was),
                "after": dataclasses.asdict(storm.after[name]),
            }
            for name, was in storm.before.items()
        },
        "controls": {
            c.counter: {"guard_off": c.guard_off, "runs": c.runs, "count": c.count} for c in found
        },
        "machine": report.machine(),
        "failures": [{"run": "storm", "why": why, "replay": replay} for why in problems],
        "problems": problems,
    }


def rss_grown_late(samples: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """By how many KiB each process has grown from the middle of the storm to its end: what a storm
    needs at once it has taken by then, so that what still grows is leaked."""
    if len(samples) < 4:
        return {}
    quarter = len(samples) // 4
    middle, end = samples[2 * quarter : 3 * quarter], samples[-quarter:]
    return {name: min(s[name] for s in end) - min(s[name] for s in middle) for name in samples[0]}


def _problems(storm: Storm) -> list[str]:
    found = []
    if storm.left != Left():
        held = [f"{n} {count}" for n, count in dataclasses.asdict(storm.left).items() if count]
        found.append(f"still held: {', '.join(held)}")
    if not storm.verdict.clean:
        found.append(f"{storm.verdict.story()}: {'; '.join(storm.story[:3])}")
    missing = [
        f"{stage} by {how}"
        for stage in STAGES
        for how in (CANCEL, DISCONNECT)
        if not storm.hits[stage, how]
    ]
    found += [f"no request was given up: {', '.join(missing)}"] if missing else []
    found += _growth(storm.before, storm.after, storm.rss_kb)
    return found


def _growth(
    before: Mapping[str, Footprint], after: Mapping[str, Footprint],
    rss_kb: Sequence[Mapping[str, int]],
) -> list[str]:  # fmt: skip
    fds = grown(before, after, "fds")
    threads = {n: c for n, c in grown(before, after, "threads").items() if c > THREADS_SLACK}
    memory = {n: kb for n, kb in rss_grown_late(rss_kb).items() if kb > RSS_KB_MAX}
    held = {"descriptors": fds, "threads": threads, "KiB of memory": memory}
    return [f"more {what} than before: {more}" for what, more in held.items() if more]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)
