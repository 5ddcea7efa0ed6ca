"""`baton bench`: figures about a running Baton, with the machine they were measured on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Dispatches to one of the benchmarks by name."""
    from baton.bench import handoff, journal, prefix, takeover
    from baton.bench.engine import command as engine
    from baton.bench.engine import document
    from baton.bench.kv import command as kv

    benches: dict[str, Callable[[Sequence[str]], int]] = {
        "engine": engine.main,
        "engine-report": document.main,
        "handoff": handoff.main,
        "journal": journal.main,
        "kv": kv.main,
        "prefix": prefix.main,
        "takeover": takeover.main,
    }
    arguments = sys.argv[1:] if argv is None else list(argv)
    if not arguments or arguments[0] not in benches:
        print(f"usage: baton bench {{{','.join(benches)}}} [options]", file=sys.stderr)
        return 2
    return benches[arguments[0]](arguments[1:])
