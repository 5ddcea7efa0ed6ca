"""The command: takes the rounds and prints the result."""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from baton.bench import engine, figures
from baton.bench.engine import beside, loop, report, restart, rounds
from baton.bench.engine.cache import Cache
from baton.bench.engine.rounds import Case, Cell
from baton.bench.engine.shapes import FORMATS, SHAPES

CASES = "decode-1@512,decode-1@4096,decode-8@512,decode-8@4096,prefill-512,prefill-2048"
PARTS = ("rates", "beside", "loop", "restart")
LOOP_STREAMS = (1, 8)
GIB = 1 << 30


def _list(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def _cores(text: str) -> list[int]:
    return [int(part) for part in _list(text)] or sorted(os.sched_getaffinity(0))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="baton bench engine", description=engine.__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="after one that warms up")
    parser.add_argument("--shapes", type=_list, default=list(SHAPES), help=",".join(SHAPES))
    parser.add_argument("--formats", type=_list, default=list(FORMATS), help=",".join(FORMATS))
    parser.add_argument("--threads", type=_list, default=["1", "2"], help="like 1,2")
    parser.add_argument("--cases", type=_list, default=_list(CASES), help=CASES)
    parser.add_argument("--parts", type=_list, default=list(PARTS), help=",".join(PARTS))
    parser.add_argument("--starts", type=int, default=2, help="cold starts, for each format")
    parser.add_argument("--cores", type=_cores, default=_cores(""), help="default: all allowed")
    parser.add_argument("--sample-s", type=float, default=0.7, help="seconds of decode in a sample")
    parser.add_argument("--without", type=_list, default=[], help="engines to leave out")
    parser.add_argument("--peers", default=".venv-peers", help="their virtual environment")
    parser.add_argument("--cache-dir", default="", help="models that are made; default: ~/.cache")
    parser.add_argument("--cache-gib", type=int, default=24, help="its bound")
    parser.add_argument("--clean", action="store_true", help="remove the cache and do nothing else")
    parser.add_argument("--save", default="", help="file for the raw samples")
    parser.add_argument("--json", action="store_true", help="print only the JSON object")
    return parser


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark; the last line printed is one JSON object."""
    options = _parser().parse_args(argv)
    options.peers = os.path.abspath(options.peers)
    root = Path(options.cache_dir or Path.home() / ".cache" / "baton" / "bench-engine")
    if options.clean:
        shutil.rmtree(root, ignore_errors=True)
        return 0
    cells = [
        Cell(shape, format_, int(threads))
        for shape in options.shapes for format_ in options.formats for threads in options.threads
        if int(threads) <= len(options.cores)
    ]  # fmt: skip
    cases = [Case(name) for name in options.cases]
    cache = Cache(root.absolute(), options.cache_gib * GIB)
    with tempfile.TemporaryDirectory(prefix="be-") as scratch:
        log = Path(scratch) / "engines.log"
        wanted = cells if "rates" in options.parts else []
        measured = rounds.measure(options, wanted, cases, cache, log)
        more = _more(options, cells, cache, log)
    summary = report.summary(measured.samples, measured.facts)
    summary["goals"] += more.pop("goals")
    result: dict[str, Any] = {
        **figures.head("engine", options.rounds), "skipped": measured.skipped | more.pop("skipped"),
        "cores": options.cores, "engines": measured.facts, "agreement": measured.agreement,
        **summary, **more,
    }  # fmt: skip
    text = "" if options.json else report.table(result)
    figures.publish(result, [asdict(sample) for sample in measured.samples], text, options.save)
    return 0


def _more(
    options: argparse.Namespace, cells: list[Cell], cache: Cache, log: Path
) -> dict[str, Any]:
    """What is measured of Baton alone: beside prefill, from inside, and how soon it starts."""
    more: dict[str, Any] = {"goals": [], "skipped": {}, "loop": [], "restart": []}
    if "beside" in options.parts:
        more |= beside.measure(options, cells, cache, log)
    if "loop" in options.parts:
        more["loop"] = [
            loop.measure(cache.checkpoint(SHAPES[cell.shape]), cell, _packed(cache, cell),
                         options.cores, streams)
            for cell in cells for streams in LOOP_STREAMS
        ]  # fmt: skip
    if "restart" in options.parts:
        more["restart"] = [
            restart.measure(cache.checkpoint(SHAPES[cell.shape]), cell, options.starts)
            for cell in cells if cell.threads == 1
        ]  # fmt: skip
    more["goals"] += loop.goals(more["loop"]) + restart.goals(more["restart"])
    return more


def _packed(cache: Cache, cell: Cell) -> str:
    return str(cache.place(f"{cell.shape}-packed"))
