"""`baton bench engine-report`: the tables and the picture in docs, from saved results.

Several files are one result: where two have the same figure the later file counts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from baton.bench.engine import picture
from baton.bench.engine.engines import BATON, MODULES, PRODUCT

BEGIN, END = "<!-- engine: begin -->", "<!-- engine: end -->"
PEERS = [name for name in MODULES if name not in (BATON, PRODUCT)]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="baton bench engine-report", description=__doc__)
    parser.add_argument("results", nargs="+", help="files made by `baton bench engine --save`")
    parser.add_argument("--document", default="docs/performance.md")
    parser.add_argument("--picture", default="docs/engine.svg")
    options = parser.parse_args(argv)
    result = merged(json.loads(Path(file).read_text()) for file in options.results)
    Path(options.picture).write_text(picture.draw(result["results"]))
    document = Path(options.document)
    link = f"![Tokens per second by engine]({Path(options.picture).name})"
    document.write_text(replaced(document.read_text(), f"{link}\n\n{text(result)}"))
    return 0


def merged(results: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """One result of several."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    goals: dict[tuple[Any, ...], dict[str, Any]] = {}
    starts: dict[tuple[Any, ...], dict[str, Any]] = {}
    memory: dict[tuple[Any, ...], dict[str, Any]] = {}
    last: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    facts: dict[str, dict[str, Any]] = {}
    agreement: dict[str, float] = {}
    for last in results:
        for row in last["results"]:
            rows[tuple(row[name] for name in ("shape", "format", "threads", "case", "engine"))] = (
                row
            )
        for goal in last["goals"]:
            names = ("line", "goal", "shape", "format", "threads", "case")
            goals[tuple(goal[name] for name in names)] = goal
        for row in last.get("restart", []):
            starts[row["shape"], row["format"]] = row
        for row in last["memory"]:
            memory[row["cell"], row["engine"]] = row
        skipped |= last["skipped"]
        facts |= last["engines"]
        agreement |= last["agreement"]
    assert last, "no results"
    return {
        "machine": last["machine"], "rounds": last["rounds"], "results": list(rows.values()),
        "goals": sorted(goals.values(), key=_place), "memory": list(memory.values()),
        "restart": list(starts.values()), "skipped": skipped, "engines": facts,
        "agreement": agreement,
    }  # fmt: skip


def _place(goal: dict[str, Any]) -> tuple[Any, ...]:
    return (
        goal["line"],
        goal["goal"],
        goal["shape"],
        goal["format"],
        goal["threads"],
        goal["case"],
    )


def replaced(document: str, new: str) -> str:
    """The document with `new` between its two marks. Raises ValueError when they are missing."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n{new.strip()}\n{END}{after}"


def text(result: dict[str, Any]) -> str:
    """Everything in Markdown: where, what was aimed at, the rates, the memory, the starts."""
    machine = result["machine"]
    parts = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB; medians of "
        f"{result['rounds']} rounds, quartiles in brackets. {_versions(result['engines'])}",
        "### What was aimed at", _goals(result["goals"]),
        "### Tokens per second",
        "Baton's, and its ratio to each peer in the same round; in brackets a peer's own rate where "
        "Baton has none.",
        *_rates(result["results"]), "### Memory", _memory(result["memory"]),
    ]  # fmt: skip
    if result["restart"]:
        parts += ["### Starts, in seconds", _starts(result["restart"])]
    if result["agreement"]:
        found = ", ".join(f"{cell} {cosine:.4f}" for cell, cosine in result["agreement"].items())
        parts += ["### The same model", f"Cosine of Baton's logits and llama.cpp's: {found}."]
    if result["skipped"]:
        told = [f"- {name}: {why.splitlines()[0]}" for name, why in result["skipped"].items()]
        parts += ["### Left out", "\n".join(told)]
    return "\n\n".join(parts)


def _versions(facts: dict[str, dict[str, Any]]) -> str:
    found = {key.rpartition(" ")[2]: about["version"] for key, about in facts.items()}
    return ", ".join(f"{name} {version}" for name, version in sorted(found.items())) + "."


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _goals(goals: list[dict[str, Any]]) -> str:
    marks = {True: "met", False: "**not met**", None: "shown"}
    rows = []
    for goal in goals:
        bound = f"≤ {goal['at_most']:g}" if "at_most" in goal else f"≥ {goal['at_least']:g}"
        where = f"{goal['shape']} {goal['format']} {goal['threads']}t {goal['case']}".strip()
        rows.append((str(goal["line"]), goal["goal"], goal["against"], where, bound,
                     _spread(goal["ratio"]), marks[goal["met"]]))  # fmt: skip
    return _table(("line", "what", "against", "where", "aim", "figure", ""), rows)


def _spread(figure: list[float]) -> str:
    low, median, high = (f"{value:.3g}" for value in figure)
    return median if low == high else f"{median} ({low} to {high})"


def _rates(results: list[dict[str, Any]]) -> list[str]:
    """One table for each shape and number of threads."""
    rows = [row for row in results if row["case"].startswith(("decode", "prefill"))]
    return [
        f"**{shape}, {threads} thread{'s' * (threads > 1)}**\n\n"
        + _rates_of([row for row in rows if (row["shape"], row["threads"]) == (shape, threads)])
        for shape, threads in dict.fromkeys((row["shape"], row["threads"]) for row in rows)
    ]


def _rates_of(rows: list[dict[str, Any]]) -> str:
    cells = {(row["case"], row["format"], row["engine"]): row for row in rows}
    lines = []
    for case, format_ in sorted({(row["case"], row["format"]) for row in rows}):
        mine = cells.get((case, format_, BATON))
        peers = [_ratio(cells.get((case, format_, name))) for name in PEERS]
        lines.append((case, format_, _rate(mine) if mine else "", *peers))
    return _table(("case", "format", "Baton", *(f"/ {name}" for name in PEERS)), lines)


def _ratio(peer: dict[str, Any] | None) -> str:
    if peer is None:
        return ""
    over = peer.get("baton_over_this")
    return _spread(over) if over else f"({_rate(peer)})"


def _rate(row: dict[str, Any]) -> str:
    median = float(row["rate"][1])
    return f"{median:.1f}" if median < 1000 else f"{median:.0f}"


def _memory(rows: list[dict[str, Any]]) -> str:
    """Of each shape and format with most threads: the others are the same."""
    lines = {}
    for row in rows:
        where = row["cell"].rpartition(" ")[0]
        lines[where, row["engine"]] = (
            where, row["engine"], f"{row['bits_per_weight']:g}", _mb(row["kv_bytes_per_stream_512"]),
            _mb(row["rss_anonymous"]),
        )  # fmt: skip
    head = ("shape, format", "engine", "bits per weight", "KV of 512 tokens, MB", "own memory, MB")
    return _table(head, lines.values())


def _mb(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.1f}"


def _starts(rows: list[dict[str, Any]]) -> str:
    head = ("shape, format", "cold, first token", "packed, first token", "second decode, ready",
            "killed, next token")  # fmt: skip
    names = ("cold_s", "warm_s", "second_s", "back_s")
    return _table(
        head,
        [(f"{r['shape']} {r['format']}", *(_spread(r[name]) for name in names)) for r in rows],
    )
