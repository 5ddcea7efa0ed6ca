"""An engine's process: `python -m baton.bench.engine.worker`, one JSON object a line each way.

The first line is the set-up; then calls, `["method", arguments...]`. What is answered is
`{"value": ...}` or `{"error": text}`. Whatever else a library prints goes to standard error.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from typing import Any, TextIO

from baton.bench.engine.engines import Engine, Setup, make

_PR_SET_PDEATHSIG = 1


def memory_bytes() -> dict[str, int]:
    """Resident memory of this process: its own, and what it maps from files."""
    fields = {}
    with open("/proc/self/status") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name in ("RssAnon", "RssFile", "RssShmem"):
                fields[name] = int(value.split()[0]) << 10
    return fields


class Worker:
    """Answers calls until standard input ends."""

    def __init__(self, answers: TextIO) -> None:
        self._answers = answers
        self._engine: Engine | None = None

    def load(self, **fields: Any) -> dict[str, Any]:
        setup = Setup(**fields)
        os.sched_setaffinity(0, setup.cores)
        os.environ["OMP_NUM_THREADS"] = str(setup.threads)
        before = memory_bytes()["RssAnon"]
        self._engine = make(setup)
        return {**self._engine.facts(), "rss_before": before, "rss": memory_bytes()}

    def call(self, method: str, *arguments: Any) -> Any:
        if method == "memory":
            return memory_bytes()
        return getattr(self._engine, method)(*arguments)

    def run(self) -> None:
        for line in sys.stdin:
            request = json.loads(line)
            try:
                value = self.load(**request) if isinstance(request, dict) else self.call(*request)
            except Exception as error:  # noqa: BLE001  reported to whoever called
                self._say({"error": f"{type(error).__name__}: {error}"})
                continue
            self._say({"value": value})

    def _say(self, answer: dict[str, Any]) -> None:
        self._answers.write(json.dumps(answer) + "\n")
        self._answers.flush()


def main() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    Worker(answers).run()
    os._exit(0)  # some libraries hang in their own ends


if __name__ == "__main__":
    main()
