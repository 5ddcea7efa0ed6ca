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


def hold(arena_dir: Path, worker_id: str) -> int:
    """Takes this process's lock; keep the descriptor open for the process's whole life."""
    fd = os.open(_path(arena_dir, worker_id), os.O_RDWR | os.O_CREAT, 0o660)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return fd


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


def forget(arena_dir: Path, worker_id: str) -> None:
    """Removes the file of a worker that is gone."""
    _path(arena_dir, worker_id).unlink(missing_ok=True)
