"""`baton chaos corrupt`: rounds of corruption until enough bytes have been flipped in each place, the
control without verification, and the JSON object. `corrupt` performs one round."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from random import Random
from typing import Any

from baton.chaos import report
from baton.chaos.asks import read_corpus
from baton.chaos.corrupt import SETUP_OF, Round
from baton.chaos.corrupt_disk import DiskRound
from baton.chaos.damage import Damage
from baton.chaos.judge import Verdict
from baton.chaos.lab import Lab
from baton.chaos.report import Control, Result
from baton.chaos.session import Session, say
from baton.chaos.setups import SETUPS

CONTROL_ROUNDS_MAX = 6
UNSAFE, UNSAFE_WIRE = ("verify",), ("wire",)
_SUMS = (
    "flips", "mattering", "noticed", "corrupt_blocks", "corrupt_messages", "headers_mended",
    "cached_dropped", "blocks_repaired", "tokens_repaired", "repair_mismatches",
    "prompt_tokens_recomputed",
)  # fmt: skip

Enough = Callable[[Sequence[Damage]], bool]


def perform(
    session: Session, where: str, numbers: Iterable[int], enough: Enough = lambda _: False,
    unsafe: tuple[str, ...] = (),
) -> list[Damage]:  # fmt: skip
    """Rounds in one place, on one cluster, until there are `enough`."""
    return asyncio.run(_perform(session, where, numbers, enough, unsafe))


async def _perform(
    session: Session, where: str, numbers: Iterable[int], enough: Enough, unsafe: tuple[str, ...]
) -> list[Damage]:
    seed, setup = session.settings.seed, SETUP_OF[where]
    corpus = read_corpus(session.settings.model)
    found: list[Damage] = []
    with Lab(session.spec(setup, unsafe), SETUPS[setup], Random(seed)) as lab:
        connection = lab.connect()
        for number in numbers:
            kind = DiskRound if where == "disk" else Round
            damage = await kind(lab, connection, where, seed, number, corpus).perform(
                session.tokens_of
            )
            found.append(damage)
            say(
                f"{damage.label} {damage.flips} flips, {damage.noticed} noticed, "
                f"{damage.blocks_repaired} repaired, {damage.prompt_tokens_recomputed} prompt "
                f"tokens recomputed: {damage.why()}"
            )
            if enough(found):
                break
        await connection.close()
    if not unsafe:
        session.leaked_shm_files += lab.leaked_shm_files
    return found


def replay(session: Session, damage: Damage) -> str:
    """The command that performs a round again."""
    settings = session.settings
    return (
        f"baton chaos corrupt --where {damage.where} --round {damage.number} "
        f"--seed {settings.seed} --medium {settings.medium} --model {settings.model}"
    )


def result(session: Session, damage: Damage) -> Result:
    """A round as one run of the table."""
    return Result(
        damage.where, damage.label, damage.verdict, damage.stalls_ms, damage.streams,
        len(damage.stalls_ms), reached=damage.flips > 0, only_a_decode=False,
        trouble="" if damage.good else damage.why(),
        replay="" if damage.good else replay(session, damage),
    )  # fmt: skip


def control(session: Session, where: str = "announced") -> Control:
    """Without verification the flips become tokens."""
    damages = perform(
        session, where, range(CONTROL_ROUNDS_MAX), lambda ds: _verdict(ds).wrong_answers > 0, UNSAFE
    )
    count = _verdict(damages).wrong_answers
    return session.control("wrong_answers", UNSAFE, len(damages), count)


def wire_control(session: Session) -> Control:
    """Without verification on arrival damaged rows are taken; whoever reads them notices."""
    damages = perform(session, "wire", range(1), unsafe=UNSAFE_WIRE)
    count = sum(damage.mattering - damage.noticed for damage in damages)
    return session.control("unnoticed", UNSAFE_WIRE, len(damages), count)


def _verdict(damages: Iterable[Damage]) -> Verdict:
    return sum((damage.verdict for damage in damages), Verdict())


def summary(
    session: Session, damages: Sequence[Damage], controls: Sequence[Control]
) -> dict[str, Any]:
    """The JSON object."""
    problems = [f"{d.label}: {d.why()}" for d in damages if not d.good]
    problems += [f"control {c.guard_off}: {c.counter} stayed 0" for c in controls if not c.works]
    if session.leaked_shm_files:
        problems.append(f"{session.leaked_shm_files} files were left in shared memory")
    places = dict.fromkeys(damage.where for damage in damages)
    return {
        "seed": session.settings.seed,
        "medium": session.settings.medium,
        **_figures(damages),
        "leaked_shm_files": session.leaked_shm_files,
        "where": {place: _figures([d for d in damages if d.where == place]) for place in places},
        "parts": dict(sum((Counter(dict(d.parts)) for d in damages), Counter())),
        "controls": {
            c.counter: {"guard_off": c.guard_off, "runs": c.runs, "count": c.count}
            for c in controls
        },
        "machine": report.machine(),
        "failures": [
            {"run": d.label, "why": d.why(), "replay": replay(session, d)}
            for d in damages
            if not d.good
        ],
        "problems": problems,
    }


def _figures(damages: Sequence[Damage]) -> dict[str, Any]:
    sums = {name: sum(getattr(damage, name) for damage in damages) for name in _SUMS}
    verdict = _verdict(damages)
    again, blocks = sums["tokens_repaired"], sums["corrupt_blocks"]
    again += sums["prompt_tokens_recomputed"]
    stalls = [ms for damage in damages for ms in damage.stalls_ms]
    return {
        "rounds": len(damages),
        **sums,
        "tokens_recomputed_per_block": round(again / blocks, 1) if blocks else None,
        **{name: getattr(verdict, name) for name in ("lost", "duplicated", "mismatched")},
        "wrong_answers": verdict.wrong_answers,
        "leaked_pages": verdict.leaked_pages,
        "stall_ms_p50": _rounded(report.percentile(stalls, 50)),
        "stall_ms_p99": _rounded(report.percentile(stalls, 99)),
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)
