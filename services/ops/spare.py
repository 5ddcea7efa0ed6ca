"""`python -m services.ops.spare services.decode --options`: a process that has everything behind it but
its work, and waits on standard input for a line before it becomes a `python -m services.decode`.

Half of a start is importing; who keeps a spare has that time when it does not matter. It ends when
standard input ends: whoever kept it is gone. A module that has a `prepare()` does there what may be done
ahead, while another process of the same name is at work: reading, and no claim on anything.

The line says who it becomes, since that may be another process of the same kind: see `wake_line`.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def main() -> int:
    """Gives the exit status of the module's own main, or 0 when it was never needed."""
    name, *arguments = sys.argv[1:]
    module = importlib.import_module(f"{name}.__main__")
    sys.argv = [f"{name}.__main__", *arguments]
    if prepare := getattr(module, "prepare", None):
        prepare()
    if not (line := sys.stdin.buffer.readline()):
        return 0
    _become(name, json.loads(line))
    return int(module.main())


def wake_line(options: Sequence[str], environ: Mapping[str, str], errors: Path) -> bytes:
    """What a spare is told: its options, variables to set, and the file for its standard error."""
    told = {"options": options, "environ": dict(environ), "errors": str(errors)}
    return json.dumps(told).encode() + b"\n"


def _become(name: str, told: dict[str, Any]) -> None:
    sys.argv = [f"{name}.__main__", *told["options"]]
    os.environ.update(told["environ"])
    with open(told["errors"], "ab") as errors:
        os.dup2(errors.fileno(), sys.stderr.fileno())


if __name__ == "__main__":
    sys.exit(main())
