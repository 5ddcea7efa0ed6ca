"""`baton chaos`: break a running cluster on purpose and compare what clients see with an undisturbed
run. `scenario` is the data, `plan` draws it, `runner` performs it, `judge` compares."""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point; `argv` is what follows `baton chaos`. Gives the exit status."""
    from baton.chaos import command  # so that reading a recording needs no cluster

    return command.main(sys.argv[1:] if argv is None else argv)
