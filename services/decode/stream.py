"""One stream at a decode worker: from announced pages to its own tail, then one committed step after
another. It reads and writes the arena; it knows no socket and no scheduler."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from baton.v1 import control_pb2, inference_pb2
from services.engine.backend import Backend
from services.engine.repair import Repair, open_repairs, repair
from services.engine.sampling import SamplingParams
from services.kv.arena import Arena
from services.kv.identity import RowIdentity
from services.kv.layout import PAGE_TOKENS, blocks_for
from services.kv.record import StreamRecord
from services.kv.verify import verify_groups, verify_rows
from services.ops.errors import CorruptKv, StaleEpoch
from services.wire.messages import finish_reason, sampling_params


class Known(NamedTuple):
    """Tokens of a stream as they were when a step had been committed, from the index `first` on."""

    request_id: str
    epoch: int
    first: int
    token_ids: list[int]
    logprobs: list[float]
    finish: inference_pb2.FinishReason

    def message(self) -> control_pb2.StreamTokens:
        tokens = [
            control_pb2.Token(index=self.first + i, token_id=token, logprob=logprob)
            for i, (token, logprob) in enumerate(zip(self.token_ids, self.logprobs, strict=True))
        ]
        return control_pb2.StreamTokens(
            request_id=self.request_id, epoch=self.epoch, tokens=tokens, finish=self.finish
        )


Report = control_pb2.WorkerEvent | list[Known]


def as_event(report: Report) -> control_pb2.WorkerEvent:
    """What the scheduler is told. Messages of tokens are made here, not between two steps."""
    if isinstance(report, control_pb2.WorkerEvent):
        return report
    step = control_pb2.StepReport(streams=[known.message() for known in report])
    return control_pb2.WorkerEvent(step=step)


@dataclass
class DecodeStream:
    """A PrepareDecode and how far it has come. Owned by the engine thread."""

    command: control_pb2.PrepareDecode
    arena: Arena
    unsafe: frozenset[str] = frozenset()
    stopped: bool = False
    verified: list[int] = field(default_factory=list)  # prompt tokens, per layer group
    verified_at: list[control_pb2.GroupTime] = field(default_factory=list)
    attempt: int = -1
    steps: int = 0
    repaired: list[int] = field(default_factory=list)  # rows of each repaired block
    table: NDArray[np.uint32] = field(default_factory=lambda: np.zeros((0, 0), np.uint32))

    def __post_init__(self) -> None:
        self.record = StreamRecord(self.arena, self.command.slot)
        self.request_id: str = self.command.request_id
        self.epoch: int = self.command.epoch
        self.params: SamplingParams = sampling_params(self.command.sampling)
        self.check_epoch()
        self.prompt = self.record.number("prompt_tokens")
        self.first_index = self.record.number("first_index")
        self.max_new = self.record.number("max_new")
        capacity = self.prompt + self.max_new
        self.identity = RowIdentity(self.record.root, self.record.tokens[: self.prompt], capacity)
        self.verified = [0] * self.arena.layout.groups

    def check_epoch(self) -> None:
        """Raises StaleEpoch when another decode owns the stream."""
        owner = self.record.commit()[0]
        if owner != self.epoch and "fence" not in self.unsafe:
            raise StaleEpoch(f"epoch: {self.epoch} has been fenced by {owner}")

    # --- before it runs ---

    def poll(self) -> bool:
        """Verifies what has been announced since the last look; True when the stream can run.

        Raises StaleEpoch, CorruptKv.
        """
        self.check_epoch()
        attempt, has_first = self.record.first()
        if attempt != self.attempt:
            self.attempt = attempt
            self.verified = [0] * self.arena.layout.groups
            self.verified_at.clear()
        for group in range(self.arena.layout.groups):
            owner, tokens = self.record.ready(group)
            if owner == attempt and tokens > self.verified[group]:
                self._verify_prompt(group, tokens, has_first)
        return has_first and min(self.verified) >= self.prompt

    def _verify_prompt(self, group: int, tokens: int, final: bool) -> None:
        """What is to be repaired, or lies in a tail that is no longer prefill's, comes with `attach`.
        Before prefill has come to its end, it finds by itself what is damaged."""
        plan = self.record.plan().copy()
        table = plan["prefill_table"][: blocks_for(self.prompt)]
        todo = open_repairs(self.arena, plan["repair_source"], table, self.prompt)
        skip = {part.index for part in todo}
        if plan["tail_source"] != table[-1]:
            skip.add(self.prompt // PAGE_TOKENS)
        try:
            self._verify(table, group, self.verified[group], tokens, frozenset(skip))
        except CorruptKv:
            if self.record.first()[0] != self.attempt or not final:
                return  # fenced meanwhile, what was read belongs to nobody; or looked at again later
            verify_groups(self.arena, table, self.identity, 0, self.prompt, skip=frozenset(skip))
            raise
        self.verified[group] = tokens
        self.verified_at.append(
            control_pb2.GroupTime(group=group, tokens=tokens, at=time.monotonic())
        )

    def _verify(
        self, table: NDArray[np.uint32], group: int, begin: int, end: int, skip: frozenset[int]
    ) -> None:
        if "verify" not in self.unsafe:
            verify_rows(self.arena, table, self.identity, group, begin, end, skip=skip)

    def attach(self, backend: Backend) -> None:
        """Takes the stream over at its committed step: copies the open tail into pages of this
        epoch, verifies every row that earlier decodes have written, and computes again the blocks
        that were found damaged before.

        Raises StaleEpoch, CorruptKv.
        """
        _, self.steps = self.record.commit()
        known = self.record.tokens[self.prompt : self.prompt + self.steps]
        self.identity.extend(np.array(known))
        end = self.prompt + self.steps
        plan = self.record.plan().copy()
        blocks = plan["decode_table"][: blocks_for(self.prompt + self.max_new - 1)]
        source, rows = int(plan["tail_source"]), int(plan["tail_rows"])
        self.check_epoch()  # the plan that was read is this epoch's
        valid = min(end, len(blocks) * PAGE_TOKENS)
        todo = open_repairs(self.arena, plan["repair_source"], blocks, valid)
        if self.record.attached_epoch() == self.epoch:
            rows, todo = 0, []  # it has its own tail already: it is only asked to report again
        assert rows in (0, end % PAGE_TOKENS) or "fence" in self.unsafe
        if rows and valid == end and end // PAGE_TOKENS not in {part.index for part in todo}:
            self._copy_tail(source, int(blocks[end // PAGE_TOKENS]), rows)
        self._verify_own(blocks, valid, frozenset(part.index for part in todo))
        for part in todo:
            self._repair(backend, blocks, part)
        self.record.set_attached(self.epoch)
        self.table = self.arena.table(blocks)

    def _copy_tail(self, source: int, own: int, rows: int) -> None:
        if "tail" in self.unsafe:
            return
        for group in range(self.arena.layout.groups):
            pages = (self.arena.page_id(block, group) for block in (source, own))
            self.arena.native.copy_rows(*pages, rows, group)

    def _verify_own(self, table: NDArray[np.uint32], end: int, skip: frozenset[int]) -> None:
        """What decodes have written, this one's copy of the open tail included."""
        if {"tail", "verify"} & self.unsafe:
            return
        begin = self.prompt // PAGE_TOKENS * PAGE_TOKENS
        try:
            verify_groups(
                self.arena, table, self.identity, begin, end, skip=skip,
                seals=self.arena.plan.one_class,
            )  # fmt: skip
        except CorruptKv:
            self.check_epoch()  # fenced meanwhile: then the pages may have changed hands
            raise

    def _repair(self, backend: Backend, table: NDArray[np.uint32], todo: Repair) -> None:
        try:
            rows = repair(
                backend, self.arena, self.identity, self.record.tokens, table, todo,
                seal=self.arena.plan.one_class,
            )  # fmt: skip
        except CorruptKv:
            self.check_epoch()
            raise
        self.repaired.append(rows)

    # --- while it runs ---

    @property
    def next_token(self) -> int:
        """The input of the next step: the last known token."""
        return int(self.record.tokens[self.prompt + self.steps])

    @property
    def position(self) -> int:
        """Where the next step's K and V go."""
        return self.prompt + self.steps

    @property
    def next_index(self) -> int:
        """Index of the token that the next step will give."""
        return self.first_index + self.steps + 1

    def seal_if_full(self) -> None:
        """Seals the block whose last row has just been written.

        A seal is for the prefix cache. Where prefill would compute other bits for these tokens the
        block stays open, and neither the store nor one that rebuilds itself takes it for a prompt's.
        """
        position = self.position
        if (position + 1) % PAGE_TOKENS or not self.arena.plan.one_class:
            return
        block = position // PAGE_TOKENS
        for group in range(self.arena.layout.groups):
            page = int(self.table[block, group])
            self.arena.native.seal(page, group, PAGE_TOKENS, self.identity.key(block))

    def commit(self, token: int, logprob: float) -> bool:
        """Stores the next token, then commits the step; False when this epoch has been fenced."""
        at = self.prompt + self.steps + 1
        self.record.tokens[at] = token
        self.record.logprobs[at] = logprob
        if not self.record.advance(self.epoch, self.steps + 1) and "fence" not in self.unsafe:
            return False
        self.steps += 1
        return True

    def finish(self) -> inference_pb2.FinishReason:
        """How the stream stands after the last known token."""
        return finish_reason(self.next_token, self.first_index + self.steps, self.command.sampling)

    def known_from(self, from_index: int) -> Known:
        """The known tokens from `from_index` on, with the finish if there is one."""
        first = max(from_index, self.first_index)
        at = slice(self.prompt + first - self.first_index, self.prompt + self.steps + 1)
        return Known(
            self.request_id, self.epoch, first, self.record.tokens[at].tolist(),
            self.record.logprobs[at].tolist(), self.finish(),
        )  # fmt: skip
