"""The command line of `baton chaos`. Exit status 0 only when every promise was kept."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from random import SystemRandom
from typing import Any

from baton.chaos.plan import DECODE_KILL, PREFILL_KILL, ZOMBIE, draw, read_corpus, schedule
from baton.chaos.scenario import Scenario
from baton.chaos.session import Session, Settings, say
from baton.cluster import default_model

SETS = {
    "decode-kill": (tuple(DECODE_KILL), "SIGKILL decodes in the middle of several streams"),
    "prefill-kill": (tuple(PREFILL_KILL), "SIGKILL prefill while it computes prompts"),
    "zombie": (tuple(ZOMBIE), "pause a decode until it is replaced, then wake it"),
}
RUNS = {"decode-kill": 100, "prefill-kill": 8, "zombie": 5}


def main(argv: Sequence[str]) -> int:
    """`argv` is what follows `baton chaos`."""
    options = _parser().parse_args(argv)
    settings = Settings(
        options.model, _seed(options), options.medium, getattr(options, "record", None)
    )
    try:
        with Session(settings) as session:
            if options.command == "replay":
                scenarios = [Scenario.read(path) for path in options.files] * options.times
                session.results = session.perform(scenarios)
            else:
                _run(session, options)
            summary = session.summary()
    except (OSError, RuntimeError, ValueError) as error:
        say(f"baton chaos: {error}")
        return 1
    _show(summary, options.json)
    return 1 if summary["problems"] else 0


def _seed(options: argparse.Namespace) -> int:
    given: int | None = getattr(options, "seed", None)
    return SystemRandom().randrange(1 << 31) if given is None else given


def _run(session: Session, options: argparse.Namespace) -> None:
    seed = session.settings.seed
    say(f"baton chaos {options.command} --seed {seed}")
    corpus = read_corpus(options.model)
    names = options.scenario or SETS[options.command][0]
    order = schedule(names, options.runs, seed)
    drawn = [draw(name, seed, run, corpus) for run, name in enumerate(order)]
    session.results = session.perform(drawn)
    if options.controls:
        session.run_controls(seed, options.runs)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="baton chaos", allow_abbrev=False)
    commands = parser.add_subparsers(required=True, dest="command", metavar="command")
    for name, (scenarios, text) in SETS.items():
        command = commands.add_parser(name, help=text, allow_abbrev=False)
        command.add_argument("--runs", type=int, default=RUNS[name], help="(default: %(default)s)")
        command.add_argument("--seed", type=int, help="(default: drawn, and printed)")
        command.add_argument(
            "--scenario", action="append", choices=scenarios, help="only this; may be repeated"
        )
        command.add_argument(
            "--controls", action=argparse.BooleanOptionalAction, default=name == "decode-kill",
            help="also switch each guard off once and see its count move",
        )  # fmt: skip
        command.add_argument("--record", type=Path, help="directory: write every run down")
        _add_common(command)
    replay = commands.add_parser("replay", help="perform recorded crashes", allow_abbrev=False)
    replay.add_argument("files", nargs="+", type=Path, help="recordings")
    replay.add_argument("--times", type=int, default=1, help="(default: %(default)s)")
    _add_common(replay)
    return parser


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="the last line is one JSON object")
    command.add_argument("--model", default=default_model(), help="(default: the shipped one)")
    command.add_argument("--medium", choices=("shm", "zmq"), default="shm")


def _show(summary: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(summary), flush=True)
        return
    for name, row in summary["scenarios"].items():
        pause = row["stall_ms"]
        print(
            f"{name:<24} {row['runs']:>4} runs {row['interrupted_streams']:>4} streams interrupted, "
            f"stall p50 {pause['p50']} p99 {pause['p99']} ms, {row['failures']} failed"
        )
    for name in ("lost", "duplicated", "mismatched", "prompt_tokens_recomputed", "leaked_pages"):
        print(f"{name:<24} {summary[name]:>4}")
    for name in ("stall_ms", "stall_ms_of_the_same_runs", "reprefill_ms"):
        print(f"{name:<26} {summary[name]}")
    for name, control in summary["controls"].items():
        print(f"control {control['guard_off']:<20} {name} {control['count']}")
    for problem in summary["problems"]:
        print(f"PROBLEM {problem}")
    for failure in summary["failures"]:
        print(f"  {failure['replay']}")
