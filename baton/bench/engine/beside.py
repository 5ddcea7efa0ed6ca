"""Decode on one core while prefill computes on another: two processes, with and without the other,
round by round."""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from baton.bench.engine import engines, report
from baton.bench.engine.cache import Cache
from baton.bench.engine.players import Player, PlayerFailed
from baton.bench.engine.rounds import Case, Cell, setup_of
from baton.bench.figures import quartiles

DECODE, PREFILL = Case("decode-1@512"), Case("prefill-512")
SLOWER_MAX = 0.05
HEAD_START_S = 0.1


def measure(
    options: argparse.Namespace, cells: list[Cell], cache: Cache, log: Path
) -> dict[str, Any]:
    """Quartiles of decode's time beside prefill over its time alone, for each cell of one thread."""
    rows: list[dict[str, Any]] = []
    skipped = {}
    if len(options.cores) < 2:
        return {"beside": rows, "goals": [], "skipped": {"beside": "needs two cores"}}
    for cell in cells:
        if cell.threads != 1:
            continue
        try:
            rows.append(_cell(options, cell, cache, log))
        except PlayerFailed as error:
            skipped[f"beside {cell}"] = str(error)
    return {"beside": rows, "goals": [_goal(row) for row in rows], "skipped": skipped}


def _cell(options: argparse.Namespace, cell: Cell, cache: Cache, log: Path) -> dict[str, Any]:
    with ExitStack() as stack:
        decode, prefill = (
            stack.enter_context(
                Player(
                    setup_of(engines.BATON, cell, [case], cache, [core]), Path(options.peers), log
                )
            )
            for case, core in ((DECODE, options.cores[-1]), (PREFILL, options.cores[0]))
        )
        probe = decode.call("decode", *DECODE.decode, 8)
        steps = max(8, min(96, round(2 * options.sample_s / min(probe))))
        slower, idle = [], []
        for number in range(options.rounds + 1):
            alone = sum(decode.call("decode", *DECODE.decode, steps))
            prefill.start("prefill_for", PREFILL.prompt, alone * 1.5 + 2 * HEAD_START_S)
            time.sleep(HEAD_START_S)
            beside = sum(decode.call("decode", *DECODE.decode, steps))
            finished = prefill.answer()
            if number:
                slower.append(beside / alone - 1)
                idle.append(finished["ended"] < finished["begun"] + beside + HEAD_START_S)
    return {
        "shape": cell.shape, "format": cell.format, "steps": steps,
        "prefill_ended_early": sum(idle), "slower": quartiles(slower),
    }  # fmt: skip


def _goal(row: dict[str, Any]) -> dict[str, Any]:
    cell = Cell(row["shape"], row["format"], 1)
    goal = report.row(
        4, "decode slower while prefill runs on the other core", cell, DECODE.name, row["slower"],
        SLOWER_MAX, "alone", at_most=True,
    )  # fmt: skip
    if cell.format == "bf16":
        goal["met"] = None  # shown, not aimed at
    return goal
