"""`baton bench handoff`: what the hand-over from prefill to decode costs.

For each medium (shared memory, ZeroMQ over tcp) the KV goes once layer by layer, while prefill still
computes, and once in one piece at the end. Transfer time runs from K and V ready in prefill's memory
until verified and runnable at decode; what is left of it after the last layer is exposed. Rounds are
interleaved over all configurations, so that a drift of the machine meets all of them alike.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from baton import machine
from baton.client import Client
from baton.cluster import ClusterSpec
from baton.handle import SupervisorHandle

MEDIA, STREAMS = ("shm", "zmq"), ("layers", "whole")
CONTEXT = 4096
TOKENS = 12  # of each answer: enough for every report to arrive before the end


@dataclass(frozen=True)
class Sample:
    """One request. Times in milliseconds; the client's are measured at the client."""

    medium: str
    stream: str
    prompt_tokens: int
    ttft_ms: float
    second_token_ms: float
    transfer_ms: float
    exposed_ms: float
    kv_bytes: int


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark; the last line printed is one JSON object."""
    parser = argparse.ArgumentParser(prog="baton bench handoff", description=__doc__)
    parser.add_argument("--model", default="models/pico")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--lengths", default="256,1024,2048", help="prompt tokens")
    parser.add_argument("--layers-per-group", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save", default="", help="file for the raw samples")
    parser.add_argument("--json", action="store_true", help="print only the JSON object")
    options = parser.parse_args(argv)
    lengths = [int(n) for n in options.lengths.split(",")]
    samples = measure(options, lengths)
    result = {
        "bench": "handoff", "machine": machine.describe(), "rounds": options.rounds,
        "layers_per_group": options.layers_per_group, "results": summary(samples, lengths),
    }  # fmt: skip
    if options.save:
        raw = {**result, "samples": [asdict(sample) for sample in samples]}
        Path(options.save).write_text(json.dumps(raw, indent=1) + "\n")
    if not options.json:
        print(table(result["results"]))
    print(json.dumps(result))
    return 0


def measure(options: argparse.Namespace, lengths: list[int]) -> list[Sample]:
    """All clusters run side by side, one works at a time."""
    draw = random.Random(options.seed)
    samples: list[Sample] = []
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bt-", dir="/tmp")))
        model = with_context(Path(options.model), root / "model", CONTEXT)
        clients = {}
        for medium in MEDIA:
            for stream in STREAMS:
                spec = ClusterSpec(
                    run_dir=str(root / f"{medium}-{stream}"), model=str(model), decode=1,
                    medium=medium, stream=stream, listen="127.0.0.1:0",
                    layers_per_group=options.layers_per_group, log_level="warning",
                )  # fmt: skip
                cluster = stack.enter_context(SupervisorHandle.start(spec))
                clients[medium, stream] = stack.enter_context(Client(cluster.address))
        for number in range(options.rounds + 1):
            for length in lengths:
                for (medium, stream), client in clients.items():
                    prompt = [draw.randrange(100, 4000) for _ in range(length)]
                    sample = ask(client, medium, stream, prompt)
                    if number:  # the first round warms up
                        samples.append(sample)
    return samples


def ask(client: Client, medium: str, stream: str, prompt: list[int]) -> Sample:
    """One short request, with a prompt that nobody has cached."""
    start = time.monotonic()
    events = client.generate(prompt, max_tokens=TOKENS, ignore_eos=True, retain_ms=0)
    stamped = [((time.monotonic() - start) * 1e3, event) for event in events]
    arrivals = [at for at, _ in stamped]
    timing = stamped[-1][1].finished.timing
    return Sample(
        medium, stream, len(prompt), arrivals[0], arrivals[1], timing.transfer_ms,
        timing.exposed_transfer_ms, timing.kv_bytes,
    )  # fmt: skip


def with_context(model: Path, copy: Path, context: int) -> Path:
    """The same model with a longer context: what is measured does not depend on the text's sense."""
    copy.mkdir()
    for file in model.resolve().iterdir():
        os.symlink(file, copy / file.name)
    config = json.loads((model / "config.json").read_text())
    (copy / "config.json").unlink()
    (copy / "config.json").write_text(json.dumps({**config, "max_position_embeddings": context}))
    return copy


def summary(samples: list[Sample], lengths: list[int]) -> list[dict[str, Any]]:
    """Medians and quartiles for each medium, way of streaming and length; then the comparison."""
    groups: dict[tuple[str, str, int], list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[sample.medium, sample.stream, sample.prompt_tokens].append(sample)
    rows = []
    for medium in MEDIA:
        for length in lengths:
            layers, whole = groups[medium, "layers", length], groups[medium, "whole", length]
            ttft = [a.ttft_ms / b.ttft_ms for a, b in zip(layers, whole, strict=True)]
            second = [
                a.second_token_ms / b.second_token_ms for a, b in zip(layers, whole, strict=True)
            ]
            rows.append(
                {
                    "medium": medium, "prompt_tokens": length, "kv_bytes": layers[0].kv_bytes,
                    "layers": spread(layers), "whole": spread(whole),
                    "hidden_share": round(
                        1 - sum(s.exposed_ms for s in layers) / sum(s.transfer_ms for s in layers), 4
                    ),
                    "ttft_ratio": quartiles(ttft), "second_token_ratio": quartiles(second),
                }
            )  # fmt: skip
    return rows


def spread(samples: list[Sample]) -> dict[str, list[float]]:
    names = ("ttft_ms", "second_token_ms", "transfer_ms", "exposed_ms")
    return {name: quartiles([getattr(s, name) for s in samples]) for name in names}


def quartiles(values: list[float]) -> list[float]:
    """[lower quartile, median, upper quartile]."""
    return [round(q, 3) for q in statistics.quantiles(values, n=4)]


def table(rows: list[dict[str, Any]]) -> str:
    """The medians, for people."""
    lines = ["medium tokens | by layers: transfer exposed ttft 2nd token | whole: the same (ms)"]
    for row in rows:
        cells = [
            " ".join(
                f"{row[way][name][1]:9.2f}"
                for name in ("transfer_ms", "exposed_ms", "ttft_ms", "second_token_ms")
            )
            for way in STREAMS
        ]
        lines.append(f"{row['medium']:6} {row['prompt_tokens']:6} | {cells[0]} | {cells[1]}")
    return "\n".join(lines)
