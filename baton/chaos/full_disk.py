"""The row `disk-full`: the tier's disk has no room left while prefixes are being written back, and has
some again later.

Meanwhile requests run and get the same tokens, and what was on disk before is read back. The failures
are counted, no half a file stays, and once there is room blocks are written again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from baton.chaos import report
from baton.chaos.asks import PAGE_TOKENS, read_corpus
from baton.chaos.corrupt import FILLED_S_MAX, until
from baton.chaos.corrupt_disk import NEW_TOKENS, DiskRound
from baton.chaos.damage import Damage
from baton.chaos.judge import Verdict
from baton.chaos.lab import POLL_S, Lab, of_stores
from baton.chaos.report import Control, Result
from baton.chaos.session import Session, say
from baton.chaos.setups import SETUPS
from baton.v1 import cluster_pb2
from services.kv_store.blockfile import UNFINISHED

ROW = "disk-full"
UNSAFE = ("halves",)
STREAMS, BLOCKS = 4, 3  # of each kind of prompt
DISK_MIB = 256  # of the tmpfs below the tier
BALLAST_BYTES = 1 << 20  # written at a time, then ever less
FILE_BYTES_MAX = 100 << 10  # less than a block's file, where nothing can be mounted
ROUNDS = 4  # before the tier has come to its bound
LOOKS = 10
WRITING_S_MAX = 65.0  # the longest pause of a tier whose disk has failed, and a little more


class Disk:
    """The disk below the tier: a small tmpfs, which a file of ours fills. Where mounting is not
    permitted, the kv-stores may not write files of a block's size instead."""

    def __init__(self, directory: Path, mounted: bool) -> None:
        self._ballast, self._mounted = directory / "ballast", mounted

    def fill(self, lab: Lab) -> None:
        """From now on no block can be written."""
        if not self._mounted:
            self._limit(lab, FILE_BYTES_MAX)
            return
        size = BALLAST_BYTES
        with self._ballast.open("wb", buffering=0) as file:
            while size >= 1:
                try:
                    file.write(bytes(size))
                except OSError:  # less than that is left
                    size //= 16

    def free(self, lab: Lab) -> None:
        """There is room again."""
        if self._mounted:
            self._ballast.unlink(missing_ok=True)
        else:
            self._limit(lab, resource.RLIM_INFINITY)

    def _limit(self, lab: Lab, file_bytes: int) -> None:
        for entry in lab.handle.state()["processes"]:
            if entry["role"] == "kv-store":
                _, hard = resource.prlimit(entry["pid"], resource.RLIMIT_FSIZE)
                resource.prlimit(entry["pid"], resource.RLIMIT_FSIZE, (file_bytes, hard))


@contextlib.contextmanager
def small_disk(directory: Path) -> Iterator[Disk]:
    """`directory` on a disk of its own, for as long as the context lasts."""
    directory.mkdir(parents=True, mode=0o700)
    options = f"size={DISK_MIB}m,mode=0700"
    mount = ["mount", "-t", "tmpfs", "-o", options, "baton-chaos", str(directory)]
    mounted = os.geteuid() == 0 and not subprocess.run(mount, check=False).returncode
    try:
        yield Disk(directory, mounted)
    finally:
        if mounted:
            subprocess.run(["umount", str(directory)], check=True)


