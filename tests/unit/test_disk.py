"""The disk tier: blocks come back as they were or not at all, within a bound, whatever the disk does."""

from __future__ import annotations

import asyncio
import errno
import os
import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from services.kv import arena as pages
from services.kv.arena import Arena
from services.kv_store.blockfile import BlockFiles
from services.kv_store.disk import PAUSE_S, DiskIndex, DiskTier
from services.ops.errors import ConfigError
from tests.support import arenas
from tests.support.store_tiers import ByHand

GROUPS = range(arenas.LAYOUT.groups)


def key_of(n: int) -> bytes:
    return bytes([n]) * 16


@dataclass
class Bench:
    """A small arena with sealed blocks, and a directory for them."""

    directory: Path
    arena: Arena = field(init=False)
    now: float = 100.0

    def __post_init__(self) -> None:
        self.arena = arenas.small_arena(self.directory / "arena")

    def tier(self, blocks: int = 4) -> DiskTier:
        room = blocks * BlockFiles(self.path, self.arena).file_bytes
        tier = DiskTier(self.path, self.arena, room, executor=ByHand(), clock=lambda: self.now)
        tier._run = self._now  # type: ignore[assignment,method-assign]
        return tier

    @staticmethod
    async def _now(job):  # type: ignore[no-untyped-def]
        return job()

    @property
    def path(self) -> Path:
        return self.directory / "disk"

    def sealed(self, block: int) -> bytes:
        """Fills and seals a block; gives its key."""
        for group in GROUPS:
            page = self.arena.page_id(block, group)
            arenas.fill_page(self.arena, page, seed=block * 7 + group)
            seeds = np.arange(64, dtype=np.uint32) + np.uint32(block)
            arenas.stamp(self.arena, page, seeds, group)
            self.arena.native.seal(page, group, 64, key_of(block))
        return key_of(block)

    def content(self, block: int) -> list[bytes]:
        """Everything that must come back."""
        ids = [self.arena.page_id(block, group) for group in GROUPS]
        fields = ("key", "tokens", "checksum", "row_crc", "state")
        return [
            *(self.arena.page(i).tobytes() for i in ids),
            *(self.arena.headers[name][ids].tobytes() for name in fields),
        ]

    def files(self) -> list[Path]:
        return sorted(p for p in self.path.iterdir() if p.name != "store.lock")


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def save(tier: DiskTier, key: bytes, block: int) -> bool:
    return asyncio.run(tier.save(key, block))


def load(tier: DiskTier, keys: list[bytes], blocks: list[int]) -> int:
    return asyncio.run(tier.load(keys, blocks))


def test_a_block_comes_back_as_it_was(bench: Bench) -> None:
    """Payload, row checksums and seal of every layer group, bit for bit, into any block."""
    tier, key = bench.tier(), bench.sealed(1)
    before = bench.content(1)
    assert save(tier, key, 1)
    assert load(tier, [key], [3]) == 1
    assert bench.content(3) == before
    assert (tier.counts.hits, tier.counts.written) == (1, 1)


def test_the_index_survives_a_restart(bench: Bench) -> None:
    """Rebuilt from the directory; what was used last is still the last to go."""
    tier = bench.tier()
    keys = [bench.sealed(n) for n in range(3)]
    for n, key in enumerate(keys):
        assert save(tier, key, n)
        os.utime(tier.files.path(key), (n, n))
    load(tier, [keys[0]], [4])
    tier.close()
    again = bench.tier(3)
    assert list(again.index.keys) == [keys[1], keys[2], keys[0]]
    save(again, bench.sealed(3), 3)
    assert [again.holds([key]) for key in keys] == [1, 0, 1]
    assert not again.files.path(keys[1]).exists()


