"""A life as a file lock: held by the paused, free as soon as the kernel has buried the dead."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from services.kv import locks

WORKER = "ab" * 16
HOLD = """
import sys
from pathlib import Path
from services.kv import locks
held = locks.hold(Path(sys.argv[1]), sys.argv[2])
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def arena_dir(tmp_path: Path) -> Path:
    (tmp_path / "locks").mkdir()
    return tmp_path


@contextmanager
def holder(arena_dir: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the worker's lock and does nothing."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(arena_dir), WORKER],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_lock_never_taken_is_free(arena_dir: Path) -> None:
    """Nobody can be alive who has never been here; asking leaves nothing behind."""
    assert not locks.is_held(arena_dir, WORKER)
    assert list((arena_dir / "locks").iterdir()) == []


def test_a_lock_is_held_until_its_descriptor_is_closed(arena_dir: Path) -> None:
    """Asking does not take it away, and does not disturb its holder."""
    fd = locks.hold(arena_dir, WORKER)
    assert locks.is_held(arena_dir, WORKER)
    assert locks.is_held(arena_dir, WORKER)
    assert not locks.is_held(arena_dir, "cd" * 16)
    os.close(fd)
    assert not locks.is_held(arena_dir, WORKER)


def test_a_lock_whose_file_was_cleaned_away_is_taken_again(
    arena_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cleaner took the new file for a dead worker's before it was locked: a lock on a file that
    nobody can find would make a living worker look dead."""
    lock = fcntl.flock
    calls: list[int] = []

    def cleaner_first(fd: int, operation: int) -> None:
        if not calls:
            (arena_dir / "locks" / WORKER).unlink()
        calls.append(operation)
        lock(fd, operation)

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", cleaner_first)
        fd = locks.hold(arena_dir, WORKER)
    assert len(calls) == 2
    assert locks.is_held(arena_dir, WORKER)
    os.close(fd)


def test_a_paused_process_is_alive_and_a_killed_one_is_not(arena_dir: Path) -> None:
    """SIGSTOP does not free the lock; SIGKILL does, once the process has been buried."""
    with holder(arena_dir) as process:
        assert locks.is_held(arena_dir, WORKER)
        process.send_signal(signal.SIGSTOP)
        assert locks.is_held(arena_dir, WORKER)
        process.kill()
        process.wait()
        assert not locks.is_held(arena_dir, WORKER)


def test_only_the_dead_are_forgotten(arena_dir: Path) -> None:
    """Their files go and are counted; the living stay alive."""
    os.close(locks.hold(arena_dir, WORKER))
    living = locks.hold(arena_dir, "cd" * 16)
    assert locks.forget_dead(arena_dir) == 1
    assert locks.forget_dead(arena_dir) == 0
    assert not locks.is_held(arena_dir, WORKER)
    assert locks.is_held(arena_dir, "cd" * 16)
    os.close(living)


def test_an_id_is_a_plain_name(arena_dir: Path) -> None:
    """Nothing that leads out of the directory."""
    for name in ("", "../x", "a/b"):
        with pytest.raises(AssertionError):
            locks.is_held(arena_dir, name)
