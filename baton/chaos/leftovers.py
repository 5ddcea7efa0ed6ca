"""The directory that one `baton chaos` works in, and what others that were killed have left behind:
disks they had mounted, arenas, network namespaces, and their directories. What nobody has locked is
nobody's: the kernel lets go of a lock with the process that held it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from baton.chaos import network
from baton.cluster import ClusterSpec
from baton.handle import read_state
from services.kv import locks

PREFIX = "bc-"
LOCK = "owner.lock"
PARENT = Path("/tmp")  # not TMPDIR: the sockets' paths have to be short
STORES_MAX = 2  # of one supervisor


class Root:
    """A directory of one's own, until `close()`."""

    def __init__(self, parent: Path = PARENT) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        new = self.path / "new.lock"
        self._fd = os.open(new, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        new.rename(self.path / LOCK)  # nobody sees it unlocked while it is ours

    def close(self, *, keep: bool) -> None:
        """What is kept is for people, and for nobody to remove."""
        (self.path / LOCK).unlink(missing_ok=True)
        os.close(self._fd)
        if not keep:
            shutil.rmtree(self.path, ignore_errors=True)


def remove(parent: Path = PARENT) -> list[Path]:
    """Removes what is nobody's, of this user; gives the directories. What a supervisor is still
    clearing up itself is left to it."""
    network.remove_leftovers()
    gone = []
    for lock in parent.glob(f"{PREFIX}*/{LOCK}"):
        with contextlib.suppress(OSError), lock.open("r+b") as file:
            if os.fstat(file.fileno()).st_uid != os.getuid():
                continue
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _clear(lock.parent):
                gone.append(lock.parent)
    return gone


def _clear(root: Path) -> bool:
    """Whether all of it is gone."""
    run_dirs = [path for path in (*root.glob("*"), *root.glob("*/*")) if path.is_dir()]
    if any(read_state(path) is not None for path in run_dirs):
        return False
    arenas = [arena for path in run_dirs for arena in _arenas(path)]
    if any(locks.all_held(arena) for arena in arenas if (arena / "locks").is_dir()):
        return False
    for arena in arenas:
        shutil.rmtree(arena, ignore_errors=True)
    for mounted in mounts(root):
        subprocess.run(["umount", str(mounted)], check=False, stderr=subprocess.DEVNULL)
    if mounts(root):
        return False  # somebody still works there
    shutil.rmtree(root, ignore_errors=True)
    return True


def _arenas(run_dir: Path) -> Iterator[Path]:
    """Of the cluster, or host, that worked in this directory."""
    spec = ClusterSpec(run_dir=str(run_dir))
    for store in range(STORES_MAX):
        if (arena := Path(spec.arena_dir(store))).is_dir():
            yield arena


def mounts(root: Path) -> list[Path]:
    """What is mounted below a directory."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    points = [Path(line.split(" ")[4]) for line in lines]
    return [point for point in points if point.is_relative_to(root)]
