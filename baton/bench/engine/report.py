"""From samples to medians, ratios within a round, and what was aimed at. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from baton.bench.engine.engines import BATON, CTRANSLATE2, LLAMA, OPENVINO, PRODUCT, VLLM
from baton.bench.engine.rounds import PEAK, READ, Case, Cell, Sample
from baton.bench.engine.shapes import SHAPES
from baton.bench.figures import quartiles

Rates = dict[tuple[Cell, str, str], dict[int, float]]  # (cell, case, engine) -> round -> rate
ABOVE_PICO = ("m01", "m05", "m11")
LARGE = ("m05", "m11")


@dataclass(frozen=True)
class Goal:
    """Baton's rate over the best of `against`, at least so much, in the named cells and cases."""

    line: int
    text: str
    cases: tuple[str, ...]
    against: tuple[str, ...]
    at_least: float
    formats: tuple[str, ...] = ("bf16", "int8", "int4")
    threads: tuple[int, ...] = (1, 2)
    shapes: tuple[str, ...] = tuple(SHAPES)


_ONE, _LONG, _EIGHT = ("decode-1@512",), ("decode-1@4096",), ("decode-8@512",)
_PREFILL = ("prefill-512", "prefill-2048")
_SERVERS = (OPENVINO, VLLM)
GOALS = (
    Goal(1, "decode, 1 stream / llama.cpp Q4_0", _ONE, (LLAMA,), 1.7, ("int4",), (2,), ABOVE_PICO),
    Goal(1, "decode, 1 stream / llama.cpp Q8_0", _ONE, (LLAMA,), 1.4, ("int8",), (2,), ABOVE_PICO),
    Goal(1, "decode, 1 stream / llama.cpp BF16", _ONE, (LLAMA,), 1.15, ("bf16",), (2,), ABOVE_PICO),
    Goal(1, "decode, 1 stream / llama.cpp", _ONE, (LLAMA,), 1.0, threads=(1,)),
    Goal(1, "decode, 1 stream, 4k context / llama.cpp", _LONG, (LLAMA,), 2.0),
    Goal(2, "decode, 8 streams / llama.cpp", _EIGHT, (LLAMA,), 4.0, ("int8", "int4")),
    Goal(2, "decode, 8 streams / best server", _EIGHT, _SERVERS, 2.0, ("int8", "int4")),
    Goal(2, "decode, 8 streams / llama.cpp", _EIGHT, (LLAMA,), 1.8, ("bf16",)),
    Goal(2, "decode, 8 streams / best server", _EIGHT, _SERVERS, 1.2, ("bf16",)),
    Goal(3, "prefill / llama.cpp", _PREFILL, (LLAMA,), 1.3),
    Goal(3, "prefill / best peer of equal bits", _PREFILL, (LLAMA, OPENVINO, CTRANSLATE2, VLLM), 1.1),
)  # fmt: skip


def rates_of(samples: Iterable[Sample]) -> Rates:
    rates: Rates = {}
    for sample in samples:
        key = (Cell(sample.shape, sample.format, sample.threads), sample.case, sample.engine)
        rates.setdefault(key, {})[sample.round] = sample.rate
    return rates


def ratio(mine: dict[int, float], theirs: dict[int, float]) -> list[float]:
    """Quartiles of our rate over theirs, round by round."""
    return quartiles(rate / theirs[number] for number, rate in mine.items() if number in theirs)