def test_the_directory_is_bounded(bench: Bench) -> None:
    """Whatever is written: never more files than fit, and at a restart no more than now fit."""
    tier = bench.tier(3)
    for n in range(5):
        save(tier, bench.sealed(n), n)
        tier.index.check_invariants()
        assert len(bench.files()) == min(n + 1, 3)
    assert tier.used_bytes == sum(p.stat().st_size for p in bench.files())
    tier.close()
    assert list(bench.tier(2).index.keys) == [key_of(3), key_of(4)]
    assert len(bench.files()) == 2


def test_a_bound_below_one_block_is_refused(bench: Bench) -> None:
    """By the name of the field."""
    with pytest.raises(ConfigError, match=r"^disk_bytes: "):
        DiskTier(bench.path, bench.arena, 1000)


def test_a_directory_has_one_owner(bench: Bench) -> None:
    """Two stores would evict each other's files."""
    tier = bench.tier()
    with pytest.raises(ConfigError, match=r"^disk_dir: another kv-store"):
        bench.tier()
    tier.close()
    bench.tier().close()


def test_any_flipped_byte_is_noticed(bench: Bench) -> None:
    """In head, row checksums, payload or the checksum itself: no block, counted, removed."""
    tier, rng = bench.tier(), random.Random(1)
    key, size = bench.sealed(1), tier.files.file_bytes
    places = [0, 8, 24, 40, 44, 63, 64, 319, size - 4, size - 1]
    for n, at in enumerate([*places, *(rng.randrange(size) for _ in range(190))]):
        assert save(tier, key, 1)
        path = tier.files.path(key)
        raw = bytearray(path.read_bytes())
        raw[at] ^= 1 << rng.randrange(8)
        path.write_bytes(raw)
        assert load(tier, [key], [2]) == 0, f"byte {at}"
        assert tier.counts.corrupt_files == n + 1
        assert not path.exists()
        assert not tier.holds([key])


@pytest.mark.parametrize("bytes_left", [0, 10, 64, 5000, -1])
def test_a_torn_file_is_noticed(bench: Bench, bytes_left: int) -> None:
    """At a restart and, if that happens later, when it is read."""
    tier, key = bench.tier(), bench.sealed(1)
    for restart in (False, True):
        assert save(tier, key, 1)
        path = tier.files.path(key)
        path.write_bytes(path.read_bytes()[:bytes_left])
        if restart:
            tier.close()
            tier = bench.tier()
            assert not tier.holds([key])
        else:
            assert load(tier, [key], [2]) == 0
        assert tier.counts.corrupt_files == 1
        assert bench.files() == []


def test_leftovers_of_a_death_in_mid_write_go(bench: Bench) -> None:
    """A name is given only to what is complete."""
    tier = bench.tier()
    tier.close()
    (bench.path / (key_of(1).hex() + ".new")).write_bytes(b"half")
    (bench.path / "README").write_text("not ours")
    tier = bench.tier()
    assert tier.counts.corrupt_files == 1
    assert [p.name for p in bench.files()] == ["README"]


def test_files_of_another_fingerprint_go(bench: Bench) -> None:
    """Also under the right name; they are never read as KV."""
    tier, key = bench.tier(), bench.sealed(1)
    save(tier, key, 1)
    path = tier.files.path(key)
    raw = bytearray(path.read_bytes())
    raw[8] ^= 255
    path.write_bytes(raw)
    tier.close()
    tier = bench.tier()
    assert not tier.holds([key])
    assert tier.counts.corrupt_files == 1


def test_a_file_under_another_name_is_not_that_block(bench: Bench) -> None:
    """The key inside decides."""
    tier = bench.tier()
    one, two = bench.sealed(1), bench.sealed(2)
    save(tier, one, 1)
    save(tier, two, 2)
    tier.files.path(two).write_bytes(tier.files.path(one).read_bytes())
    assert load(tier, [one, two], [3, 4]) == 1


