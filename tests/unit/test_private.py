"""Directories of our own: made closed, and refused when they are somebody else's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from services.ops.errors import ConfigError
from services.ops.private import own_directory, private_directory


def test_it_is_made_closed(tmp_path: Path) -> None:
    """Whatever the umask is; what lies above it is made too."""
    before = os.umask(0)
    try:
        private_directory(tmp_path / "a" / "b", "run_dir")
    finally:
        os.umask(before)
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o770


def test_one_that_is_there_is_taken(tmp_path: Path) -> None:
    """With its mode, also when everybody may look at it: what is in it is closed by itself."""
    tmp_path.chmod(0o755)
    private_directory(tmp_path, "run_dir")
    assert tmp_path.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o703])
def test_one_that_everybody_may_write_is_refused(tmp_path: Path, mode: int) -> None:
    """As /tmp and /dev/shm themselves are."""
    tmp_path.chmod(mode)
    with pytest.raises(ConfigError, match=rf"^arena_dir: mode {mode:04o} lets everybody"):
        private_directory(tmp_path, "arena_dir")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("link", [False, True])
def test_one_of_another_user_is_refused(tmp_path: Path, link: bool) -> None:
    """Made before ours could be, at a name that can be guessed; a link to a directory of ours is no
    better."""
    path = tmp_path / "guessed"
    if link:
        path.symlink_to(tmp_path)
    else:
        path.mkdir()
    os.chown(path, 12345, 12345, follow_symlinks=False)
    with pytest.raises(ConfigError, match=r"^run_dir: .* belongs to another user, number 12345"):
        private_directory(path, "run_dir")


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    """Said so, instead of failing at the first file in it."""
    (tmp_path / "f").touch()
    with pytest.raises(ConfigError, match=r"^journal_dir: .* is not a directory"):
        private_directory(tmp_path / "f", "journal_dir")


def test_a_directory_has_one_owner(tmp_path: Path) -> None:
    """Until its descriptor is closed; the second one is told by which field it came there."""
    first = own_directory(tmp_path / "a", "disk_dir")
    with pytest.raises(ConfigError, match=r"^cold_dir: another kv-store owns .*a$"):
        own_directory(tmp_path / "a", "cold_dir")
    os.close(first)
    os.close(own_directory(tmp_path / "a", "disk_dir"))


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    """By the field, as everything that a configuration has wrong."""
    (tmp_path / "f").touch()
    with pytest.raises(ConfigError, match=r"^arena_dir: .*f/a: "):
        own_directory(tmp_path / "f" / "a", "arena_dir")
