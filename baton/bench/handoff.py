"""`baton bench handoff`: what the hand-over from prefill to decode costs.

For each medium (shared memory, ZeroMQ over tcp) the KV goes once layer by layer, while prefill still
computes, and once in one piece at the end. Transfer time runs from K and V ready in prefill's memory
until verified and runnable at decode; what is left of it after the last layer is exposed, and should
be no more than what one layer group of one chunk takes on average, and a millisecond. By layers should
never be slower than in one piece, at any length: told by the time to the first token, which prefill
samples itself, and to the second, which needs the transfer. Rounds are interleaved over all
configurations, in an order that turns, so that a drift of the machine meets all of them alike.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from baton.bench import figures
from baton.bench.figures import quartiles
from baton.bench.models import model_variant
from baton.client import Client
from baton.cluster import ClusterSpec
from baton.handle import SupervisorHandle
from services.engine.model import ModelConfig
from services.prefill.config import PrefillConfig
from services.prefill.state import chunks

MEDIA, STREAMS = ("shm", "zmq"), ("layers", "whole")
CONTEXT = 4096
CHUNK_TOKENS = PrefillConfig().chunk_tokens
SLACK_MS = 1.0  # exposed may be one layer group's transfer and this
TOKENS = 12  # of each answer: enough for every report to arrive before the end


@dataclass(frozen=True)
class Sample:
    """One request. Times in milliseconds; the client's are measured at the client. `group_ms` is what
    one layer group of one chunk took on average."""

    medium: str
    stream: str
    prompt_tokens: int
    ttft_ms: float
    second_token_ms: float
    transfer_ms: float
    group_ms: float
    exposed_ms: float
    kv_bytes: int


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark; the last line printed is one JSON object."""
    parser = argparse.ArgumentParser(prog="baton bench handoff", description=__doc__)
    parser.add_argument("--model", default="models/pico")
    parser.add_argument("--rounds", type=figures.rounds, default=9)
    parser.add_argument("--lengths", default="128,256,512,1024,2048", help="prompt tokens")
    parser.add_argument("--layers-per-group", type=int, default=2)
    parser.add_argument(
        "--keys-dir",
        default=os.environ.get("BATON_KEYS_DIR", ""),
        help="run the clusters with keys",
    )
    parser.add_argument("--prefill-device", default="cpu", help="cpu, or a torch device")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save", default="", help="file for the raw samples")
    parser.add_argument("--json", action="store_true", help="print only the JSON object")
    options = parser.parse_args(argv)
    lengths = [int(n) for n in options.lengths.split(",")]
    samples = measure(options, lengths)
    result = {
        **figures.head("handoff", options.rounds), "layers_per_group": options.layers_per_group,
        "chunk_tokens": CHUNK_TOKENS, "prefill_device": options.prefill_device,
        "results": summary(samples, lengths),
    }  # fmt: skip
    text = "" if options.json else table(result["results"])
    figures.publish(result, [asdict(sample) for sample in samples], text, options.save)
    return 0


