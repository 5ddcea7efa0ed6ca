"""What `make run` shows: one completion, and the same one again with its decode process killed.

Starts a cluster of its own in a temporary run directory, on a free port, and ends it. The last line is
one JSON object; the exit status is 0 only when both streams finished and have the same tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from baton.client import Client
from baton.cluster import ClusterSpec
from baton.handle import SupervisorHandle
from baton.v1 import inference_pb2 as pb

PROMPT_CHARACTERS = 2500
TOKENS = 120
KILL_AT = 40
SAMPLING: dict[str, Any] = {"max_tokens": TOKENS, "temperature": 0.5, "top_p": 0.95, "seed": 7}


def prompt() -> str:
    """A piece of a module of the standard library, up to the head of a method."""
    head = "    def get_nowait(self):\n"
    text = Path(queue.__file__).read_text()
    end = text.index(head) + len(head)
    return text[max(0, end - PROMPT_CHARACTERS) : end]


class Stream:
    """One completion as its reader sees it."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.final = pb.GenerateEvent()
        self.gap_ms_max = 0.0
        self.killed_pid = 0

    @property
    def finished(self) -> bool:
        return bool(self.final.HasField("finished"))

    def follow(self, client: Client, request_id: str, kill: bool) -> None:
        """Prints the text as it comes; at token KILL_AT kills the process that makes it."""
        last = time.monotonic()
        options = {**SAMPLING, "ignore_eos": True, "request_id": request_id}
        for event in client.generate(prompt(), timeout_s=120.0, **options):
            now = time.monotonic()
            if self.token_ids:
                self.gap_ms_max = max(self.gap_ms_max, 1000 * (now - last))
            last, self.final = now, event
            if event.HasField("token"):
                self.token_ids.append(event.token.token_id)
                print(event.token.text, end="", flush=True)
                if kill and event.token.index == KILL_AT:
                    self.killed_pid = kill_decode(client, request_id)
        print()


def kill_decode(client: Client, request_id: str) -> int:
    """SIGKILL to the decode worker that runs the request; gives its pid, 0 when none runs it."""
    for worker in client.view().workers:
        if worker.name.startswith("decode") and request_id in worker.running_requests:
            os.kill(worker.pid, signal.SIGKILL)
            print(f"<kill -9 {worker.pid}>", end="", flush=True)
            return int(worker.pid)
    return 0


def describe(client: Client, first: Stream) -> dict[str, Any]:
    """What the undisturbed stream cost and who did the work; prints it too."""
    usage, timing = first.final.finished.usage, first.final.finished.timing
    pids = {worker.name: worker.pid for worker in client.view().workers}
    prefill, decode = timing.prefill_worker, timing.decode_worker
    hidden = 1 - timing.exposed_transfer_ms / timing.transfer_ms if timing.transfer_ms else 0.0
    print(f"  prompt            {usage.prompt_tokens} tokens, computed by {prefill}")
    print(f"                    (pid {pids[prefill]}); the rest by {decode} (pid {pids[decode]})")
    print(f"  first token       {timing.ttft_ms:.1f} ms")
    print(f"  each token after  {timing.tpot_ms:.2f} ms")
    print(f"  KV handed over    {timing.kv_bytes / 1e6:.2f} MB in {timing.transfer_ms:.2f} ms,")
    print(f"                    {hidden:.0%} of it hidden under compute")
    return {
        "finished": first.finished,
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "ttft_ms": round(timing.ttft_ms, 2),
        "tpot_ms": round(timing.tpot_ms, 3),
        "kv_bytes": timing.kv_bytes,
        "transfer_ms": round(timing.transfer_ms, 3),
        "exposed_transfer_ms": round(timing.exposed_transfer_ms, 3),
        "hidden_share": round(hidden, 3),
        "prefill": {"name": prefill, "pid": pids[prefill]},
        "decode": {"name": decode, "pid": pids[decode]},
    }


def describe_kill(first: Stream, second: Stream) -> dict[str, Any]:
    """What the reader of the disturbed stream could notice; prints it too."""
    usage, timing = second.final.finished.usage, second.final.finished.timing
    same = first.token_ids == second.token_ids
    print(f"  same tokens       {'yes' if same else 'NO'}")
    print(f"  longest pause     {second.gap_ms_max:.0f} ms, {timing.takeovers} takeover")
    print(f"  recomputed        {usage.recomputed_tokens} prompt tokens")
    return {
        "finished": second.finished,
        "killed_pid": second.killed_pid,
        "same_tokens": same,
        "takeovers": timing.takeovers,
        "pause_ms": round(second.gap_ms_max, 1),
        "recomputed_tokens": usage.recomputed_tokens,
    }


def demonstrate(cluster: SupervisorHandle, with_kill: bool) -> dict[str, Any]:
    with Client(cluster.address, keys_dir=cluster.spec.keys_dir) as client:
        print(f"\n--- a completion, from {cluster.address} ---")
        print("\n".join(prompt().splitlines()[-3:]))
        first = Stream()
        first.follow(client, "demo-1", kill=False)
        if not first.finished:
            return {"ok": False, "failed": first.final.failed.message}
        result = {"ok": True, **describe(client, first)}
        if with_kill:
            print("\n--- the same, and decode is killed in the middle ---")
            second = Stream()
            second.follow(client, "demo-2", kill=True)
            result["kill"] = killed = describe_kill(first, second)
            result["ok"] = killed["finished"] and killed["same_tokens"] and second.killed_pid > 0
        return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--medium", default="shm", choices=("shm", "zmq"))
    parser.add_argument("--keys-dir", default="", help="run the cluster with keys")
    parser.add_argument("--no-kill", action="store_true", help="only the undisturbed stream")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="baton-demo-") as run_dir:
        spec = ClusterSpec(
            run_dir=run_dir, listen="127.0.0.1:0", medium=options.medium, keys_dir=options.keys_dir
        )
        print("starting kv-store, scheduler, prefill and two decodes ...", flush=True)
        started = time.monotonic()
        with SupervisorHandle.start(spec) as cluster:
            print(f"ready after {time.monotonic() - started:.1f} s")
            result = demonstrate(cluster, not options.no_kill)
    print(json.dumps(result))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
