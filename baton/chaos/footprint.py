"""What the processes of a cluster hold of the machine: descriptors, threads, memory, journal rows. Reads
/proc and files; it knows nothing of requests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from services.scheduler import journal


@dataclass(frozen=True)
class Footprint:
    """One process at one moment."""

    fds: int
    threads: int
    rss_kb: int  # of its own memory: the arena, which all of them map, is not in it


def footprint(pid: int) -> Footprint:
    """Raises FileNotFoundError when there is no such process."""
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    fds = sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
    return Footprint(fds, int(status["Threads"]), int(status["RssAnon"].split()[0]))


def least(samples: Iterable[Footprint]) -> Footprint:
    """The smallest of each: descriptors that are open for a moment are not held."""
    seen = list(samples)
    return Footprint(
        min(s.fds for s in seen), min(s.threads for s in seen), min(s.rss_kb for s in seen)
    )


def grown(
    before: Mapping[str, Footprint], after: Mapping[str, Footprint], what: str
) -> dict[str, int]:
    """By how much each process holds more than before; processes that do not are left out."""
    more = {name: getattr(after[name], what) - getattr(before[name], what) for name in before}
    return {name: count for name, count in more.items() if count > 0}


def journal_rows(directory: Path) -> int:
    """Rows about requests; the last epoch given out has a row of its own, which does not count."""
    rows = journal.read(directory / "journal")
    return sum(1 for row in rows if not (row.HasField("placed") and not row.placed.request_id))
