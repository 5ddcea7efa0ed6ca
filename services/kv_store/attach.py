"""How a store comes by its arena: it goes on with the one that lies in its directory, or makes a new
one when that is of another shape, model or version."""

from __future__ import annotations

import uuid
from pathlib import Path

from services.engine.identity import ModelIdentity
from services.kv.arena import Arena, create_arena, plan_arena
from services.kv.record import record_dtype
from services.kv_store.config import KvStoreConfig
from services.kv_store.index import PrefixIndex
from services.kv_store.pool import BlockPool
from services.kv_store.recover import rebuild
from services.kv_store.state import KvState
from services.ops import log
from services.ops.errors import LayoutMismatch

_logger = log.get("kv_store")


def attach_or_create(
    directory: Path, config: KvStoreConfig, identity: ModelIdentity
) -> tuple[Arena, KvState]:
    """The arena, and the state that its headers and records describe."""
    layout, max_context = identity.layout, identity.config.max_context
    plan = plan_arena(
        layout, arena_bytes=config.arena_bytes, streams=config.streams_max,
        record_bytes=record_dtype(layout, max_context).itemsize, max_context=max_context,
        fingerprint=identity.fingerprint, store_id=uuid.uuid4().hex, one_class=identity.one_class,
    )  # fmt: skip
    present = _present(directory)
    if present:
        same = (present.plan.layout, present.plan.fingerprint, present.plan.blocks)
        if same == (plan.layout, plan.fingerprint, plan.blocks):
            state = rebuild(present)
            _logger.info(
                "arena rebuilt", streams=len(state.streams), cached=len(state.index),
                quarantined=len(state.pool.quarantined), torn=len(state.torn),
            )  # fmt: skip
            return present, state
        _logger.warning("arena of another model replaced", fingerprint=present.plan.fingerprint)
    arena = create_arena(directory, plan)
    return arena, KvState(BlockPool(plan.blocks), PrefixIndex(), plan.streams)


def _present(directory: Path) -> Arena | None:
    """The arena that is there, if this version can read it."""
    try:
        return Arena(directory) if (directory / "arena").exists() else None
    except LayoutMismatch as error:
        _logger.warning("arena of another version replaced", reason=error.message)
        return None
