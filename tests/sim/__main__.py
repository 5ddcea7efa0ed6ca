"""`python -m tests.sim`: seeds of the deterministic simulation.

    python -m tests.sim --seeds 5000 --jobs 2      the first 5000
    python -m tests.sim --seed 4711 -v             one of them, with its story
    python -m tests.sim --mutation epoch-ignored   until a planted bug is found

Exit status 0: nothing found (with --mutation: found). The counts say how often each fault has struck:
one that never happens proves nothing.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
import traceback
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from tests.sim import mutations
from tests.sim.world import run_seed

BATCH = 25
SHOWN_MAX = 20  # failed seeds


@dataclass
class Outcome:
    """What some seeds have shown."""

    seeds: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    failed: list[tuple[int, str]] = field(default_factory=list)


def run_batch(seeds: list[int], mutation: str, stop_at_first: bool) -> Outcome:
    """Runs in a process of its own; its scratch arenas lie in memory."""
    _quiet()
    outcome = Outcome()
    base = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="baton-sim-", dir=base) as directory:
        for seed in seeds:
            outcome.seeds += 1
            with mutations.planted(mutation) if mutation else nullcontext():
                try:
                    outcome.counts += run_seed(seed, Path(directory) / "run").hub.counts
                except Exception as error:  # noqa: BLE001
                    outcome.failed.append((seed, _words(error)))
                    if stop_at_first:
                        break
    return outcome


def _words(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(last.filename).name}:{last.lineno} {last.name}"
    return f"{type(error).__name__}: {str(error)[:300]} ({where})"


def _quiet() -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))


def run_many(first: int, count: int, jobs: int, mutation: str = "") -> Outcome:
    """Seeds `first` to `first + count` - 1; with a mutation, until one has found it."""
    total = Outcome()
    batches = [
        list(range(at, min(at + BATCH, first + count))) for at in range(first, first + count, BATCH)
    ]
    with ProcessPoolExecutor(jobs) as pool:
        waiting = [pool.submit(run_batch, batch, mutation, bool(mutation)) for batch in batches]
        for future in waiting:
            part = future.result()
            total.seeds += part.seeds
            total.counts += part.counts
            total.failed += part.failed
            if mutation and total.failed:
                for other in waiting:
                    other.cancel()
                break
    return total


def show_one(seed: int, verbose: bool, mutation: str) -> int:
    """Replays one seed, with its story."""
    _quiet()
    with (
        tempfile.TemporaryDirectory(prefix="baton-sim-") as directory,
        mutations.planted(mutation) if mutation else nullcontext(),
    ):
        try:
            world = run_seed(seed, Path(directory) / "run", verbose)
        except Exception:  # noqa: BLE001
            traceback.print_exc()
            return 1
    print(f"seed {seed}: nothing found, {dict(world.hub.counts)}")
    return 0


def report(outcome: Outcome, seconds: float, mutation: str) -> int:
    for name, count in sorted(outcome.counts.items()):
        print(f"{count:12,}  {name}")
    extra = f" --mutation {mutation}" if mutation else ""
    for seed, words in outcome.failed[:SHOWN_MAX]:
        print(f"FAILED  {words}\n        python -m tests.sim --seed {seed} -v{extra}")
    rate = outcome.seeds / seconds
    print(
        f"{outcome.seeds} seeds, {len(outcome.failed)} failed, {seconds:.1f} s, {rate:.0f} a second"
    )
    if mutation:
        print(f"{mutation}: {'found' if outcome.failed else 'NOT found'}")
        return 0 if outcome.failed else 1
    return 1 if outcome.failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=2000)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--seed", type=int, help="only this one")
    parser.add_argument("--mutation", choices=sorted(mutations.MUTATIONS), default="")
    parser.add_argument("-v", "--verbose", action="store_true")
    asked = parser.parse_args()
    if asked.seed is not None:
        return show_one(asked.seed, asked.verbose, asked.mutation)
    begin = time.monotonic()
    outcome = run_many(asked.first_seed, asked.seeds, asked.jobs, asked.mutation)
    return report(outcome, time.monotonic() - begin, asked.mutation)


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":  # the order of sets is part of a replay
        os.execve(
            sys.executable, [sys.executable, "-m", "tests.sim", *sys.argv[1:]],
            {**os.environ, "PYTHONHASHSEED": "0"},
        )  # fmt: skip
    sys.exit(main())
