"""Each benchmark runs in its smallest form, and its result has the shape that it promises. How fast
anything is, is no matter here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]


def bench(*arguments: str) -> dict[str, Any]:
    """The JSON object that the benchmark prints last, and alone with --json."""
    done = subprocess.run(
        [sys.executable, "-m", "baton.cli", "bench", *arguments, "--json"],
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 1, "with --json there is nothing else on standard output"
    result: dict[str, Any] = json.loads(lines[0])
    assert result["machine"]["cores"] >= 1
    assert "grpcio" in result["versions"]
    return result


def is_spread(values: list[float]) -> bool:
    """Three positive numbers, in order."""
    return len(values) == 3 and 0 < values[0] <= values[1] <= values[2]


def test_kv() -> None:
    """Every way at every run length; a peer that is not installed is named, not missed."""
    before = set(Path("/dev/shm").iterdir())
    result = bench("kv", "--rounds", "2", "--mib", "2", "--runs-kib", "16,64,1024")
    ways = {row["way"] for row in result["results"]}
    assert {"memcpy", "stamp", "verify", "memcpy + checksums"} <= ways
    assert {"shm", "shm + checksums", "shm read in place"} <= ways
    for transport in ("ipc", "tcp", "tcp curve"):
        assert {f"zmq {transport} put", f"zmq {transport} get"} <= ways
    assert {f"grpc {kind} {op}" for kind in ("sync", "aio") for op in ("put", "get")} <= ways
    assert ("mooncake" in result["skipped"]) != ("mooncake put x1" in ways)
    for row in result["results"]:
        assert is_spread(row["gb_per_s"]), row
        assert is_spread(row["cpu_s_per_gb"]), row
    cells = {(row["way"], row["run_bytes"]) for row in result["results"]}
    assert cells == {(way, run) for way in ways for run in (16 << 10, 64 << 10, 1 << 20)}
    assert {goal["run_bytes"] for goal in result["goals"]} == {1 << 20}
    assert {"shm / memcpy", "zmq tcp put / grpc"} <= {goal["goal"] for goal in result["goals"]}
    left = {path.name for path in set(Path("/dev/shm").iterdir()) - before}
    assert not {name for name in left if name.startswith("bt-")}


def test_handoff() -> None:
    """Both media and both ways of streaming, compared length by length."""
    result = bench("handoff", "--rounds", "2", "--lengths", "128,300")
    rows = {(row["medium"], row["prompt_tokens"]): row for row in result["results"]}
    assert set(rows) == {(medium, n) for medium in ("shm", "zmq") for n in (128, 300)}
    for row in rows.values():
        assert row["kv_bytes"] > 0
        assert is_spread(row["layers"]["group_ms"])
        assert is_spread(row["layers"]["ttft_ms"])
        assert isinstance(row["exposed_within_a_group"], bool)
        assert isinstance(row["never_worse"], bool)
        assert 0 <= row["share_within_a_group"] <= 1


def test_prefix() -> None:
    """A hit computes its own tail and the prefix's open block, nothing else; from disk as well."""
    result = bench("prefix", "--rounds", "2", "--prefix-tokens", "300")
    cold, hit = result["results"]["cold"], result["results"]["hit"]
    assert cold["computed_as_due"]
    assert cold["computed_tokens"] == [340, 340, 340]
    assert hit["computed_as_due"]
    assert hit["computed_tokens"] == [84, 84, 84]
    assert is_spread(hit["cold_over_this"])
    disk = result["results"]["disk"]
    assert disk["computed_as_due"], "the prefix has not survived a restart of everything"
    assert disk["computed_tokens"] == [84, 84, 84]
    assert (hit["disk_blocks"], disk["disk_blocks"]) == ([0, 0, 0], [4, 4, 4])


def test_takeover() -> None:
    """Every kill interrupts a stream; only the control computes tokens again."""
    result = bench("takeover", "--rounds", "2", "--contexts", "64,256")
    for row in result["results"]:
        assert (row["takeover"]["kills"], row["reprefill"]["kills"]) == (2, 2)
        assert is_spread(row["takeover"]["stall_ms"])
        assert row["takeover"]["recomputed_tokens"] == [0, 0, 0]
        assert row["reprefill"]["recomputed_tokens"][0] >= row["context_tokens"]
        assert is_spread(row["reprefill_over_takeover"])
    for mode in ("takeover", "reprefill"):
        assert {"ms_per_1k_tokens", "standard_error", "grows"} <= set(result["slope"][mode])