def measure(options: argparse.Namespace, lengths: list[int]) -> list[Sample]:
    """All clusters run side by side, one works at a time."""
    draw = random.Random(options.seed)
    samples: list[Sample] = []
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bt-", dir="/tmp")))
        model = model_variant(Path(options.model), root / "model", max_position_embeddings=CONTEXT)
        groups = -(-ModelConfig.load(model).layers // options.layers_per_group)
        clients = {}
        for medium in MEDIA:
            for stream in STREAMS:
                spec = ClusterSpec(
                    run_dir=str(root / f"{medium}-{stream}"), model=str(model), decode=1,
                    medium=medium, stream=stream, listen="127.0.0.1:0",
                    layers_per_group=options.layers_per_group, log_level="warning",
                    keys_dir=options.keys_dir,
                    prefill_device=options.prefill_device,
                )  # fmt: skip
                cluster = stack.enter_context(SupervisorHandle.start(spec))
                clients[medium, stream] = stack.enter_context(
                    Client(cluster.address, keys_dir=options.keys_dir)
                )
        for number in range(options.rounds + 1):
            for length in lengths:
                turn = number % len(clients)
                ways = [*clients.items()]
                for way, client in ways[turn:] + ways[:turn]:
                    prompt = [draw.randrange(100, 4000) for _ in range(length)]
                    sample = ask(client, way, prompt, groups)
                    if number:  # the first round warms up
                        samples.append(sample)
    return samples


def ask(client: Client, way: tuple[str, str], prompt: list[int], groups: int) -> Sample:
    """One short request, with a prompt that nobody has cached."""
    start = time.monotonic()
    events = client.generate(prompt, max_tokens=TOKENS, ignore_eos=True, retain_ms=0)
    stamped = [((time.monotonic() - start) * 1e3, event) for event in events]
    arrivals = [at for at, _ in stamped]
    timing = stamped[-1][1].finished.timing
    pieces = groups * len(list(chunks(0, len(prompt), CHUNK_TOKENS)))
    return Sample(
        *way, len(prompt), arrivals[0], arrivals[1], timing.transfer_ms,
        timing.transfer_ms / pieces, timing.exposed_transfer_ms, timing.kv_bytes,
    )  # fmt: skip


def summary(samples: list[Sample], lengths: list[int]) -> list[dict[str, Any]]:
    """For each medium and length: quartiles of each way of streaming, then the comparison."""
    groups: dict[tuple[str, str, int], list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[sample.medium, sample.stream, sample.prompt_tokens].append(sample)
    return [
        {
            "medium": medium, "prompt_tokens": length,
            **compared(groups[medium, "layers", length], groups[medium, "whole", length]),
        }
        for medium in MEDIA for length in lengths
    ]  # fmt: skip


def compared(layers: list[Sample], whole: list[Sample]) -> dict[str, Any]:
    """`*_gain_ms`: how much earlier by layers than in one piece, in pairs of one round. Worse means
    later in three pairs of four."""
    pairs = list(zip(layers, whole, strict=True))
    ttft = quartiles(b.ttft_ms - a.ttft_ms for a, b in pairs)
    second = quartiles(b.second_token_ms - a.second_token_ms for a, b in pairs)
    within = [s.exposed_ms <= s.group_ms + SLACK_MS for s in layers]
    by_layers = spread(layers)
    hidden = 1 - sum(s.exposed_ms for s in layers) / sum(s.transfer_ms for s in layers)
    return {
        "kv_bytes": layers[0].kv_bytes, "layers": by_layers, "whole": spread(whole),
        "hidden_share": round(hidden, 4),
        "exposed_within_a_group": by_layers["exposed_ms"][1] <= by_layers["group_ms"][1] + SLACK_MS,
        "share_within_a_group": round(sum(within) / len(within), 3),
        "ttft_gain_ms": ttft, "second_token_gain_ms": second,
        "ttft_ratio": quartiles(a.ttft_ms / b.ttft_ms for a, b in pairs),
        "second_token_ratio": quartiles(a.second_token_ms / b.second_token_ms for a, b in pairs),
        "never_worse": ttft[2] >= 0 and second[2] >= 0,
    }  # fmt: skip


def spread(samples: list[Sample]) -> dict[str, list[float]]:
    names = ("ttft_ms", "second_token_ms", "transfer_ms", "group_ms", "exposed_ms")
    return {name: quartiles(getattr(s, name) for s in samples) for name in names}


def table(rows: list[dict[str, Any]]) -> str:
    """The medians, for people."""
    lines = [
        "medium tokens | by layers: group exposed within | ttft 2nd token | whole: ttft 2nd token (ms)"
    ]
    for row in rows:
        layers, whole = row["layers"], row["whole"]
        lines.append(
            f"{row['medium']:6} {row['prompt_tokens']:6} | {layers['group_ms'][1]:8.2f} "
            f"{layers['exposed_ms'][1]:8.2f} {row['share_within_a_group']:6.0%} | "
            f"{layers['ttft_ms'][1]:8.2f} {layers['second_token_ms'][1]:8.2f} | "
            f"{whole['ttft_ms'][1]:8.2f} {whole['second_token_ms'][1]:8.2f} | "
            f"{'never worse' if row['never_worse'] else 'WORSE'}"
        )
    return "\n".join(lines)
