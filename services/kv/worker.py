"""A worker's hold on its host's arena: the mapping, the life lock, and checks that all fits."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from services.engine.identity import ModelIdentity, identify
from services.kv import locks
from services.kv.arena import Arena
from services.ops.errors import Unavailable

_RETRY_S = 0.02


@dataclass(frozen=True)
class ArenaHold:
    """What a worker gets when it joins: keep it for the life of the process."""

    worker_id: str
    arena: Arena
    identity: ModelIdentity
    lock: int


def join(
    arena_dir: str, model: str, prefill_device: str, decode_device: str, wait_s: float = 30.0
) -> ArenaHold:
    """Waits for the arena, maps it and takes the life lock.

    Raises Unavailable when no arena appears, LayoutMismatch when it is another model's.
    """
    directory = Path(arena_dir)
    deadline = time.monotonic() + wait_s
    while True:
        try:
            arena = Arena(directory)
            break
        except Unavailable:
            if time.monotonic() > deadline:
                raise
            time.sleep(_RETRY_S)
    layout = arena.layout
    identity = identify(
        model, kv_dtype=layout.kv_dtype, layers_per_group=layout.layers_per_group,
        prefill_device=prefill_device, decode_device=decode_device,
    )  # fmt: skip
    arena.require(identity.layout, identity.fingerprint)
    worker_id = uuid.uuid4().hex
    return ArenaHold(worker_id, arena, identity, locks.hold(directory, worker_id))
