"""Directories for what is nobody else's business: KV pages, prompts in the journal, sockets, logs."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from pathlib import Path

from services.ops.errors import ConfigError

UMASK = 0o007  # of every process: what it makes is for its owner and its group


def private_directory(path: Path, field: str) -> None:
    """Makes a directory that only its owner and its group can enter, or takes one that is there.

    Raises ConfigError, naming `field`, when somebody else owns it or everybody may write into it:
    names in /tmp and /dev/shm can be guessed, and whoever makes a directory first could put his own
    files into it, or take ours out.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o777 & ~UMASK)
    if not path.is_dir():
        raise ConfigError(f"{field}: {path} is not a directory")
    for found in (path.lstat(), path.stat()):  # a link of somebody else's is no better
        if found.st_uid not in (0, os.geteuid()):
            raise ConfigError(f"{field}: {path} belongs to another user, number {found.st_uid}")
    if found.st_mode & stat.S_IWOTH:
        mode = stat.S_IMODE(found.st_mode)
        raise ConfigError(f"{field}: mode {mode:04o} lets everybody write into {path}")


def own_directory(path: Path, field: str) -> int:
    """Makes the directory, or takes one that is there, and holds its lock for as long as the
    descriptor is open. Raises ConfigError, naming `field`, when another store has it or it cannot be
    used."""
    try:
        private_directory(path, field)
        fd = os.open(path / "store.lock", os.O_RDWR | os.O_CREAT, 0o660)
    except OSError as error:
        raise ConfigError(f"{field}: {path}: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise ConfigError(f"{field}: another kv-store owns {path}") from None
    return fd
