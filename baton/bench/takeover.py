"""`baton bench takeover`: what a client sees when the decode that serves it is killed.

Two clusters side by side: one takes a stream over from the KV in the store, the other, the control,
computes prompt and answer again (`--recover=reprefill`). For each length of context a stream is
started, its decode is killed with SIGKILL in the middle of the answer, and the longest pause between
two tokens from then on is the stall. Lengths and clusters take turns, and a kill waits until everybody
is back from the one before. Least squares over the length of the context give the slope.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from baton.bench import figures
from baton.bench.figures import quartiles
from baton.bench.models import model_variant
from baton.chaos.judge import stall_s
from baton.chaos.lab import Lab
from baton.client import Client
from baton.cluster import ClusterSpec
from baton.handle import wait_until

MODES = ("takeover", "reprefill")
CONTEXT = 4096
FIND_AT, KILL_AT = 4, 12  # token indexes
TOKENS = 160  # of each answer: the kill must come well before its end
REST_S_MAX = 60.0


@dataclass(frozen=True)
class Sample:
    """One kill. Times in milliseconds, at the client."""

    mode: str
    round: int
    context_tokens: int
    stall_ms: float
    step_ms: float  # the median pause between two tokens before the kill
    recomputed_tokens: int
    takeovers: int


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark; the last line printed is one JSON object."""
    parser = argparse.ArgumentParser(prog="baton bench takeover", description=__doc__)
    parser.add_argument("--model", default="models/pico")
    parser.add_argument(
        "--rounds", type=figures.rounds, default=9, help="kills for each length and cluster"
    )
    parser.add_argument("--contexts", default="256,1024,2048", help="prompt tokens")
    parser.add_argument("--medium", default="shm", help="shm or zmq")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save", default="", help="file for the raw samples")
    parser.add_argument("--json", action="store_true", help="print only the JSON object")
    options = parser.parse_args(argv)
    contexts = [int(n) for n in options.contexts.split(",")]
    samples, missed = measure(options, contexts)
    result = {
        **figures.head("takeover", options.rounds), "medium": options.medium, "missed": missed,
        **summary(samples, contexts),
    }  # fmt: skip
    text = "" if options.json else table(result)
    figures.publish(result, [asdict(sample) for sample in samples], text, options.save)
    return 0


def measure(options: argparse.Namespace, contexts: list[int]) -> tuple[list[Sample], int]:
    """The samples, and how many kills came too late to interrupt their stream; those are done
    again, at most as often as there are rounds."""
    draw = random.Random(options.seed)
    samples: list[Sample] = []
    missed = 0
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bt-", dir="/tmp")))
        model = model_variant(Path(options.model), root / "m", max_position_embeddings=CONTEXT)
        labs = {
            mode: stack.enter_context(_lab(root, model, mode, options.medium)) for mode in MODES
        }
        clients = {
            mode: stack.enter_context(Client(lab.handle.address)) for mode, lab in labs.items()
        }
        for number in range(options.rounds):
            for context in contexts:
                for mode in MODES if number % 2 else MODES[::-1]:
                    sample = None
                    while sample is None and missed <= options.rounds:
                        prompt = [draw.randrange(100, 4000) for _ in range(context)]
                        sample = kill_once(labs[mode], clients[mode], prompt, number)
                        missed += sample is None
                    if sample is not None:
                        samples.append(sample)
    return samples, missed


def _lab(root: Path, model: Path, mode: str, medium: str) -> Lab:
    spec = ClusterSpec(
        run_dir=str(root / mode), model=str(model), decode=2, medium=medium, recover=mode,
        listen="127.0.0.1:0", log_level="warning",
    )  # fmt: skip
    return Lab(spec)


def kill_once(lab: Lab, client: Client, prompt: list[int], number: int) -> Sample | None:
    """None when the stream was not interrupted: all its tokens were on their way."""
    rest(lab, client)
    request_id, times, killed_at, pid = f"kill-{random.randbytes(8).hex()}", list[float](), 0.0, 0
    events = client.generate(
        prompt, request_id=request_id, max_tokens=TOKENS, ignore_eos=True, retain_ms=0
    )
    for event in events:
        if event.HasField("finished"):
            finished = event.finished
        if not event.HasField("token"):
            continue
        times.append(time.monotonic())
        if event.token.index == FIND_AT:
            pid = _decode_of(client, request_id)
        elif event.token.index == KILL_AT:
            killed_at = time.monotonic()
            os.kill(pid, signal.SIGKILL)
    assert len(times) == TOKENS, f"{len(times)} tokens came of {TOKENS}"
    gap = stall_s(times, killed_at)
    if gap is None or not finished.timing.takeovers:
        return None
    # The view was asked for in the first steps: the later ones tell an undisturbed step.
    steps = [
        b - a for a, b in zip(times[FIND_AT + 1 : KILL_AT], times[FIND_AT + 2 :], strict=False)
    ]
    return Sample(
        lab.spec.recover, number, len(prompt), gap * 1e3, statistics.median(steps) * 1e3,
        finished.usage.recomputed_tokens, finished.timing.takeovers,
    )  # fmt: skip


