"""Named places where a test can make a process die. Off unless a directory is configured.

A failpoint is armed by a file `<directory>/<any name>.json` with the keys `point`,
`action` (`kill` or `stop`), and optionally `index` and `process`. The first process that reaches it
renames the file, so that it fires once.
"""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path

_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


@dataclass
class Failpoints:
    """The armed failpoints of one process; `refresh()` looks at the directory."""

    directory: str
    process: str

    def __post_init__(self) -> None:
        self._armed: list[tuple[Path, dict[str, object]]] = []

    def refresh(self) -> None:
        """Reads what is armed now; called where a request enters the process."""
        if not self.directory:
            return
        armed = []
        for path in sorted(Path(self.directory).glob("*.json")):
            try:
                armed.append((path, json.loads(path.read_text())))
            except (FileNotFoundError, json.JSONDecodeError):
                continue  # another process took it between the two calls, or it is being written
        self._armed = armed

    @property
    def armed(self) -> bool:
        """Whether any is, for any process: as of the last `refresh`."""
        return bool(self._armed)

    def hit(self, point: str, index: int | None = None) -> None:
        """Dies here when this point is armed for this process and index."""
        for path, spec in self._armed:
            if spec["point"] != point or spec.get("process", self.process) != self.process:
                continue
            if spec.get("index", index) != index:
                continue
            try:
                path.rename(path.with_suffix(f".fired-{self.process}-{os.getpid()}"))
            except FileNotFoundError:
                continue
            os.kill(os.getpid(), _SIGNALS[str(spec.get("action", "kill"))])
