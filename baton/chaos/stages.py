"""How far each open request has come, read from the stream records in the arena as they change. Nothing
is asked of anyone, so looking disturbs nobody."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from services.kv.arena import Arena
from services.kv.record import ACTIVE, record_dtype

LOOK_S = 0.001
COMMIT, FIRST, ATTACHED = range(3)  # words of a record
STAGES = ("queued", "prefill", "transfer", "first_token", "decoding", "finishing")
NEAR_THE_END = 3  # tokens


def stage_of(
    *, groups_begun: int, groups_done: int, attached: bool, tokens: int, wanted: int
) -> str:
    """The stage of a request. `groups_begun`: layer groups with KV of this prefill, `groups_done`:
    with all of the prompt's; `tokens`: that the client has of the `wanted` ones.

        queued       accepted; nothing has been computed
        prefill      some of its KV is in decode's arena, no layer group is complete
        transfer     layer groups are complete one after another; decode has not begun
        first_token  the client has one token
        decoding     the client has more
        finishing    a few are left
    """
    if tokens and tokens >= wanted - NEAR_THE_END:
        return "finishing"
    if tokens > 1:
        return "decoding"
    if tokens:
        return "first_token"
    if attached or groups_done:
        return "transfer"
    return "prefill" if groups_begun else "queued"


@dataclass
class Watched:
    """One request: what it is, how many tokens its client has, and whom to tell of which stage."""

    request_id: str
    wanted: int
    tokens: int = 0
    stage: str = ""  # nothing is known of it yet
    target: str = ""
    reached: asyncio.Event = field(default_factory=asyncio.Event)

    def move(self, stage: str) -> None:
        """Tells whoever waits for this stage or an earlier one."""
        self.stage = stage
        if stage and self.target and STAGES.index(stage) >= STAGES.index(self.target):
            self.reached.set()


class Watch:
    """Looks at all records of decode's arena again and again."""

    def __init__(self, arena: Arena) -> None:
        plan = arena.plan
        dtype = record_dtype(plan.layout, plan.max_context)
        self._records: NDArray[np.void] = np.ndarray(
            (plan.streams,), dtype, arena.buffer, plan.records_offset, (plan.record_bytes,)
        )
        self.requests: dict[str, Watched] = {}

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self.look()
            await asyncio.sleep(LOOK_S)

    def look(self) -> None:
        """Brings every watched request up to date."""
        fixed = self._records["fixed"]
        for slot in np.flatnonzero(fixed["state"] == ACTIVE).tolist():
            request_id = bytes(fixed["request_id"][slot]).rstrip(b"\0").decode(errors="replace")
            if watched := self.requests.get(request_id):
                watched.move(self._stage(slot, watched))

    def _stage(self, slot: int, watched: Watched) -> str:
        record = self._records[slot]
        words, ready = record["fixed"]["words"], record["ready"] & np.uint64(0xFFFFFFFF)
        prompt = int(record["fixed"]["prompt_tokens"])
        epoch = int(words[COMMIT]) >> 32
        return stage_of(
            groups_begun=int((ready > 0).sum()), groups_done=int((ready >= prompt).sum()),
            attached=int(words[ATTACHED]) == epoch, tokens=watched.tokens,
            wanted=watched.wanted,
        )  # fmt: skip


async def reached(watched: Watched, target: str, give_up: Callable[[], bool]) -> None:
    """Waits until a request has come as far as `target`, or `give_up` says that it never will."""
    watched.target = target
    watched.move(watched.stage)
    while not watched.reached.is_set() and not give_up():
        try:
            await asyncio.wait_for(watched.reached.wait(), 0.1)
        except TimeoutError:
            continue