def _decode_of(client: Client, request_id: str) -> int:
    """The pid of the decode that works for this request."""
    pids = [
        worker.pid for worker in client.view().workers
        if request_id in worker.running_requests and worker.name.startswith("decode")
    ]  # fmt: skip
    assert len(pids) == 1, f"{len(pids)} decodes work for {request_id}"
    return int(pids[0])


def rest(lab: Lab, client: Client) -> None:
    """Waits until every process is back and no page is held."""
    wait_until(lambda: not lab.trouble(client.view()), REST_S_MAX, "rest")


def summary(samples: list[Sample], contexts: list[int]) -> dict[str, Any]:
    """Quartiles by length, paired ratios, and the slope of each mode."""
    cells = {(s.mode, s.context_tokens, s.round): s for s in samples}
    rows = []
    for context in contexts:
        row: dict[str, Any] = {"context_tokens": context}
        for mode in MODES:
            mine = [s for s in samples if (s.mode, s.context_tokens) == (mode, context)]
            row[mode] = {
                "kills": len(mine), "stall_ms": quartiles(s.stall_ms for s in mine),
                "stall_ms_max": round(max((s.stall_ms for s in mine), default=0.0), 2),
                "step_ms": quartiles(s.step_ms for s in mine),
                "recomputed_tokens": quartiles(s.recomputed_tokens for s in mine),
            }  # fmt: skip
        row["reprefill_over_takeover"] = quartiles(
            cells["reprefill", context, s.round].stall_ms / s.stall_ms
            for s in samples
            if (s.mode, s.context_tokens) == ("takeover", context)
            and ("reprefill", context, s.round) in cells
        )
        rows.append(row)
    slopes = {mode: slope([s for s in samples if s.mode == mode]) for mode in MODES}
    return {"results": rows, "slope": slopes}


def slope(samples: list[Sample]) -> dict[str, Any]:
    """Least squares of the stall over the context, in milliseconds for 1 000 tokens: over all
    samples, with its standard error, and the quartiles of those of single rounds."""
    points = [(s.context_tokens / 1e3, s.stall_ms) for s in samples]
    if len({x for x, _ in points}) < 2:
        return {}
    line = statistics.linear_regression(*zip(*points, strict=True))
    mean = statistics.fmean(x for x, _ in points)
    rest = sum((y - line.intercept - line.slope * x) ** 2 for x, y in points)
    width = sum((x - mean) ** 2 for x, _ in points)
    error = math.sqrt(rest / max(1, len(points) - 2) / width)
    return {
        "ms_per_1k_tokens": round(line.slope, 3), "standard_error": round(error, 3),
        "of_single_rounds": quartiles(_round_slopes(samples)),
        "grows": line.slope - 2 * error > 0,
    }  # fmt: skip


def _round_slopes(samples: list[Sample]) -> list[float]:
    found = []
    for number in {s.round for s in samples}:
        points = [(s.context_tokens / 1e3, s.stall_ms) for s in samples if s.round == number]
        if len({x for x, _ in points}) > 1:
            found.append(statistics.linear_regression(*zip(*points, strict=True)).slope)
    return found


def _cell(spread: list[float]) -> str:
    if not spread:
        return "every kill missed"
    low, median, high = spread
    return f"{median:8.1f} ({low:.1f} to {high:.1f})"


def table(result: dict[str, Any]) -> str:
    """Median stalls, for people."""
    lines = [f"{'context':>8} {'takeover ms':>24} {'re-prefill ms':>24} {'ratio':>7}"]
    for row in result["results"]:
        cells = [_cell(row[mode]["stall_ms"]) for mode in MODES]
        ratio = f"{found[1]:.1f}" if (found := row["reprefill_over_takeover"]) else "-"
        lines.append(f"{row['context_tokens']:>8} {cells[0]:>24} {cells[1]:>24} {ratio:>7}")
    for mode in MODES:
        found = result["slope"][mode]
        if found:
            lines.append(
                f"{mode}: {found['ms_per_1k_tokens']} ms for 1 000 tokens, "
                f"standard error {found['standard_error']}"
            )
    return "\n".join(lines)