def test_a_chain_ends_at_the_first_miss(bench: Bench) -> None:
    """What follows a block that cannot be had is of no use, and stays where it is."""
    tier = bench.tier()
    keys = [bench.sealed(n) for n in range(3)]
    for n, key in enumerate(keys):
        save(tier, key, n)
    tier.files.path(keys[1]).unlink()
    assert tier.holds(keys) == 3
    assert load(tier, keys, [3, 4, 5]) == 1
    assert tier.counts.corrupt_files == 0, "a file that somebody removed is not corrupt"
    assert tier.holds(keys) == 1
    assert tier.holds([keys[2]]) == 1


# --- a disk that fails ---


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_left_alone_for_a_while(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing raises; the failure is counted, the pauses grow, and then it is tried again."""
    tier, key = bench.tier(), bench.sealed(1)
    with monkeypatch.context() as patch:
        patch.setattr("services.kv_store.blockfile._crc", full)
        for n, pause_s in enumerate(PAUSE_S):
            assert not save(tier, key, 1)
            assert tier.counts.write_failures == n + 1
            bench.now += pause_s - 0.01
            assert tier.paused
            assert not save(tier, key, 1), "it was tried while it is paused"
            assert tier.counts.write_failures == n + 1
            bench.now += 0.02
        assert bench.files() == [], "a part of a block was left behind"
    assert save(tier, key, 1)
    assert not tier.paused


def test_writes_that_fail_together_pause_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that were under way when the first one failed are counted, and lengthen nothing."""
    tier, keys = bench.tier(), [bench.sealed(n) for n in range(3)]

    async def later(job):  # type: ignore[no-untyped-def]
        await asyncio.sleep(0)
        return job()

    async def together() -> list[bool]:
        return await asyncio.gather(*(tier.save(key, n) for n, key in enumerate(keys)))

    tier._run = later  # type: ignore[assignment,method-assign]
    with monkeypatch.context() as patch:
        patch.setattr("services.kv_store.blockfile._crc", full)
        assert asyncio.run(together()) == [False] * 3
    assert tier.counts.write_failures == 3
    bench.now += PAUSE_S[0]
    assert not tier.paused
    assert asyncio.run(together()) == [True] * 3


def test_a_disk_that_is_really_full(bench: Bench) -> None:
    """The kernel says so in the middle of a file; what was written of it is gone."""
    tier, key = bench.tier(), bench.sealed(1)
    unfinished = tier.files.path(key).with_suffix(".new")
    unfinished.symlink_to("/dev/full")
    assert not save(tier, key, 1)
    assert tier.counts.write_failures == 1
    assert bench.files() == []


def test_a_disk_that_cannot_be_read_is_a_miss(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted, and not taken for corruption: the file may be good tomorrow."""
    tier, key = bench.tier(), bench.sealed(1)
    save(tier, key, 1)

    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", broken)
        assert load(tier, [key], [2]) == 0
    assert (tier.counts.read_failures, tier.counts.corrupt_files) == (1, 0)
    assert load(tier, [key], [2]) == 1


def test_what_was_read_badly_is_not_sealed(bench: Bench) -> None:
    """A block that could not be read whole looks like what it is: nobody's."""
    tier, key = bench.tier(), bench.sealed(1)
    save(tier, key, 1)
    path = tier.files.path(key)
    raw = bytearray(path.read_bytes())
    raw[-100] ^= 4
    path.write_bytes(raw)
    ids = [bench.arena.page_id(2, group) for group in GROUPS]
    bench.arena.headers["state"][ids] = pages.OPEN
    load(tier, [key], [2])
    assert (bench.arena.headers["state"][ids] == pages.OPEN).all()


def test_reserving_makes_room_for_what_is_under_way() -> None:
    """Blocks on their way to the disk count, too."""
    index = DiskIndex(2)
    assert index.reserve(b"a") == []
    assert index.reserve(b"b") == []
    index.written(b"a", ok=True)
    assert index.reserve(b"c") == [b"a"]
    index.written(b"b", ok=False)
    index.written(b"c", ok=True)
    assert index.leading([b"c", b"b"]) == 1
    index.check_invariants()
