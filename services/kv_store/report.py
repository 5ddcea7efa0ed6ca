"""What a store tells whoever looks: its pages by state, and what it has met. Decides nothing."""

from __future__ import annotations

import os

from baton.v1 import cluster_pb2
from services.kv_store.runtime import KvStore


def pages(store: KvStore, address: str) -> cluster_pb2.StorePages:
    """Every page is counted once: free, open, sealed, cached or in quarantine."""
    state, pool, groups = store.state, store.state.pool, store.arena.layout.groups
    held = {b for s in state.streams.values() for b in s.blocks()} | state.filling
    return cluster_pb2.StorePages(
        store_id=store.store_id, address=address, pid=os.getpid(),
        page_bytes=store.arena.layout.page_bytes, pages_total=pool.total * groups,
        pages_free=len(pool.free) * groups, pages_open=len(pool.writers) * groups,
        pages_sealed=len(held - set(pool.writers)) * groups,
        pages_cached=len(set(pool.leases) - held) * groups,
        pages_quarantined=len(pool.quarantined) * groups,
        streams=len(state.streams), reachable=True,
        corrupt_cached=store.counts.corrupt_cached,
        headers_repaired=store.counts.headers_repaired,
        leases_expired=store.counts.leases_expired,
        corrupt_messages=store.corrupt_messages(),
        pages_pinned=sum(key in state.index.blocks for key in state.pins) * groups,
        pins=_pins(store),
        **(store.disk.report() if store.disk else {}),
    )  # fmt: skip


def _pins(store: KvStore) -> list[cluster_pb2.PinnedPrefix]:
    cached = store.state.index.blocks
    return [
        cluster_pb2.PinnedPrefix(
            name=name, blocks=len(keys), cached_blocks=sum(key in cached for key in keys)
        )
        for name, keys in store.state.pins.names.items()
    ]
