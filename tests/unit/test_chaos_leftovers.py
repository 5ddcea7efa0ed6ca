"""What a killed `baton chaos` has left behind is removed by the next one, and nothing else is."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from baton.chaos import leftovers
from baton.chaos.leftovers import LOCK, Root
from baton.cluster import ClusterSpec
from baton.handle import STATE_FILE, start_time
from services.kv import locks


@pytest.fixture
def parent() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="bt-", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture
def killed(parent: Path) -> Iterator[tuple[Path, Path]]:
    """A directory whose owner is gone, with a host's arena; and that arena."""
    root = Root(parent)
    run_dir = root.path / "1" / "a"
    run_dir.mkdir(parents=True)
    arena = Path(ClusterSpec(run_dir=str(run_dir)).arena_dir(0))
    (arena / "locks").mkdir(parents=True)
    (arena / "pages").write_bytes(bytes(100))
    os.close(root._fd)
    yield root.path, arena
    if arena.exists():
        for path in sorted(arena.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        arena.rmdir()


def test_what_is_nobody_s_goes(parent: Path, killed: tuple[Path, Path]) -> None:
    """The directory and its arenas in shared memory."""
    root, arena = killed
    assert leftovers.remove(parent) == [root]
    assert not root.exists()
    assert not arena.exists()


def test_what_has_an_owner_stays(parent: Path) -> None:
    """As long as that process lives."""
    root = Root(parent)
    assert leftovers.remove(parent) == []
    assert root.path.exists()
    root.close(keep=False)
    assert not root.path.exists()


def test_what_was_kept_for_people_stays(parent: Path) -> None:
    """Logs and recordings of a run that failed."""
    root = Root(parent)
    root.close(keep=True)
    assert leftovers.remove(parent) == []
    assert root.path.exists()


def test_other_directories_stay(parent: Path) -> None:
    """Only what was made by this command."""
    (parent / "bc-mine").mkdir()
    (parent / "other").mkdir()
    (parent / "other" / LOCK).touch()
    assert leftovers.remove(parent) == []
    assert sorted(path.name for path in parent.iterdir()) == ["bc-mine", "other"]


def test_a_supervisor_that_still_lives_clears_up_itself(
    parent: Path, killed: tuple[Path, Path]
) -> None:
    """It notices its owner's death a moment later."""
    state = {"pid": os.getpid(), "start_time": start_time(os.getpid()), "processes": []}
    (killed[0] / "1" / "a" / STATE_FILE).write_text(json.dumps(state))
    assert leftovers.remove(parent) == []
    assert killed[1].exists()


def test_an_arena_that_somebody_has_mapped_stays(parent: Path, killed: tuple[Path, Path]) -> None:
    """Its worker's lock says so."""
    lock = locks.hold(killed[1], "decode-0")
    assert leftovers.remove(parent) == []
    os.close(lock)
    assert leftovers.remove(parent) == [killed[0]]
