"""One round of corruption in the tier on disk: prompts are written back, the arena forgets them, bytes
of their files are changed, and they are asked for again, each time one block longer.

So every hit needs exactly one block that is not in the arena: a whole file saves its 64 tokens, a
flipped one is noticed and costs them. The block that prefill computes instead is written back in its
place, and must be, byte for byte, the file that was there.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from baton.chaos.asks import PAGE_TOKENS
from baton.chaos.corrupt import Round, until
from baton.chaos.damage import Damage
from baton.chaos.flip import cached, flip_file
from baton.chaos.judge import Verdict
from baton.chaos.lab import of_stores, rest
from baton.chaos.scenario import Ask
from baton.chaos.streams import Stream
from baton.v1 import cluster_pb2
from services.kv.identity import block_keys, root_key

STREAMS, BLOCKS = 6, 5  # prompts, and complete blocks of each
NEW_TOKENS = 4
FLIPPED_SHARE = 0.6
FLOOD_TOKENS = 1000  # of each request that makes the arena forget others
FLOODS_MAX = 40


class DiskRound(Round):
    """One round in progress, on a cluster with `disk_dir` whose arena is soon full."""

    _files: dict[Path, bytes]  # those that were flipped, and what they held before

    async def _strike_all(self) -> None:
        self._files, self._tails = {}, 0
        asks = [self._ask(PAGE_TOKENS * BLOCKS + 1, NEW_TOKENS) for _ in range(STREAMS)]
        await self._follow_all(self._open(asks))
        paths = [self._paths(ask) for ask in asks]
        everything = [path for chain in paths for path in chain]
        await until(lambda: all(path.exists() for path in everything), "files of all blocks")
        await self._forget(asks)
        self._base = await self._view()
        for chain in paths:
            for path in chain:
                if self._rng.random() < FLIPPED_SHARE:
                    self._files[path] = path.read_bytes()
                    self._flips.append(flip_file(path, self._rng))
        for blocks in range(1, BLOCKS + 1):
            await self._ask_for(asks, paths, blocks)
        await until(lambda: all(path.exists() for path in self._files), "good files in their place")

    async def _ask_for(self, asks: Sequence[Ask], paths: list[list[Path]], blocks: int) -> None:
        """The first `blocks` blocks of every prompt and one token more, which prefill has to compute."""
        tokens = PAGE_TOKENS * blocks + 1
        short = [dataclasses.replace(ask, token_ids=ask.token_ids[:tokens]) for ask in asks]
        streams = self._open(short)
        for stream, chain in zip(streams, paths, strict=True):
            if chain[blocks - 1] in self._files:
                self._struck[stream.request_id] = time.monotonic()
        self._tails += len(streams)
        await self._follow_all(streams)
        _, trouble = await rest(self._lab, self._connection)
        if trouble:
            raise TimeoutError(trouble)

    async def _follow_all(self, streams: Sequence[Stream]) -> None:
        """To their ends; they are judged with all others."""
        self.streams += streams
        await asyncio.gather(*self._start(streams))

    def _paths(self, ask: Ask) -> list[Path]:
        """Where decode's store keeps the prompt's blocks."""
        plan = self._arena(self._lab.spec.stores - 1).plan
        keys = block_keys(root_key(plan.fingerprint, self._tenant), ask.token_ids)
        directory = Path(self._lab.spec.disk_dir) / self._lab.process_of("kv-store")
        return [directory / f"{key.hex()}.kv" for key in keys]

    async def _forget(self, asks: Sequence[Ask]) -> None:
        """Other prompts, until no arena holds a block of these. Raises TimeoutError."""
        arenas = [self._arena(store) for store in range(self._lab.spec.stores)]
        for _ in range(FLOODS_MAX):
            if not any(cached(a, self._tenant, ask.token_ids) for a in arenas for ask in asks):
                return
            other = Stream(self._ask(FLOOD_TOKENS, 1), f"flood-{uuid.uuid4().hex}")
            await self._follow_all([other])
        raise TimeoutError("the arena does not forget")

    async def _view(self) -> cluster_pb2.ClusterView:
        view = await self._connection.view()
        if view is None:
            raise TimeoutError("no view")
        return view

    def _damage(
        self, before: cluster_pb2.ClusterView, after: cluster_pb2.ClusterView, verdict: Verdict,
        trouble: str,
    ) -> Damage:  # fmt: skip
        """What the stores have noticed, and what prefill has computed beyond each prompt's end."""
        plain = super()._damage(before, after, verdict, trouble)
        if trouble:
            return plain
        base, now = self._base, after
        noticed = of_stores(now, "disk_corrupt_files", base)
        computed = now.requests.prompt_tokens_computed - base.requests.prompt_tokens_computed
        bad = sum(path.read_bytes() != whole for path, whole in self._files.items())
        return dataclasses.replace(
            plain, corrupt_blocks=noticed, blocks_repaired=len(self._files) - bad,
            tokens_repaired=computed - self._tails, repair_mismatches=bad,
            kept_elsewhere=self._lab.spec.stores > 1,
        )  # fmt: skip
