"""The command: takes the rounds and prints the result."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from baton.bench import figures, kv
from baton.bench.kv import mooncake, report, ways
from baton.bench.kv.world import KIB, MIB, World, worlds
from baton.keys import make

RUNS_KIB = "16,64,256,1024,4096,16384"


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark; the last line printed is one JSON object."""
    parser = argparse.ArgumentParser(prog="baton bench kv", description=kv.__doc__)
    parser.add_argument("--model", default="models/pico", help="only its files are used")
    parser.add_argument("--rounds", type=figures.rounds, default=9)
    parser.add_argument("--runs-kib", default=RUNS_KIB, help="run lengths in KiB, powers of two")
    parser.add_argument("--mib", type=int, default=256, help="KV moved in a sample")
    parser.add_argument(
        "--without", default="", help="ways to leave out: zmq, curve, grpc, mooncake"
    )
    parser.add_argument("--save", default="", help="file for the raw samples")
    parser.add_argument("--json", action="store_true", help="print only the JSON object")
    options = parser.parse_args(argv)
    runs = sorted(int(text) * KIB for text in options.runs_kib.split(","))
    places = worlds(runs, options.mib * MIB)
    skipped: dict[str, str] = {way: "left out" for way in options.without.split(",") if way}
    samples = measure(options, places, skipped)
    result: dict[str, Any] = {
        **figures.head("kv", options.rounds), "skipped": skipped,
        "worlds": {str(run): asdict(world) for run, world in places.items()},
        **report.summary(samples, runs),
    }  # fmt: skip
    table = "" if options.json else report.table(result)
    figures.publish(result, [asdict(sample) for sample in samples], table, options.save)
    return 0


def measure(
    options: argparse.Namespace, places: dict[int, World], skipped: dict[str, str]
) -> list[ways.Sample]:
    """All processes run side by side, one way works at a time."""
    samples: list[ways.Sample] = []
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bt-", dir="/tmp")))
        made = _operations(stack, options, root, places, skipped)
        for number in range(options.rounds + 1):
            for run, world in places.items():
                for operation in made[run]:
                    sample = ways.take(operation, world, run, number)
                    if number:  # the first round warms up
                        samples.append(sample)
    return samples


def _operations(
    stack: ExitStack, options: argparse.Namespace, root: Path, places: dict[int, World],
    skipped: dict[str, str],
) -> dict[int, list[ways.Operation]]:  # fmt: skip
    """What is measured at each run length. Runs of the same world share their processes."""
    of_world: dict[World, list[ways.Operation]] = {}
    for world in set(places.values()):
        model = world.save_model(Path(options.model), root / f"model-{world.page_bytes}")
        of_world[world] = ways.local(stack, world, model, root)
        if "zmq" not in skipped:
            for transport in ("ipc", "tcp"):
                of_world[world] += ways.zeromq(stack, world, model, root, transport)
            if "curve" not in skipped:
                keys_dir = str(make(root / f"keys-{world.page_bytes}").files.root)
                of_world[world] += ways.zeromq(stack, world, model, root, "tcp", keys_dir)
    largest = max(places.values(), key=lambda world: world.total_bytes)
    totals = {run: world.total_bytes for run, world in places.items()}
    peers: list[ways.Operation] = []
    if "grpc" not in skipped:
        peers += ways.grpc(stack, largest, totals)
    if why := mooncake.missing():
        skipped.setdefault("mooncake", why)
    if "mooncake" not in skipped:
        peers += ways.mooncake_store(stack, largest, root, totals)
    return {run: of_world[world] + peers for run, world in places.items()}
