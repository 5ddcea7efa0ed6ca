"""The simulation as part of the tests: seeds that find nothing, and planted bugs that are found.

It runs in a process of its own, because the order of sets is part of a replay.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.sim.mutations import MUTATIONS

SEEDS = 1000  # about a minute on two idle cores; `make sim SEEDS=5000` for more
ROOT = Path(__file__).resolve().parent.parent.parent


def simulate(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.sim", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.timeout(900)
def test_no_seed_finds_anything() -> None:
    """Every accepted request ends once and right, no page has two writers or is read after it was
    given away, no epoch goes back, and at rest nothing is left; each kind of fault has struck."""
    done = simulate("--seeds", str(SEEDS))
    assert done.returncode == 0, done.stdout + done.stderr
    counts = {
        " ".join(words[1:]): int(words[0].replace(",", ""))
        for line in done.stdout.splitlines()
        if len(words := line.split()) > 1 and words[0].replace(",", "").isdigit()
    }
    for fault in (
        "answer lost", "cancel", "client left", "clock set", "decode killed",
        "decode killed within a step", "decode paused within a step", "delayed", "dropped",
        "frames dropped", "journal torn", "link cut", "page corrupted", "partition", "paused",
        "prefill killed", "prefill killed within a step", "prefill paused within a step",
        "resumed", "scheduler killed", "store killed", "store killed within a call",
    ):  # fmt: skip
        assert counts.get(fault, 0) >= 5, f"{fault}: {counts.get(fault, 0)} times"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", sorted(MUTATIONS))
def test_a_planted_bug_is_found(name: str) -> None:
    """Within a bounded number of seeds; otherwise the simulation proves nothing."""
    done = simulate("--mutation", name, "--seeds", "400")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"--seed {first_failed(done.stdout)} -v --mutation {name}" in done.stdout


def first_failed(output: str) -> str:
    return output.split("--seed ")[1].split()[0]


def test_a_move_that_is_given_up_at_once_takes_nothing_from_anybody() -> None:
    """A prefill comes back in the moment in which its host is given up: it is asked for by the move,
    and is where the request goes next. Found by the checker itself, at this seed."""
    assert simulate("--seed", "300926").returncode == 0


def test_a_seed_is_replayed_event_by_event() -> None:
    """The same seed tells the same story."""
    stories = [simulate("--seed", "33", "-v") for _ in range(2)]
    lines = [[line for line in done.stdout.splitlines() if " at: " not in line] for done in stories]
    assert lines[0] == lines[1]
    assert len(lines[0]) > 100
