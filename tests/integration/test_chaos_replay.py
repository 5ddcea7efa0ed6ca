"""Recorded crashes on real processes. `baton chaos` draws new ones; `tests/chaos/` keeps these."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from baton import chaos
from baton.chaos.asks import read_corpus
from baton.chaos.plan import draw
from baton.chaos.report import total
from baton.chaos.scenario import Scenario
from baton.chaos.session import Session, Settings
from baton.cluster import default_model

pytestmark = pytest.mark.processes

RECORDINGS = Path(__file__).parent.parent / "chaos"
REPLAYED = (
    "random",
    "committed-not-reported",
    "row-63",
    "takeover",
    "decode+scheduler",
    "zombie-last-token",
)


def recording(name: str) -> Path:
    (path,) = RECORDINGS.glob(f"{name}-*-0.json")
    return path


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with Session(Settings(default_model(), seed=1)) as session:
        session.good = True
        yield session


def test_recorded_crashes_are_invisible(capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever dies, clients see the undisturbed run's tokens once each, no prompt token is
    computed twice, and no page is held afterwards."""
    files = [str(recording(name)) for name in REPLAYED]
    status = chaos.main(["replay", *files, "--json"])
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["problems"] == []
    assert status == 0
    assert summary["runs"] == len(REPLAYED)
    assert summary["interrupted_streams"] >= len(REPLAYED)


def test_a_woken_decode_is_refused(session: Session) -> None:
    """A decode that was paused, replaced and woken spoils nothing, and its pages come back."""
    (result,) = session.perform([draw("zombie", 3, 0, read_corpus(default_model()))])
    assert result.good, result.why()
    assert result.stale_refused > 0
    assert result.quarantined > 0


def test_without_the_record_tokens_are_lost(session: Session) -> None:
    """The control: a successor that trusts the dead one's reports instead of the stream's record
    loses what was committed and not reported, and the judge sees it."""
    scenario = Scenario.read(recording("committed-not-reported"))
    results = session.perform([dataclasses.replace(scenario, unsafe=("record",))])
    assert total(results).lost > 0
