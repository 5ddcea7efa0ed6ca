"""A client: the real cursor of the client library over the simulated network. It checks each token."""

from __future__ import annotations

from typing import Any

import grpc

from baton.client import ClientError, _Cursor
from baton.v1 import control_pb2, inference_pb2
from tests.sim.hub import Hub, Process, Violation
from tests.sim.model import answer
from tests.sim.net import Net

STOP, LENGTH, CANCELLED = (
    inference_pb2.FINISH_REASON_STOP,
    inference_pb2.FINISH_REASON_LENGTH,
    inference_pb2.FINISH_REASON_CANCELLED,
)
ORPHAN_MS, RETAIN_MS = 2500, 60_000


class Client(Process):
    """One request from its first attempt to its end. It may cancel, or leave without a word."""

    def __init__(
        self, hub: Hub, name: str, scheduler: Any, net: Net, prompt: list[int], max_tokens: int,
        *, stop_at: int | None = None, stop_text_at: int | None = None,
        deadline_s: float | None = None, cancel_s: float | None = None,
        leave_s: float | None = None, tenant: str = "",
    ) -> None:  # fmt: skip
        super().__init__(hub, name)
        self._scheduler, self._net = scheduler, net
        self.prompt = prompt
        full = answer(tuple(prompt), max_tokens)
        self.may_end = deadline_s is not None or cancel_s is not None or leave_s is not None
        self._deadline_s, self._cancel_s, self._leave_s = deadline_s, cancel_s, leave_s
        stops = [full[stop_at]] if stop_at is not None else []
        texts = [f"<{full[stop_text_at]}>"] if stop_text_at is not None else []
        self.truth = self._cut(full, {*stops, *(full[i] for i in [stop_text_at] if i is not None)})
        self.sampling = control_pb2.ResolvedSampling(
            max_tokens=max_tokens, top_p=1.0, seed=7, stop_token_ids=stops
        )
        self.body = inference_pb2.GenerateRequest(
            request_id=name, token_ids=inference_pb2.TokenIds(ids=prompt), tenant=tenant,
            sampling=inference_pb2.SamplingParams(max_tokens=max_tokens, stop=texts),
            orphan_ms=ORPHAN_MS, retain_ms=RETAIN_MS,
        )  # fmt: skip
        self.cursor = _Cursor(name, self.body, retry_s=1e9)
        self.final: inference_pb2.GenerateEvent | None = None
        self.refused = ""
        self.left = False

    @staticmethod
    def _cut(full: tuple[int, ...], ends: set[int]) -> tuple[int, ...]:
        """Up to the first token that ends the answer, itself included."""
        last = next((i for i, token in enumerate(full) if token in ends), len(full) - 1)
        return full[: last + 1]

    @property
    def over(self) -> bool:
        return self.final is not None or bool(self.refused) or self.left

    def begin(self) -> None:
        self._open()
        if self._cancel_s is not None:
            self.after(self._cancel_s, self._cancel)
        if self._leave_s is not None:
            self.after(self._leave_s, self._leave)

    def _open(self) -> None:
        if self.over:
            return
        server = self._scheduler
        self._link, self._end = self._net.connect(
            self, server, server.accept_client, self._take, self._closed
        )
        if self.cursor.step() == "generate":
            message: tuple[Any, ...] = (
                "generate", self.body, self.prompt, self.sampling, self._deadline_s,
            )  # fmt: skip
        else:
            message = ("resume", self.name, self.cursor.next_index)
            self.hub.counts["resumed"] += 1
        self._link.send(self._end, message)

    def _take(self, message: Any) -> None:
        if isinstance(message, tuple):
            self._refused(message[1], message[2])
            return
        kind = message.WhichOneof("event")
        if self.final is not None:
            raise Violation(f"{self.name}: an event after the end")
        if self.cursor.accept(message) and kind == "token":
            self._check_token(message.token)
        if kind != "token":
            self._ended(message)

    def _check_token(self, token: inference_pb2.TokenEvent) -> None:
        if token.index >= len(self.truth) or token.token_id != self.truth[token.index]:
            raise Violation(
                f"{self.name}: token {token.index} is {token.token_id}, not of {self.truth}"
            )

    def _ended(self, event: inference_pb2.GenerateEvent) -> None:
        self.final = event
        self._link.close(self._end)
        if event.HasField("failed"):
            self.tell(f"failed: {event.failed.code} {event.failed.message}")
            if event.failed.code != "RESOURCE_EXHAUSTED":
                raise Violation(f"{self.name}: failed with {event.failed.code}: {event.failed}")
            self.hub.counts["ended: no room"] += 1
            return
        reason = event.finished.reason
        self.tell(f"ends: {inference_pb2.FinishReason.Name(reason)}")
        self.hub.counts["ended: cancelled" if reason == CANCELLED else "ended: whole"] += 1
        if reason == CANCELLED:
            if not self.may_end and not self._was_away():
                raise Violation(f"{self.name}: cancelled, and nobody has asked for it")
        elif self.cursor.next_index != len(self.truth):
            raise Violation(f"{self.name}: {self.cursor.next_index} tokens of {len(self.truth)}")

    def _was_away(self) -> bool:
        """Nobody read it for `orphan_ms`, because the network would not let him."""
        return self._away_since is not None and (
            self.hub.now - self._away_since >= ORPHAN_MS / 1000 - 1.6
        )

    _away_since: float | None = None

    def _closed(self) -> None:
        if self.over:
            return
        if self._away_since is None:
            self._away_since = self.hub.now
        wait = self.cursor.broke(grpc.StatusCode.UNAVAILABLE, "broken", self.hub.now)
        self.after(wait, self._open)

    def _refused(self, code: str, message: str) -> None:
        try:
            self.cursor.broke(grpc.StatusCode[code], message, self.hub.now)
        except ClientError as error:
            self.refused = error.code
        self.tell(f"refused: {code}: {message}")
        self.hub.counts[f"refused: {code}"] += 1
        if code != "RESOURCE_EXHAUSTED":
            raise Violation(f"{self.name}: {code}: {message}")

    def _cancel(self) -> None:
        """Until somebody has heard it."""
        if self.over:
            return
        server = self._scheduler

        def replied(reply: Any, code: str, message: str) -> None:
            if code in ("UNAVAILABLE", "DEADLINE_EXCEEDED", "NOT_FOUND") and not self.over:
                self.after(0.2, self._cancel)

        self.hub.counts["cancel"] += 1
        self._net.call(self, server, lambda: server.cancel(self.name), replied)

    def _leave(self) -> None:
        if not self.over:
            self.hub.counts["client left"] += 1
            self.left = True
            self.tell("leaves")
            self._link.close(self._end)
