"""`baton bench prefix`: what a cached prefix saves.

A first request computes a long prompt (cold). A second one begins with the same tokens and ends with
others (hit): prefill should compute no more than its own tail, which the scheduler's and the request's
own counts tell, and the first token comes sooner. Then every process is stopped, the arena goes with
them, and the cluster is started anew: a third request of each prefix finds it on disk.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from baton.bench import figures
from baton.bench.figures import quartiles
from baton.bench.models import model_variant
from baton.client import Client
from baton.cluster import ClusterSpec
from baton.handle import SupervisorHandle, wait_until
from baton.v1 import cluster_pb2
from services.kv.layout import PAGE_TOKENS

CONTEXT = 4096
TOKENS = 4
REST_S_MAX = 30.0
FLUSH_MS = 60_000  # everything that is cached is to reach the disk


@dataclass(frozen=True)
class Sample:
    """One request. `computed_tokens` is the scheduler's count, `cached_tokens` the request's, and
    `disk_blocks` the stores': blocks of 64 tokens that came back from disk for it."""

    kind: str
    prompt_tokens: int
    cached_tokens: int
    computed_tokens: int
    disk_blocks: int
    ttft_ms: float


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark; the last line printed is one JSON object."""
    parser = argparse.ArgumentParser(prog="baton bench prefix", description=__doc__)
    parser.add_argument("--model", default="models/pico")
    parser.add_argument("--rounds", type=figures.rounds, default=9)
    parser.add_argument("--prefix-tokens", type=int, default=2000)
    parser.add_argument("--tail-tokens", type=int, default=40)
    parser.add_argument("--disk-dir", default="", help="default: a temporary one, in /tmp")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save", default="", help="file for the raw samples")
    parser.add_argument("--json", action="store_true", help="print only the JSON object")
    options = parser.parse_args(argv)
    samples = measure(options)
    result = {
        **figures.head("prefix", options.rounds), "prefix_tokens": options.prefix_tokens,
        "tail_tokens": options.tail_tokens, **summary(samples, options.prefix_tokens),
    }  # fmt: skip
    text = "" if options.json else table(result)
    figures.publish(result, [asdict(sample) for sample in samples], text, options.save)
    return 0


def measure(options: argparse.Namespace) -> list[Sample]:
    """The same prefixes cold and cached, then, after a restart of everything, from disk."""
    draw = random.Random(options.seed)
    prefixes = [_tokens(draw, options.prefix_tokens) for _ in range(options.rounds + 1)]
    tails = (_tokens(draw, options.tail_tokens) for _ in range(3 * len(prefixes)))
    samples: list[Sample] = []
    with tempfile.TemporaryDirectory(prefix="bt-", dir="/tmp") as directory:
        root = Path(directory)
        model = model_variant(Path(options.model), root / "m", max_position_embeddings=CONTEXT)
        spec = ClusterSpec(
            run_dir=str(root / "run"), model=str(model), decode=1, listen="127.0.0.1:0",
            log_level="warning", disk_dir=options.disk_dir or str(root / "disk"),
            extra=(f"kv-store:--flush-ms={FLUSH_MS}",),
        )  # fmt: skip
        for kinds in (("cold", "hit"), ("disk",)):
            with SupervisorHandle.start(spec) as cluster, Client(cluster.address) as client:
                for number, prefix in enumerate(prefixes):
                    for kind in kinds:
                        sample = ask(client, kind, prefix + next(tails))
                        if number:  # the first round warms up
                            samples.append(sample)
                wait_until(lambda: not _busy(client), REST_S_MAX, "rest")
    return samples


def _tokens(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(100, 4000) for _ in range(count)]


def ask(client: Client, kind: str, prompt: list[int]) -> Sample:
    """One short request, once the one before has been put away and its blocks can be found."""
    wait_until(lambda: not _busy(client), REST_S_MAX, "rest")
    before = client.view()
    start = time.monotonic()
    ttft_ms = 0.0
    for event in client.generate(prompt, max_tokens=TOKENS, ignore_eos=True, retain_ms=0):
        ttft_ms = ttft_ms or (time.monotonic() - start) * 1e3
        if event.HasField("finished"):
            cached = event.finished.usage.cached_tokens
    # Prefill's report may come after the last token: it is not on the way of any.
    wait_until(lambda: _computed(client.view()) > _computed(before), REST_S_MAX, "prefill's report")
    after = client.view()
    return Sample(
        kind, len(prompt), cached, _computed(after) - _computed(before),
        _from_disk(after) - _from_disk(before), ttft_ms,
    )  # fmt: skip


def _computed(view: cluster_pb2.ClusterView) -> int:
    return int(view.requests.prompt_tokens_computed)


def _from_disk(view: cluster_pb2.ClusterView) -> int:
    return sum(store.disk_hits for store in view.stores)


def _busy(client: Client) -> bool:
    view = client.view()
    return bool(view.requests.running or any(store.streams for store in view.stores))


def summary(samples: list[Sample], prefix_tokens: int) -> dict[str, Any]:
    """Quartiles by kind, and paired ratios of the time to the first token."""
    cached = prefix_tokens // PAGE_TOKENS * PAGE_TOKENS  # what is shared is whole blocks
    kinds = list(dict.fromkeys(sample.kind for sample in samples))
    by_kind = {kind: [s for s in samples if s.kind == kind] for kind in kinds}
    results: dict[str, Any] = {}
    for kind, mine in by_kind.items():
        due = [s.prompt_tokens - (0 if kind == "cold" else cached) for s in mine]
        told = [(s.computed_tokens, s.prompt_tokens - s.cached_tokens) for s in mine]
        results[kind] = {
            "requests": len(mine), "ttft_ms": quartiles(s.ttft_ms for s in mine),
            "computed_tokens": quartiles(s.computed_tokens for s in mine),
            "disk_blocks": quartiles(s.disk_blocks for s in mine),
            "computed_as_due": all(t == (d, d) for t, d in zip(told, due, strict=True)),
        }  # fmt: skip
        if kind != "cold":
            pairs = zip(by_kind["cold"], mine, strict=True)
            results[kind]["cold_over_this"] = quartiles(a.ttft_ms / b.ttft_ms for a, b in pairs)
    return {"results": results}


def table(result: dict[str, Any]) -> str:
    """Medians, for people."""
    lines = [f"{'':<18}{'ttft ms':>10}{'tokens computed':>18}{'cold / this':>14}"]
    for kind, row in result["results"].items():
        ratio = f"{row['cold_over_this'][1]:.1f}" if "cold_over_this" in row else ""
        due = "" if row["computed_as_due"] else "  NOT only what was due"
        lines.append(
            f"{kind:<18}{row['ttft_ms'][1]:>10.1f}{row['computed_tokens'][1]:>18.0f}{ratio:>14}{due}"
        )
    return "\n".join(lines)