class FullDiskRound(DiskRound):
    """One round in progress."""

    disk: Disk
    _halves = 0

    async def _strike_all(self) -> None:
        tokens = PAGE_TOKENS * BLOCKS + 1
        written = [self._ask(tokens, NEW_TOKENS) for _ in range(STREAMS)]
        await self._follow_all(self._open(written))
        paths = [path for ask in written for path in self._paths(ask)]
        await until(lambda: all(path.exists() for path in paths), "files of all blocks")
        await self._forget(written)
        self._base = await self._view()
        late = [self._ask(tokens, self._rng.randint(40, 120)) for _ in range(STREAMS)]
        streams = self._open(late)
        self.streams += streams
        tasks = self._start(streams)
        await until(lambda: all(len(s.seen) > NEW_TOKENS for s in streams), "tokens of all streams")
        self.disk.fill(self._lab)
        self._struck = {stream.request_id: time.monotonic() for stream in streams}
        more = [self._ask(tokens, NEW_TOKENS) for _ in range(STREAMS)]
        await asyncio.gather(*tasks, self._follow_all(self._open(more)))
        await self._until_view(lambda view: self._moved(view, "disk_write_failures") > 0)
        await self._follow_all(self._open([*late, *written]))
        self._full, self._halves = await self._view(), await self._half_files()
        self.disk.free(self._lab)
        after = self._ask(tokens, NEW_TOKENS)
        await self._follow_all(self._open([after]))
        paths = self._paths(after)
        await until(
            lambda: all(p.exists() for p in paths), "files once there is room", WRITING_S_MAX
        )

    async def _half_files(self) -> int:
        """Half-written files that stay on the full disk: one may be in the writing at any moment."""
        counts = []
        for _ in range(LOOKS):
            counts.append(self._unfinished())
            await asyncio.sleep(10 * POLL_S)
        return min(counts)

    def _unfinished(self) -> int:
        return sum(1 for _ in Path(self._lab.spec.disk_dir).rglob(f"*{UNFINISHED}"))

    async def _until_view(self, condition: Callable[[cluster_pb2.ClusterView], bool]) -> None:
        end = time.monotonic() + FILLED_S_MAX
        while not condition(await self._view()):
            if time.monotonic() > end:
                raise TimeoutError(f"no write has failed after {FILLED_S_MAX:g} s")
            await asyncio.sleep(POLL_S)

    def _moved(self, view: cluster_pb2.ClusterView, counter: str) -> int:
        return of_stores(view, counter, self._base)

    def _damage(
        self, before: cluster_pb2.ClusterView, after: cluster_pb2.ClusterView, verdict: Verdict,
        trouble: str,
    ) -> Damage:  # fmt: skip
        verdict += Verdict(leaked_disk_files=self._halves)
        return Damage(
            self.where, self.number, verdict=verdict, streams=len(self.streams),
            stalls_ms=tuple(self._stalls_ms()), trouble=trouble or self._complaint(),
        )  # fmt: skip

    def _complaint(self) -> str:
        """What the tier has not done as it should, or an empty string."""
        if not self._moved(self._full, "disk_hits"):
            return "nothing was read back from a disk that was full"
        return ""


def perform(session: Session, numbers: Iterable[int], unsafe: tuple[str, ...] = ()) -> list[Result]:
    """A few rounds on each cluster: a tier that has come to its bound makes room before it writes, and
    then no disk is full for it."""
    left, found = list(numbers), []
    while left:
        now, left = left[:ROUNDS], left[ROUNDS:]
        found += asyncio.run(_perform(session, now, unsafe))
    return found


def control(session: Session) -> Control:
    """Without its guard a full disk keeps what could not be written."""
    count = report.total(perform(session, range(1), UNSAFE)).leaked_disk_files
    return session.control("leaked_disk_files", UNSAFE, 1, count)


async def _perform(
    session: Session, numbers: Iterable[int], unsafe: tuple[str, ...]
) -> list[Result]:
    seed, corpus = session.settings.seed, read_corpus(session.settings.model)
    spec, found = session.spec("disk", unsafe), []
    with small_disk(Path(spec.disk_dir)) as disk, Lab(spec, SETUPS["disk"]) as lab:
        connection = lab.connect()
        for number in numbers:
            work = FullDiskRound(lab, connection, ROW, seed, number, corpus)
            work.disk = disk
            damage = await work.perform(session.tokens_of)
            disk.free(lab)
            say(f"{damage.label}: {damage.why()}")
            found.append(_result(session, damage))
        await connection.close()
    if not unsafe:
        session.leaked_shm_files += lab.leaked_shm_files
    return found


def _result(session: Session, damage: Damage) -> Result:
    settings = session.settings
    replay = (
        f"baton chaos all --row {ROW} --seeds {damage.number + 1} --no-controls "
        f"--seed {settings.seed} --medium {settings.medium} --model {settings.model}"
    )
    return Result(
        ROW, damage.label, damage.verdict, damage.stalls_ms, damage.streams,
        len(damage.stalls_ms), reached=True, only_a_decode=False,
        trouble="" if damage.good else damage.why(), replay="" if damage.good else replay,
    )  # fmt: skip
