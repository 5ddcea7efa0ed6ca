"""Failpoints: where a test can make a process die, and nobody else can."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from services.ops.failpoints import Failpoints


@pytest.fixture
def signals(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The signals that this process has sent itself, none of which arrives."""
    sent: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append(number))
    return sent


def armed(directory: Path, **spec: Any) -> Failpoints:
    """The failpoints of `decode-0`, one of which is armed like this."""
    (directory / "one.json").write_text(json.dumps({"point": "p", **spec}))
    points = Failpoints(str(directory), "decode-0")
    points.refresh()
    return points


@pytest.mark.parametrize(
    ("spec", "number"),
    [
        ({}, signal.SIGKILL),
        ({"action": "kill"}, signal.SIGKILL),
        ({"action": "stop"}, signal.SIGSTOP),
    ],
)
def test_an_armed_point_fires_once(
    tmp_path: Path, signals: list[int], spec: dict[str, str], number: int
) -> None:
    """Killed or stopped, as armed; the file then says who it was."""
    points = armed(tmp_path, **spec)
    for _ in range(2):
        points.hit("p")
        points.refresh()
    assert signals == [number]
    [fired] = tmp_path.iterdir()
    assert fired.name == f"one.fired-decode-0-{os.getpid()}"


def test_only_the_place_that_is_meant_fires(tmp_path: Path, signals: list[int]) -> None:
    """Point, index and process must fit; what is not given fits everywhere."""
    points = armed(tmp_path, index=3, process="decode-0")
    points.hit("other", 3)
    points.hit("p", 2)
    points.hit("p")
    assert signals == []
    points.hit("p", 3)
    assert signals == [signal.SIGKILL]


def test_another_process_is_not_hit(tmp_path: Path, signals: list[int]) -> None:
    """It is armed for one name."""
    armed(tmp_path, process="decode-1").hit("p")
    assert signals == []


def test_one_of_two_processes_takes_it(tmp_path: Path, signals: list[int]) -> None:
    """Both have read it; whoever renames the file first dies alone."""
    first, second = armed(tmp_path), armed(tmp_path)
    first.hit("p")
    second.hit("p")
    assert signals == [signal.SIGKILL]


def test_what_is_not_looked_for_does_not_fire(tmp_path: Path, signals: list[int]) -> None:
    """Off without a directory; armed only from the next refresh on."""
    (tmp_path / "late.json").write_text('{"point": "p"}')
    for points in (Failpoints("", "decode-0"), Failpoints(str(tmp_path), "decode-0")):
        points.hit("p")
    nothing = Failpoints("", "decode-0")
    nothing.refresh()
    nothing.hit("p")
    assert signals == []


def test_a_file_that_is_being_written_is_left_alone(tmp_path: Path, signals: list[int]) -> None:
    """Half a file is read at the next refresh, when it is whole."""
    path = tmp_path / "one.json"
    path.write_text('{"point": ')
    points = Failpoints(str(tmp_path), "decode-0")
    points.refresh()
    path.write_text('{"point": "p"}')
    points.refresh()
    points.hit("p")
    assert signals == [signal.SIGKILL]
