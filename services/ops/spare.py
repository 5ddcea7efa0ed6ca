"""`python -m services.ops.spare services.decode --options`: a process that has everything behind it but
its work, and waits on standard input for a line before it becomes `python -m services.decode --options`.

Half of a restart is importing; who keeps a spare has that time when it does not matter. It ends when
standard input ends: whoever kept it is gone. A module that has a `prepare()` does there what may be done
ahead, while another process of the same name is at work: reading, and no claim on anything.
"""

from __future__ import annotations

import importlib
import sys


def main() -> int:
    """Gives the exit status of the module's own main, or 0 when it was never needed."""
    name, *arguments = sys.argv[1:]
    module = importlib.import_module(f"{name}.__main__")
    sys.argv = [f"{name}.__main__", *arguments]
    if prepare := getattr(module, "prepare", None):
        prepare()
    if not sys.stdin.buffer.readline():
        return 0
    return int(module.main())


if __name__ == "__main__":
    sys.exit(main())
