"""The command line of `baton chaos`. Exit status 0 only when every promise was kept."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import SystemRandom
from typing import Any

from baton.chaos import abort, corruption, full_disk, network
from baton.chaos.asks import read_corpus
from baton.chaos.corrupt import WHERE
from baton.chaos.failures import GUARDS, GUARDS_OF_ALL, ROWS, row_of, schedule_rows
from baton.chaos.plan import DECODE_KILL, PLANS, PREFILL_KILL, ZOMBIE, draw, schedule
from baton.chaos.report import ZEROS
from baton.chaos.scenario import Scenario
from baton.chaos.session import Session, Settings, say
from baton.cluster import default_model
from services.ops.errors import BatonError

SETS = {
    "decode-kill": (tuple(DECODE_KILL), "SIGKILL decodes in the middle of several streams"),
    "prefill-kill": (tuple(PREFILL_KILL), "SIGKILL prefill while it computes prompts"),
    "zombie": (tuple(ZOMBIE), "pause a decode until it is replaced, then wake it"),
}
INTERRUPTED = 130  # the exit status, as of a shell whose command got SIGINT
RUNS = {"decode-kill": 100, "prefill-kill": 8, "zombie": 5}


def main(argv: Sequence[str]) -> int:
    """`argv` is what follows `baton chaos`."""
    options = _parser().parse_args(argv)
    settings = Settings(
        options.model, _seed(options), options.medium, getattr(options, "record", None),
        options.keys_dir,
    )  # fmt: skip
    say(f"baton chaos {options.command} --seed {settings.seed}")
    try:
        with _told_to_stop(), Session(settings) as session:
            summary: dict[str, Any] = options.perform(session, options)
            session.good = not summary["problems"]
    except (OSError, RuntimeError, ValueError, BatonError) as error:
        say(f"baton chaos: {error}")
        return 1
    except KeyboardInterrupt:
        say("baton chaos: stopped before its end")
        return INTERRUPTED
    if options.json:
        print(json.dumps(summary), flush=True)
    else:
        options.show(summary)
    return 1 if summary["problems"] else 0


@contextlib.contextmanager
def _told_to_stop() -> Iterator[None]:
    """SIGTERM does what SIGINT does: clusters, mounts and namespaces are removed on the way out. A
    second one ends it at once, and the next command clears up. A shell has what it starts in the
    background ignore SIGINT: not here."""
    interrupted = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, interrupted)


def _seed(options: argparse.Namespace) -> int:
    given: int | None = getattr(options, "seed", None)
    return SystemRandom().randrange(1 << 31) if given is None else given


def _replay(session: Session, options: argparse.Namespace) -> dict[str, Any]:
    scenarios = [Scenario.read(path) for path in options.files] * options.times
    session.results = session.perform(scenarios)
    return session.summary()


def _set(session: Session, options: argparse.Namespace) -> dict[str, Any]:
    """One set of scenarios."""
    names = options.scenario or SETS[options.command][0]
    order = schedule(names, options.runs, session.settings.seed)
    session.results = session.perform(_drawn(session, order))
    if options.controls:
        session.run_controls(GUARDS, session.settings.seed, options.runs)
    return session.summary()


def _all(session: Session, options: argparse.Namespace) -> dict[str, Any]:
    """Every row of the table of failures."""
    seed = session.settings.seed
    session.skipped = skipped_rows()
    for row, why in session.skipped.items():
        say(f"row {row} is skipped: {why}")
    rows = [row for row in options.row or tuple(ROWS) if row not in session.skipped]
    order = schedule_rows(rows, options.seeds, seed)
    session.results = session.perform(_drawn(session, [name for name in order if name in PLANS]))
    for where in dict.fromkeys(name for name in order if name in WHERE):
        damages = corruption.perform(session, where, range(order.count(where)))
        session.results += [corruption.result(session, damage) for damage in damages]
    if full := order.count(full_disk.ROW):
        session.results += full_disk.perform(session, range(full))
    if options.controls:
        guards = {
            name: guard for name, guard in GUARDS_OF_ALL.items()
            if row_of(guard.scenario) not in session.skipped
        }  # fmt: skip
        session.run_controls(guards, seed, len(order))
        session.controls += [corruption.control(session), full_disk.control(session)]
    return session.summary(row_of)


def skipped_rows() -> dict[str, str]:
    """Rows of the table that this machine cannot perform, and why."""
    why = network.why_not()
    return {"hosts": why} if why else {}


def _drawn(session: Session, order: Sequence[str]) -> list[Scenario]:
    corpus = read_corpus(session.settings.model)
    return [draw(name, session.settings.seed, run, corpus) for run, name in enumerate(order)]


def _corrupt(session: Session, options: argparse.Namespace) -> dict[str, Any]:
    places = options.where or WHERE
    share = -(-options.flips // len(places))
    damages = []
    for where in places:
        numbers = options.round or range(options.flips)
        damages += corruption.perform(
            session, where, numbers, lambda found: sum(d.flips for d in found) >= share
        )
    controls = []
    if options.controls:
        controls = [corruption.control(session), corruption.wire_control(session)]
    return corruption.summary(session, damages, controls)


def _storm(session: Session, options: argparse.Namespace) -> dict[str, Any]:
    storm = abort.perform(session, options.requests)
    found = abort.controls(session) if options.controls else []
    return abort.summary(session, storm, found)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="baton chaos", allow_abbrev=False)
    commands = parser.add_subparsers(required=True, dest="command", metavar="command")
    _add_all(commands)
    _add_corrupt(commands)
    _add_storm(commands)
    for name, (scenarios, text) in SETS.items():
        command = commands.add_parser(name, help=text, allow_abbrev=False)
        command.set_defaults(perform=_set, show=_show)
        command.add_argument("--runs", type=int, default=RUNS[name], help="(default: %(default)s)")
        command.add_argument(
            "--scenario", action="append", choices=scenarios, help="only this; may be repeated"
        )
        command.add_argument(
            "--controls", action=argparse.BooleanOptionalAction, default=name == "decode-kill",
            help="also switch each guard off once and see its count move",
        )  # fmt: skip
        _add_drawn(command)
    replay = commands.add_parser("replay", help="perform recorded crashes", allow_abbrev=False)
    replay.set_defaults(perform=_replay, show=_show)
    replay.add_argument("files", nargs="+", type=Path, help="recordings")
    replay.add_argument("--times", type=int, default=1, help="(default: %(default)s)")
    _add_common(replay)
    return parser


def _add_all(commands: Any) -> None:
    every = commands.add_parser("all", help="every row of docs/failures.md", allow_abbrev=False)
    every.set_defaults(perform=_all, show=_show)
    every.add_argument("--seeds", type=int, default=20, help="runs of each row (%(default)s)")
    every.add_argument("--row", action="append", choices=ROWS, help="only this; may be repeated")
    every.add_argument(
        "--controls", action=argparse.BooleanOptionalAction, default=True,
        help="also switch each guard off once and see its count move",
    )  # fmt: skip
    _add_drawn(every)


def _add_corrupt(commands: Any) -> None:
    corrupt = commands.add_parser("corrupt", help="flip single bytes", allow_abbrev=False)
    corrupt.set_defaults(perform=_corrupt, show=_show_corrupt)
    corrupt.add_argument("--flips", type=int, default=1000, help="in all (default: %(default)s)")
    corrupt.add_argument(
        "--where", action="append", choices=WHERE, help="only here; may be repeated"
    )
    corrupt.add_argument("--round", action="append", type=int, help="only this; may be repeated")
    corrupt.add_argument(
        "--controls", action=argparse.BooleanOptionalAction, default=True,
        help="also flip without verification and see wrong answers",
    )  # fmt: skip
    _add_drawn(corrupt)


def _add_storm(commands: Any) -> None:
    storm = commands.add_parser("abort-storm", help="give up requests", allow_abbrev=False)
    storm.set_defaults(perform=_storm, show=_show_storm)
    storm.add_argument("--requests", type=int, default=2000, help="(default: %(default)s)")
    storm.add_argument(
        "--controls", action=argparse.BooleanOptionalAction, default=True,
        help="also switch each guard off once and see what is left",
    )  # fmt: skip
    _add_drawn(storm)


def _add_drawn(command: argparse.ArgumentParser) -> None:
    command.add_argument("--seed", type=int, help="(default: drawn, and printed)")
    command.add_argument("--record", type=Path, help="directory: write every run down")
    _add_common(command)


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="the last line is one JSON object")
    command.add_argument("--model", default=default_model(), help="(default: the shipped one)")
    command.add_argument("--medium", choices=("shm", "zmq"), default="shm")
    command.add_argument(
        "--keys-dir",
        default=os.environ.get("BATON_KEYS_DIR", ""),
        help="run the clusters with keys",
    )


def _show(summary: dict[str, Any]) -> None:
    for name, row in summary["scenarios"].items():
        pause = row["stall_ms"]
        print(
            f"{name:<24} {row['runs']:>4} runs {row['interrupted_streams']:>4} streams interrupted, "
            f"stall p50 {pause['p50']} p99 {pause['p99']} ms, {row['failures']} failed"
        )
    for name, why in summary["skipped"].items():
        print(f"{name:<24} skipped: {why}")
    for name in ZEROS:
        print(f"{name:<24} {summary[name]:>4}")
    for name in ("stall_ms", "stall_ms_of_the_same_runs", "reprefill_ms"):
        print(f"{name:<26} {summary[name]}")
    _show_end(summary)


def _show_corrupt(summary: dict[str, Any]) -> None:
    for place, row in {**summary["where"], "all": summary}.items():
        print(
            f"{place:<10} {row['flips']:>5} flips, {row['mattering']:>5} of bytes that matter, "
            f"{row['noticed']:>5} noticed, {row['blocks_repaired']:>5} repaired, "
            f"{row['tokens_recomputed_per_block']} tokens recomputed per block, "
            f"{row['wrong_answers']} wrong answers"
        )
    _show_end(summary)


def _show_storm(summary: dict[str, Any]) -> None:
    for stage, hits in summary["stages"].items():
        print(f"{stage:<12} " + ", ".join(f"{count} by {how}" for how, count in hits.items()))
    for name, count in summary.items():
        if name.startswith("leaked_") or name.endswith("_back_ms"):
            print(f"{name:<24} {count}")
    _show_end(summary)


def _show_end(summary: dict[str, Any]) -> None:
    for name, control in summary["controls"].items():
        print(f"control {control['guard_off']:<20} {name} {control['count']}")
    for problem in summary["problems"]:
        print(f"PROBLEM {problem}")
    for failure in summary["failures"]:
        print(f"  {failure['replay']}")
