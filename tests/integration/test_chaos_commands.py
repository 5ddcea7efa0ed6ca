"""`baton chaos corrupt`, `abort-storm` and `all`, small, on real processes: their zeros, and their
controls, which are not zero."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from baton import chaos
from baton.chaos import abort, corruption, full_disk, network, report
from baton.chaos.asks import read_corpus
from baton.chaos.failures import GUARDS_OF_ALL, row_of
from baton.chaos.plan import draw
from baton.chaos.session import Session, Settings
from baton.cluster import default_model

pytestmark = pytest.mark.processes


def summary_of(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    """The JSON object of a command that must succeed."""
    status = chaos.main([*argv, "--json"])
    summary: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["problems"] == []
    assert status == 0
    return summary


@pytest.mark.parametrize("medium", ["shm", "zmq"])
def test_no_flipped_byte_becomes_a_token(capsys: pytest.CaptureFixture[str], medium: str) -> None:
    """Wherever a page lies: the same tokens, nothing leaked, and the damage has been noticed."""
    argv = ("--flips=30", "--no-controls", "--seed=1", f"--medium={medium}")
    summary = summary_of(capsys, "corrupt", *argv)
    assert summary["flips"] >= 30
    assert summary["mattering"] > 0
    assert summary["wrong_answers"] == summary["leaked_pages"] == summary["leaked_shm_files"] == 0
    assert set(summary["where"]) == set(corruption.SETUP_OF)
    wire = summary["where"]["wire"]
    assert wire["noticed"] == wire["mattering"] == wire["corrupt_messages"] > 0


def test_without_verification_flips_become_tokens() -> None:
    """The control: the judge sees it."""
    with Session(Settings(default_model(), seed=7)) as session:
        session.good = True
        assert corruption.control(session).works


def test_without_verification_on_arrival_damage_is_taken() -> None:
    """The control of the wire: the store's counter stays behind what was flipped."""
    with Session(Settings(default_model(), seed=7)) as session:
        session.good = True
        assert corruption.wire_control(session).works


@pytest.mark.parametrize("medium", ["shm", "zmq"])
def test_requests_that_are_given_up_leave_nothing(
    capsys: pytest.CaptureFixture[str], medium: str
) -> None:
    """At every stage, by Cancel and by a client that goes away: pages, streams, descriptors and
    journal rows are what they were."""
    argv = ("--requests=144", "--no-controls", "--seed=1", f"--medium={medium}")
    summary = summary_of(capsys, "abort-storm", *argv)
    assert summary["hit"] > 100
    leaks = {name: count for name, count in summary.items() if name.startswith("leaked_")}
    assert set(leaks.values()) == {0}


def test_without_the_orphan_clock_streams_stay() -> None:
    """The control: clients that went away are waited for."""
    with Session(Settings(default_model(), seed=1)) as session:
        session.good = True
        assert abort.perform(session, 0, ("orphan",)).left.streams == abort.ABANDONED


def test_rows_of_the_table_hold(capsys: pytest.CaptureFixture[str]) -> None:
    """Those that need a cluster of their own kind."""
    rows = (
        "decode-silent", "prefill-moved", "prefill-paused", "link-cut", "lease-expired", "arena-full",
        "disk-full", *(() if network.why_not() else ("hosts",)),
    )  # fmt: skip
    argv = [f"--row={row}" for row in rows]
    summary = summary_of(capsys, "all", "--seeds=1", "--seed=1", "--no-controls", *argv)
    assert set(summary["scenarios"]) == set(rows)
    zeros = ("lost", "duplicated", "mismatched", "wrong_answers", "leaked_pages")
    assert [summary[name] for name in (*zeros, "leaked_shm_files", "epochs_lost")] == [0] * 7
    assert summary["leaked_disk_files"] == 0


@pytest.mark.parametrize(
    "name", ["leaked_pages, lease-expired", "epochs_lost", "duplicated, hosts"]
)
def test_the_rows_own_controls_move(name: str) -> None:
    """With the row's guard off its count is not zero."""
    guard = GUARDS_OF_ALL[name]
    if row_of(guard.scenario) == "hosts" and (why := network.why_not()):
        pytest.skip(why)
    with Session(Settings(default_model(), seed=1)) as session:
        session.good = True
        scenario = draw(guard.scenario, 1, 0, read_corpus(default_model()))
        found = session.perform([dataclasses.replace(scenario, unsafe=guard.unsafe)])
        assert getattr(report.total(found), guard.counter or name) > 0


def test_without_its_guard_a_full_disk_keeps_half_files() -> None:
    """The control: what could not be written stays."""
    with Session(Settings(default_model(), seed=1)) as session:
        session.good = True
        assert full_disk.control(session).works


@pytest.mark.skipif(bool(network.why_not()), reason=network.why_not() or "-")
@pytest.mark.parametrize("name", ["hosts-decode-alone", "hosts-decode-lost"])
def test_a_crash_over_hosts_is_replayed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    """From its recording alone: the hosts are those of its set-up."""
    path = draw(name, 3, 0, read_corpus(default_model())).write(tmp_path)
    summary = summary_of(capsys, "replay", str(path))
    assert summary["runs"] == 1
    assert summary["interrupted_streams"] > 0