def summary(samples: list[Sample], facts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """`results`: quartiles of every engine; `goals`: one row for each goal, cell and case."""
    rates = rates_of(samples)
    results = [
        {
            "shape": cell.shape, "format": cell.format, "threads": cell.threads, "case": case,
            "engine": engine, "rate": quartiles(rounds.values()),
            **_of_baton(rates, cell, case, engine, rounds),
        }
        for (cell, case, engine), rounds in rates.items()
    ]  # fmt: skip
    goals = [*_goals(rates), *_bandwidth(rates, facts), *_share_of_peak(rates)]
    return {"results": results, "goals": goals, "memory": memory(facts)}


def _of_baton(
    rates: Rates, cell: Cell, case: str, engine: str, rounds: dict[int, float]
) -> dict[str, Any]:
    """Baton's rate over this engine's."""
    mine = rates.get((cell, case, BATON))
    return {} if engine == BATON or not mine else {"baton_over_this": ratio(mine, rounds)}


def _goals(rates: Rates) -> Iterator[dict[str, Any]]:
    for (cell, case, engine), mine in rates.items():
        if engine != BATON or case == READ:
            continue
        for goal in GOALS:
            if case not in goal.cases or not _covers(goal, cell):
                continue
            peers = {name: rates[cell, case, name] for name in goal.against
                     if (cell, case, name) in rates and _comparable(goal, cell, name)}  # fmt: skip
            if peers:
                best = max(peers, key=lambda name: statistics.median(peers[name].values()))
                yield row(goal.line, goal.text, cell, case, ratio(mine, peers[best]),
                          goal.at_least, best)  # fmt: skip


def _covers(goal: Goal, cell: Cell) -> bool:
    return (
        cell.format in goal.formats and cell.threads in goal.threads and cell.shape in goal.shapes
    )


def _comparable(goal: Goal, cell: Cell, engine: str) -> bool:
    """vLLM runs bf16 beside every format: no peer of equal bits, but a server like any other."""
    return engine != VLLM or cell.format == "bf16" or goal.against == _SERVERS


def row(
    line: int, text: str, cell: Cell, case: str, figure: list[float], bound: float, against: str,
    at_most: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """One row of what must be shown. `figure`: quartiles of a ratio, or of what the text names."""
    met = figure[1] <= bound if at_most else figure[1] >= bound
    return {
        "line": line, "goal": text, "shape": cell.shape, "format": cell.format,
        "threads": cell.threads, "case": case, "against": against, "ratio": figure,
        "at_most" if at_most else "at_least": bound, "met": met,
    }  # fmt: skip


def _bandwidth(rates: Rates, facts: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What decode reads in a second, weights and KV, over a plain read of the same weights: the best
    round of each."""
    for (cell, case, engine), rounds in rates.items():
        read = rates.get((cell, READ, BATON))
        if engine != BATON or case != _ONE[0] or not read or cell.shape not in LARGE:
            continue
        about = facts[f"{cell} {BATON}"]
        step_bytes = about["weight_bytes"] + about["kv_bytes_per_token"] * Case(case).decode[1]
        share = max(rounds.values()) * step_bytes / 1e9 / max(read.values())
        yield row(1, "decode's bandwidth / plain read, best of all rounds", cell, case,
                  [round(share, 4)] * 3, 0.85, "plain read")  # fmt: skip


def _share_of_peak(rates: Rates) -> Iterator[dict[str, Any]]:
    """What prefill computes in a second, attention counted, over a large product in the same dtype."""
    for (cell, case, engine), rounds in rates.items():
        peak = rates.get((cell, PEAK, PRODUCT))
        if engine != BATON or case not in _PREFILL or not peak:
            continue
        tokens = Case(case).prompt
        flops = SHAPES[cell.shape].prefill_flops(tokens)
        mine = {number: rate / tokens * flops / 1e9 for number, rate in rounds.items()}
        yield row(
            3, "prefill / a large matrix product", cell, case, ratio(mine, peak), 0.8, "torch"
        )


def memory(facts: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What a stream of 512 tokens keeps, and what the weights come to, by engine."""
    rows = []
    for key, about in facts.items():
        cell, _, engine = key.rpartition(" ")
        if about.get("measures"):
            continue
        per_token = about.get("kv_bytes_per_token")
        rows.append(
            {
                "cell": cell, "engine": engine, "bits_per_weight": about.get("bits_per_weight"),
                "kv_bytes_per_token": per_token,
                "kv_bytes_per_stream_512": 512 * per_token if per_token else None,
                "rss_anonymous": about.get("rss", {}).get("RssAnon"),
                "rss_file": about.get("rss", {}).get("RssFile"),
            }
        )  # fmt: skip
    return rows


def table(result: dict[str, Any]) -> str:
    """Median tokens per second and Baton's ratio to each peer, then the goals, for people."""
    lines = [f"{'':26} {'case':<14} {'engine':<15} {'tokens/s':>10}  Baton over this"]
    for entry in result["results"]:
        cell = f"{entry['shape']} {entry['format']} {entry['threads']}t"
        over = entry.get("baton_over_this")
        text = f"{over[1]:.2f} ({over[0]:.2f} to {over[2]:.2f})" if over else ""
        lines.append(
            f"{cell:<26} {entry['case']:<14} {entry['engine']:<15} {entry['rate'][1]:>10.1f}  {text}"
        )
    lines += [goal_text(goal) for goal in result["goals"]]
    lines += [f"skipped: {name}: {why}" for name, why in result["skipped"].items()]
    return "\n".join(lines)


def goal_text(goal: dict[str, Any]) -> str:
    low, median, high = goal["ratio"]
    bound = (
        f"at most {goal['at_most']:g}" if "at_most" in goal else f"at least {goal['at_least']:g}"
    )
    met = {True: "met", False: "NOT met", None: "shown"}[goal["met"]]
    against = f" ({goal['against']})" if goal["against"] else ""
    return (
        f"line {goal['line']}: {goal['goal']}{against}, {goal['shape']} {goal['format']} "
        f"{goal['threads']}t {goal['case']}: {median:.3g} ({low:.3g} to {high:.3g}), {bound}: {met}"
    )
