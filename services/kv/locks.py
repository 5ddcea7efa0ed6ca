"""A worker's life as a file lock: held while the process lives, even when it is stopped, and free the
moment the kernel has buried it. The only proof of death that a paused writer cannot fake."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


def _path(arena_dir: Path, worker_id: str) -> Path:
    assert worker_id
    assert "/" not in worker_id
    return arena_dir / "locks" / worker_id


def prepare(arena_dir: Path) -> None:
    """Makes the place of the lock files."""
    (arena_dir / "locks").mkdir(exist_ok=True)


def hold(arena_dir: Path, worker_id: str) -> int:
    """Takes this process's lock; keep the descriptor open for the process's whole life."""
    path = _path(arena_dir, worker_id)
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o660)
        fcntl.flock(fd, fcntl.LOCK_EX)
        if path.exists() and os.fstat(fd).st_ino == path.stat().st_ino:
            return fd
        os.close(fd)  # a cleaner took the new file for a dead worker's before it was locked


def is_held(arena_dir: Path, worker_id: str) -> bool:
    """Whether that worker's process still exists; a lock never taken counts as free."""
    try:
        fd = os.open(_path(arena_dir, worker_id), os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def all_held(arena_dir: Path) -> set[str]:
    """Every worker whose process exists now."""
    names = {path.name for path in (arena_dir / "locks").iterdir()}
    return {name for name in names if is_held(arena_dir, name)}


def forget_dead(arena_dir: Path) -> int:
    """Removes the files of workers that are gone; gives their number."""
    removed = 0
    for path in (arena_dir / "locks").iterdir():
        fd = os.open(path, os.O_RDWR)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
            removed += 1
        except BlockingIOError:
            continue
        finally:
            os.close(fd)
    return removed
