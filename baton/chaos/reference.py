"""The undisturbed run: `services.engine.reference` as a process of its own, asked over a pipe."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from baton.chaos.scenario import Ask
from baton.closing import Closing


class ReferenceProcess(Closing):
    """Answers with the tokens that a request must give. Equal requests are computed once."""

    def __init__(self, model: str) -> None:
        command = [sys.executable, "-m", "services.engine.reference", "--model", model]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, process_group=0
        )
        self._known: dict[Ask, list[int]] = {}

    def tokens(self, ask: Ask) -> list[int]:
        """Blocks until they are computed. Raises RuntimeError when the process is gone."""
        if ask not in self._known:
            self._known[ask] = self._compute(ask)
        return self._known[ask]

    def _compute(self, ask: Ask) -> list[int]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line: dict[str, Any] = {
            "token_ids": list(ask.token_ids), "max_tokens": ask.max_tokens, "ignore_eos": True,
            "temperature": ask.temperature, "top_p": ask.top_p, "top_k": ask.top_k,
            "seed": ask.seed,
        }  # fmt: skip
        self._process.stdin.write(json.dumps(line) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the reference ended with status {self._process.wait()}")
        tokens: list[int] = json.loads(answer)["token_ids"]
        return tokens

    def close(self) -> None:
        """The end of its input is its end."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.wait()
