"""The table of failures (docs/failures.md) as scenarios: each row with the crashes that stand for it,
and each zero with the guard that holds it. Data only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from baton.chaos.corrupt import WHERE
from baton.chaos.plan import DECODE_KILL, PREFILL_KILL, ZOMBIE


@dataclass(frozen=True)
class Row:
    """One line: what happens, and the scenarios that are drawn for it in turn."""

    text: str
    scenarios: tuple[str, ...]


ROWS = {
    "decode-killed": Row(
        "SIGKILL of a decode at any step", tuple(name for name in DECODE_KILL if "+" not in name)
    ),
    "decode-paused": Row("a decode paused beyond its lease, replaced, and woken", tuple(ZOMBIE)),
    "decode-silent": Row("the only decode falls silent: its epoch is kept", ("silent",)),
    "prefill-killed": Row("SIGKILL of the only prefill", tuple(PREFILL_KILL)),
    "prefill-moved": Row(
        "SIGKILL of one of two prefills in mid-chunk: the other goes on after the last complete one",
        ("prefill-mid-chunk",),
    ),
    "prefill-paused": Row("one of two prefills paused in mid-chunk, and woken", ("prefill-paused",)),
    "store-killed": Row("SIGKILL of decode's kv-store", ("store", "store-new-work")),
    "store-paused": Row("decode's kv-store falls silent", ("store-paused", "store-paused-new-work")),
    "scheduler-killed": Row("SIGKILL of the scheduler", ("scheduler", "scheduler-new-work")),
    "scheduler-paused": Row("the scheduler falls silent", ("scheduler-paused",)),
    "lease-expired": Row(
        "the scheduler is away until its streams' leases have run out", ("lease-expired",)
    ),
    "several-at-once": Row(
        "two processes die in the same moment",
        ("decode+store", "decode+scheduler", "store+scheduler", "prefill+store",
         "prefill+scheduler", "decode+prefill"),
    ),
    "link-cut": Row("nothing passes between the two stores", ("link-placed", "link-token")),
    "hosts": Row(
        "processes on several hosts: two do not hear each other and do again, or one host is lost",
        ("hosts-prefill-decode", "hosts-scheduler-prefill", "hosts-scheduler-decode",
         "hosts-decode-alone", "hosts-prefill-lost", "hosts-decode-lost"),
    ),
    "arena-full": Row(
        "more requests than pages, alone, with a decode killed, and with one paused",
        ("arena-full", "arena-full-decode", "arena-full-zombie"),
    ),
    "disk-full": Row("the tier's disk is full while prefixes are written back", ("disk-full",)),
    "page-corrupt": Row("single bytes flipped in pages, at rest and on the wire", WHERE),
}  # fmt: skip


@dataclass(frozen=True)
class Guard:
    """How to see a zero move: what is switched off, and what is then performed."""

    unsafe: tuple[str, ...]
    scenario: str
    counter: str = ""  # that must move; empty: the guard's name in the table


GUARDS = {
    "lost": Guard(("record",), "committed-not-reported"),
    "duplicated": Guard(("dedupe",), "random"),
    "mismatched": Guard(("tail",), "random"),
}
GUARDS_OF_ALL = {
    **GUARDS,
    "leaked_pages": Guard(("quarantine",), "zombie"),
    "leaked_shm_files": Guard(("shm",), "random"),
    "epochs_lost": Guard(("suspicion",), "silent"),
    "leaked_pages, lease-expired": Guard(("lease",), "lease-expired", "leaked_pages"),
    "duplicated, hosts": Guard(("dedupe",), "hosts-decode-alone", "duplicated"),
}


def schedule_rows(rows: Sequence[str], runs: int, seed: int) -> list[str]:
    """Scenarios: `runs` for each row, its own in turn from one drawn from the seed on, the rows
    mixed, so that what one leaves behind another meets."""
    order: list[str] = []
    for row in rows:
        names = ROWS[row].scenarios
        first = Random(f"{seed}/{row}").randrange(len(names))
        order += [names[(first + run) % len(names)] for run in range(runs)]
    Random(f"{seed}/order").shuffle(order)
    return order


def row_of(scenario: str) -> str:
    """The row that a scenario stands for."""
    return next(name for name, row in ROWS.items() if scenario in row.scenarios)
