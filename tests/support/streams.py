"""The media that a test of the KV stream runs over, and what it may ask of a link."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support.media import Link, Setting

REMOTE = ("memory", "tcp", "ipc", "faulty", "faulty-tcp")
MEDIA = [
    Setting("shm"),
    *(Setting(medium, way) for medium in REMOTE for way in ("push", "pull")),
]  # fmt: skip
REMOTE_SETTINGS = [setting for setting in MEDIA if setting.medium != "shm"]
STEADY = [setting for setting in REMOTE_SETTINGS if "faulty" not in setting.medium]
MEMORY = [Setting("memory", way) for way in ("push", "pull")]

each = pytest.mark.parametrize("setting", MEDIA, ids=str)
each_remote = pytest.mark.parametrize("setting", REMOTE_SETTINGS, ids=str)
each_steady = pytest.mark.parametrize("setting", STEADY, ids=str)
in_memory = pytest.mark.parametrize("setting", MEMORY, ids=str)

BuildLink = Callable[..., Link]


def damaged(world: Link) -> int:
    return world.stores[-1].receiver.landing.damaged


def repeated(world: Link) -> int:
    return world.stores[-1].receiver.landing.repeated


def at_rest(world: Link) -> bool:
    """Nobody holds anything for a transfer any more."""
    assert world.client is not None
    stores = [store.client.idle and not store.receiver.pulls.open for store in world.stores]
    return world.client.idle and all(stores)
