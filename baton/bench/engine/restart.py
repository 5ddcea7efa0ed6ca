"""How soon a worker is there: on a host that has nothing yet, beside one that has, and after a death.

Real clusters. Cold: from the start of `baton up` with an empty cache of packed weights until a client
has its first token. Second: from the request for another decode, as of `baton scale`, until it is ready,
weights attached and registered; it comes from a spare. Alone: the same of a process that is started
without one, as on a host with a supervisor of its own. Restart: a stream is decoded by the only decode,
which is killed with SIGKILL; until its client has the next token. Each after some seconds of quiet, in
which spares get ready and no death counts as one of a series.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

from baton.bench.engine import report
from baton.bench.engine.rounds import Cell
from baton.bench.figures import quartiles
from baton.bench.kv.actors import START_S_MAX, ActorFailed, child
from baton.chaos.judge import stall_s
from baton.client import Client
from baton.cluster import ClusterSpec, ProcessSpec, default_model, processes
from baton.handle import SupervisorHandle, scale, tail, wait_until
from baton.v1 import cluster_pb2

SECOND_OVER_COLD_MAX, BACK_S_MAX = 0.1, 0.5
PROMPT, TOKENS, KILL_AT = 256, 200, 12
KILLS, COLD_START_S_MAX, QUIET_S = 5, 600.0, 3.0
ARENA_BYTES = 512 << 20


def measure(model: Path, cell: Cell, rounds: int) -> dict[str, Any]:
    """Seconds of each kind, one of each in a round."""
    found = {name: list[float]() for name in ("cold", "warm", "second", "alone", "back")}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(prefix="br-", dir="/tmp") as scratch:
            root = Path(scratch)
            cold = _spec(root / "cold", _servable(model, root / "m"), cell.format, root / "packed")
            seconds, cluster = _up(cold)
            with cluster:
                found["cold"].append(seconds)
                found["second"].append(_second(cluster))
                found["alone"].append(_alone(cold))
                found["back"] += _kills(cluster)
            again = dataclasses.replace(cold, run_dir=str(root / "warm"))
            seconds, cluster = _up(again)
            with cluster:
                found["warm"].append(seconds)
    ratios = [b / a for a, b in zip(found["cold"], found["second"], strict=True)]
    return {
        "shape": cell.shape, "format": cell.format,
        **{f"{name}_s": quartiles(values) for name, values in found.items()},
        "second_over_cold": quartiles(ratios), "kills": len(found["back"]),
    }  # fmt: skip


def goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for row in rows:
        cell = Cell(row["shape"], row["format"], 1)
        for text, name, bound in (
            ("second worker / cold start", "second_over_cold", SECOND_OVER_COLD_MAX),
            ("a killed decode is back, s", "back_s", BACK_S_MAX),
        ):
            found.append(report.row(6, text, cell, "", row[name], bound, "", at_most=True))
    return found


def _servable(checkpoint: Path, directory: Path) -> Path:
    """The checkpoint with a tokenizer beside it: a scheduler needs one, whatever the text."""
    directory.mkdir()
    for file in (*checkpoint.iterdir(), Path(default_model()) / "tokenizer.json"):
        os.symlink(file, directory / file.name)
    return directory


def _spec(run_dir: Path, model: Path, format_: str, packed: Path) -> ClusterSpec:
    return ClusterSpec(
        run_dir=str(run_dir), model=str(model), decode=1, weights=format_, weights_cache=str(packed),
        arena_bytes=ARENA_BYTES, listen="127.0.0.1:0", log_level="warning",
    )  # fmt: skip


def _up(spec: ClusterSpec) -> tuple[float, SupervisorHandle]:
    """A cluster, and how long it took until a client had a token."""
    start = time.monotonic()
    cluster = SupervisorHandle.start(spec, deadline_s=COLD_START_S_MAX)
    with Client(cluster.address) as client:
        for event in client.generate(list(range(100, 116)), max_tokens=1, retain_ms=0):
            if event.HasField("token"):
                return time.monotonic() - start, cluster
    cluster.stop()
    raise ActorFailed("no token came")


def _second(cluster: SupervisorHandle) -> float:
    """Another decode of the cluster, ended once it is ready."""
    time.sleep(QUIET_S)
    start = time.monotonic()
    scale(cluster.spec.path, 2)
    seconds = time.monotonic() - start
    scale(cluster.spec.path, 1)
    return seconds


def _alone(spec: ClusterSpec) -> float:
    """A decode process on the same host, ended once it is ready."""
    other = next(p for p in processes(dataclasses.replace(spec, decode=2)) if p.name == "decode-1")
    log = spec.path / "second.log"
    start = time.monotonic()
    process = _start(other, log)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if b"READY" not in line:
            raise ActorFailed(f"the second decode: not ready\n{tail(log)}")
        return time.monotonic() - start
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(START_S_MAX)
        if process.stdout is not None:
            process.stdout.close()


def _start(spec: ProcessSpec, log: Path) -> Any:
    with log.open("ab") as errors:
        environment = [f"{name}={value}" for name, value in spec.environment({}).items()]
        return child(["/usr/bin/env", *environment, *spec.argv], -1, errors)


def _kills(cluster: SupervisorHandle) -> list[float]:
    """Seconds from each death of the only decode until the next token at the client."""
    found: list[float] = []
    with Client(cluster.address) as client:
        for _ in range(KILLS):
            wait_until(lambda: _ready(client), START_S_MAX, "the decode")
            time.sleep(QUIET_S)
            gap = _kill_once(cluster, client)
            found += [] if gap is None else [gap]
    return found


def _ready(client: Client) -> bool:
    return any(
        worker.name == "decode-0" and worker.state == cluster_pb2.WORKER_STATE_READY
        for worker in client.view().workers
    )


def _kill_once(cluster: SupervisorHandle, client: Client) -> float | None:
    """None when all tokens were on their way already."""
    times, killed_at = list[float](), 0.0
    for event in client.generate(
        list(range(100, 100 + PROMPT)), max_tokens=TOKENS, ignore_eos=True, retain_ms=0
    ):
        if not event.HasField("token"):
            continue
        times.append(time.monotonic())
        if event.token.index == KILL_AT:
            killed_at = time.monotonic()
            os.kill(cluster.pid("decode-0"), signal.SIGKILL)
    assert len(times) == TOKENS, f"{len(times)} tokens came of {TOKENS}"
    return stall_s(times, killed_at)
