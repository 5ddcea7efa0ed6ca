"""From samples to medians, ratios within a round, and what was aimed at. Pure."""

from __future__ import annotations

import statistics
from typing import Any

from baton.bench.figures import quartiles
from baton.bench.kv.ways import Sample
from baton.bench.kv.world import KIB, MIB

GOAL_RUN_BYTES_MIN = MIB


def summary(samples: list[Sample], runs: list[int]) -> dict[str, Any]:
    """`results`: quartiles of every way and run length; `goals`: ratios within each round."""
    by_cell: dict[tuple[str, int], dict[int, Sample]] = {}
    for sample in samples:
        by_cell.setdefault((sample.operation, sample.run_bytes), {})[sample.round] = sample
    results = [
        {
            "way": way, "run_bytes": run,
            "gb_per_s": quartiles(s.gb_per_s for s in cell.values()),
            "cpu_s_per_gb": quartiles(s.cpu_s_per_gb for s in cell.values()),
        }
        for (way, run), cell in by_cell.items()
    ]  # fmt: skip
    goals = []
    for text, ours, theirs, at_least in GOALS:
        for run in (run for run in runs if run >= GOAL_RUN_BYTES_MIN):
            ratio = _ratio(by_cell, ours, theirs, run)
            if ratio:
                goals.append(
                    {
                        "goal": text, "run_bytes": run, "ratio": ratio, "at_least": at_least,
                        "met": ratio[1] >= at_least,
                    }
                )  # fmt: skip
    return {"results": results, "goals": goals}


# (what, our way, the ways to compare with, ratio of medians at least)
_GRPC = ("grpc sync {0}", "grpc aio {0}")
_MOONCAKE = ("mooncake {0} x1", "mooncake {0} x16")
GOALS: list[tuple[str, str, tuple[str, ...], float]] = [
    ("shm / memcpy", "shm", ("memcpy",), 0.8),
    ("shm + checksums / memcpy + checksums", "shm + checksums", ("memcpy + checksums",), 0.9),
    ("read in place / verify alone", "shm read in place", ("verify",), 0.9),
]
for _op in ("put", "get"):
    GOALS += [
        (
            f"zmq tcp {_op} / grpc",
            f"zmq tcp {_op}",
            tuple(way.format(_op) for way in _GRPC),
            2.0,
        ),
        (
            f"zmq tcp {_op} / mooncake",
            f"zmq tcp {_op}",
            tuple(way.format(_op) for way in _MOONCAKE),
            1.0,
        ),
    ]


def _ratio(
    by_cell: dict[tuple[str, int], dict[int, Sample]], ours: str, theirs: tuple[str, ...], run: int
) -> list[float]:
    """Quartiles of our speed over the best of theirs, round by round; the best by its median."""
    mine = by_cell.get((ours, run))
    others = [by_cell[way, run] for way in theirs if (way, run) in by_cell]
    if not mine or not others:
        return []
    best = max(others, key=lambda cell: statistics.median(s.gb_per_s for s in cell.values()))
    return quartiles(mine[n].gb_per_s / best[n].gb_per_s for n in mine)


def table(result: dict[str, Any]) -> str:
    """Median GB/s and CPU seconds per GB, for people."""
    runs = sorted({row["run_bytes"] for row in result["results"]})
    head = "".join(f"{_size(run):>16}" for run in runs)
    lines = [f"{'GB/s (CPU s per GB)':<24}{head}"]
    ways = dict.fromkeys(row["way"] for row in result["results"])
    cells = {(row["way"], row["run_bytes"]): row for row in result["results"]}
    for way in ways:
        texts = [
            f"{row['gb_per_s'][1]:9.2f} ({row['cpu_s_per_gb'][1]:4.2f})" if row else ""
            for row in (cells.get((way, run)) for run in runs)
        ]
        lines.append(f"{way:<24}" + "".join(f"{text:>16}" for text in texts))
    for goal in result["goals"]:
        mark = "met" if goal["met"] else "NOT met"
        low, median, high = goal["ratio"]
        lines.append(
            f"{goal['goal']} at {_size(goal['run_bytes'])}: {median:.2f} ({low:.2f} to {high:.2f}), "
            f"aimed at {goal['at_least']:g}: {mark}"
        )
    lines += [f"{way}: {why}" for way, why in result["skipped"].items()]
    return "\n".join(lines)


def _size(count: int) -> str:
    return f"{count // MIB} MiB" if count >= MIB else f"{count // KIB} KiB"
