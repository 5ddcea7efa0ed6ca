"""The engines' processes as the benchmark holds them. Who is not asked is stopped (SIGSTOP): nobody's
idle threads spin beside somebody else's round."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from baton.bench.engine.engines import BATON, MODULES, VLLM, Setup
from baton.closing import Closing
from baton.handle import tail

LOAD_S_MAX, CALL_S_MAX = 900.0, 600.0
ROOT = Path(__file__).resolve().parents[3]


class PlayerFailed(Exception):
    """An engine cannot be loaded or has failed; the text says why."""


def interpreter(engine: str, peers: Path) -> Path:
    return Path(sys.executable) if engine == BATON else peers / "bin" / "python"


def missing(engine: str, peers: Path) -> str:
    """Why an engine cannot be measured here; an empty string when it can."""
    python, needs = interpreter(engine, peers), MODULES[engine][1]
    if not python.exists():
        return f"no virtual environment in {peers}: scripts/install_peers.py makes it"
    look = f"import importlib.util as u, sys; sys.exit(u.find_spec({needs!r}) is None)"
    if subprocess.run([str(python), "-c", look], check=False).returncode:
        return f"{needs} is not installed in {peers}"
    return ""


def _environment(setup: Setup, peers: Path) -> dict[str, str]:
    """vLLM asks for Intel's OpenMP before any other, and keeps what it compiles."""
    added = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(setup.threads)}
    if setup.engine == VLLM:
        added["LD_PRELOAD"] = str(peers / "lib" / "libiomp5.so")
        added["VLLM_CACHE_ROOT"] = f"{setup.weights}/vllm-compiled"
    return {**os.environ, **added}


class Player(Closing):
    """One engine with its model; use as a context manager. Raises PlayerFailed."""

    def __init__(self, setup: Setup, peers: Path, log: Path) -> None:
        self.name, self._log = setup.engine, log
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                [str(interpreter(setup.engine, peers)), "-m", "baton.bench.engine.worker"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                env=_environment(setup, peers), cwd=log.parent,
            )  # fmt: skip
        try:
            self._send(asdict(setup))
            self.facts: dict[str, Any] = self._receive(LOAD_S_MAX)
            self._signal(signal.SIGSTOP)
        except BaseException:
            self.close()
            raise

    def call(self, method: str, *arguments: Any) -> Any:
        self.start(method, *arguments)
        return self.answer()

    def start(self, method: str, *arguments: Any) -> None:
        """Begins a call; `answer` follows."""
        self._signal(signal.SIGCONT)
        self._send([method, *arguments])

    def answer(self) -> Any:
        """What the call gave; the engine rests from then on."""
        try:
            return self._receive(CALL_S_MAX)
        finally:
            self._signal(signal.SIGSTOP)

    def _send(self, request: Any) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # told by the answer that does not come
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()

    def _receive(self, deadline_s: float) -> Any:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], deadline_s)
        line = self.process.stdout.readline() if ready else "{}"
        if not line:
            raise PlayerFailed(f"{self.name}: its process is gone\n{tail(self._log, 8)}")
        answer = json.loads(line)
        if "value" not in answer:
            raise PlayerFailed(f"{self.name}: {answer.get('error', 'no answer')}")
        return answer["value"]

    def _signal(self, number: int) -> None:
        if self.process.poll() is None:
            os.kill(self.process.pid, number)

    def close(self) -> None:
        """Ends the process; its memory is free when this returns."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()
