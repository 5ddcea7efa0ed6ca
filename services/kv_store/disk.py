"""The tier below the arena: blocks as files in one directory, bounded in size, least recently used
first out. All I/O runs on threads of its own; the books are kept on the event loop.

A disk that fails never fails a request: what cannot be read is a miss, and after a failed write the
tier writes nothing for a while. Knows nothing of streams, leases or the prefix index.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from services.kv.arena import Arena
from services.kv_store.blockfile import SUFFIX, UNFINISHED, BadFile, BlockFiles
from services.ops import log
from services.ops.errors import ConfigError
from services.ops.private import own_directory

R = TypeVar("R")
_logger = log.get("disk")
PAUSE_S = (1.0, 5.0, 30.0, 60.0)  # without writing, after so many failures in a row
READS_MAX = 2  # loads at a time; others wait their turn
THREADS = READS_MAX + 1  # one more for the writer


@dataclass
class DiskIndex:
    """Which keys are on disk, oldest use first, and which are on their way there. Pure."""

    blocks_max: int
    keys: OrderedDict[bytes, None] = field(default_factory=OrderedDict)
    writing: set[bytes] = field(default_factory=set)

    def leading(self, chain: Sequence[bytes]) -> int:
        """How many of the leading keys of this chain are there."""
        return next((n for n, key in enumerate(chain) if key not in self.keys), len(chain))

    def touch(self, keys: Sequence[bytes]) -> None:
        """These keys of one chain have been used: its end becomes older than its beginning."""
        for key in reversed(keys):
            if key in self.keys:
                self.keys.move_to_end(key)

    def reserve(self, key: bytes) -> list[bytes]:
        """Makes room for a block that is about to be written; gives the keys that have to go."""
        assert key not in self.keys, "it is there already"
        assert key not in self.writing, "it is being written already"
        assert len(self.writing) < self.blocks_max, "the caller writes fewer at a time"
        self.writing.add(key)
        over = len(self.keys) + len(self.writing) - self.blocks_max
        return [self.keys.popitem(last=False)[0] for _ in range(min(over, len(self.keys)))]

    def written(self, key: bytes, *, ok: bool) -> None:
        self.writing.remove(key)
        if ok:
            self.keys[key] = None

    def remove(self, key: bytes) -> None:
        self.keys.pop(key, None)

    def check_invariants(self) -> None:
        assert not self.writing & set(self.keys), "a block that is there is being written"
        assert len(self.keys) + len(self.writing) <= self.blocks_max, "more than fit"


@dataclass
class DiskCounts:
    """What the tier has done and met; for `baton status`."""

    hits: int = 0  # blocks read back into the arena
    written: int = 0
    corrupt_files: int = 0  # torn, truncated, flipped or foreign: removed
    write_failures: int = 0
    read_failures: int = 0


class DiskTier:
    """The files and their index. A `PrefixSource`: see `prefetch.py`."""

    def __init__(
        self, directory: Path, arena: Arena, disk_bytes: int, *, executor: Executor | None = None,
        clock: Callable[[], float] = time.monotonic, keep_halves: bool = False,
    ) -> None:  # fmt: skip
        """Takes up what lies in `directory`. Raises ConfigError when it cannot be used."""
        self.files = BlockFiles(directory, arena, keep_halves)
        blocks_max = disk_bytes // self.files.file_bytes
        if blocks_max < 1:
            raise ConfigError(f"disk_bytes: {disk_bytes} is less than one block on disk")
        self.index, self.counts, self._clock = DiskIndex(blocks_max), DiskCounts(), clock
        self._executor = executor or ThreadPoolExecutor(THREADS, "disk")
        self._reads = asyncio.Semaphore(READS_MAX)
        self._failures, self._paused_until = 0, 0.0
        self._lock = own_directory(directory, "disk_dir")
        self._take_up(directory)

    def _take_up(self, directory: Path) -> None:
        """The index of the files that are there, in the order of their last use; others go."""
        found: list[tuple[float, bytes]] = []
        for path in directory.iterdir():
            if path.suffix not in (SUFFIX, UNFINISHED):
                continue
            try:
                found.append((path.stat().st_mtime, self.files.look(path)))
            except BadFile as error:
                _logger.warning("file removed", reason=str(error))
                self.counts.corrupt_files += 1
                _remove(path)
            except OSError as error:
                _logger.warning("file cannot be read", path=str(path), reason=error.strerror)
                self.counts.read_failures += 1
        for _, key in sorted(found):
            self.index.keys[key] = None
        while len(self.index.keys) > self.index.blocks_max:
            _remove(self.files.path(self.index.keys.popitem(last=False)[0]))
        if found:
            _logger.info("disk tier taken up", blocks=len(self.index.keys))

    @property
    def used_bytes(self) -> int:
        return len(self.index.keys) * self.files.file_bytes

    @property
    def paused(self) -> bool:
        """Whether writing rests after a failure."""
        return self._clock() < self._paused_until

    def report(self) -> dict[str, Any]:
        """Fields of StorePages."""
        counts = self.counts
        return {
            "disk_blocks": len(self.index.keys), "disk_bytes": self.used_bytes,
            "disk_hits": counts.hits, "disk_corrupt_files": counts.corrupt_files,
            "disk_write_failures": counts.write_failures,
            "disk_read_failures": counts.read_failures, "disk_paused": self.paused,
        }  # fmt: skip

    def _run(self, job: Callable[[], R]) -> asyncio.Future[R]:
        return asyncio.get_running_loop().run_in_executor(self._executor, job)

    # --- reading ---

    def holds(self, keys: Sequence[bytes]) -> int:
        """How many of the leading keys are on disk; the files may still turn out to be bad."""
        return self.index.leading(keys)

    async def load(self, keys: Sequence[bytes], blocks: Sequence[int]) -> int:
        """Reads the blocks of the leading keys into these arena blocks, verified and sealed; gives how
        many. The blocks are the caller's, and nobody else's, until it returns."""
        wanted = list(zip(keys, blocks, strict=False))[: self.holds(keys)]
        async with self._reads:
            done, bad = await self._run(lambda: self._read_all(wanted))
        self.counts.hits += done
        self.index.touch(keys[:done])
        if isinstance(bad, BadFile):
            self.counts.corrupt_files += 1
            self.index.remove(keys[done])
            _logger.warning("corrupt file removed", reason=str(bad))
        elif isinstance(bad, FileNotFoundError):
            self.index.remove(keys[done])  # evicted meanwhile, or removed by somebody
        elif bad is not None:
            self.counts.read_failures += 1
            _logger.warning("disk read failed", reason=str(bad))
        return done

    def _read_all(self, wanted: list[tuple[bytes, int]]) -> tuple[int, Exception | None]:
        """On a thread. Ends at the first block that cannot be had; gives how many it has read."""
        done = 0
        failed: BadFile | OSError | None = None
        for key, block in wanted:
            try:
                self.files.read(key, block)
            except (BadFile, OSError) as error:
                failed = error
                break
            done += 1
        if isinstance(failed, BadFile):
            _remove(self.files.path(wanted[done][0]))
        for key, _ in reversed(wanted[:done]):  # a prefix's end is older than its beginning
            with contextlib.suppress(OSError):
                os.utime(self.files.path(key))
        return done, failed

    # --- writing ---

    async def save(self, key: bytes, block: int) -> bool:
        """Stores a sealed block; the caller sees to it that nobody changes it meanwhile. False when
        the disk does not take it."""
        if self.paused:
            return False
        gone = [self.files.path(old) for old in self.index.reserve(key)]
        try:
            await self._run(lambda: self._write(key, block, gone))
        except OSError as error:
            self.index.written(key, ok=False)
            self._write_failed(error)
            return False
        self.index.written(key, ok=True)
        self.counts.written += 1
        self._failures = 0
        return True

    def _write(self, key: bytes, block: int, gone: list[Path]) -> None:
        """On a thread."""
        for path in gone:
            _remove(path)
        self.files.write(key, block)

    def _write_failed(self, error: OSError) -> None:
        self.counts.write_failures += 1
        if self.paused:  # it was under way when another one failed: the disk has been asked once
            return
        pause_s = PAUSE_S[min(self._failures, len(PAUSE_S) - 1)]
        self._failures += 1
        self._paused_until = self._clock() + pause_s
        _logger.warning("disk write failed: paused", reason=str(error), pause_s=pause_s)

    def close(self) -> None:
        """Lets go of the directory; what is being read or written is left to its thread."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        _logger.warning("file cannot be removed", path=str(path), reason=error.strerror)
