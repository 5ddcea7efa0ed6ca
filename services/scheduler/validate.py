"""From a client's GenerateRequest to one that is complete and known to be possible. Pure.

Every refusal is an InvalidRequest whose message begins with the field's name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from baton.v1 import control_pb2, inference_pb2
from services.ops.errors import InvalidRequest

MAX_TOKENS_DEFAULT = 128
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}\Z")


@dataclass(frozen=True)
class Limits:
    """What the served model allows."""

    model: str
    vocab_size: int
    max_context: int
    eos_token_ids: tuple[int, ...]


def require(holds: bool, message: str) -> None:
    if not holds:
        raise InvalidRequest(message)


def check_request_id(request_id: str) -> None:
    require(
        _REQUEST_ID.match(request_id) is not None,
        "request_id: must be 1 to 128 characters of A-Z a-z 0-9 . _ : -",
    )


def prompt_ids(
    request: inference_pb2.GenerateRequest, limits: Limits, encode: Callable[[str], list[int]]
) -> list[int]:
    """The prompt's token ids, checked against the vocabulary and the context."""
    kind = request.WhichOneof("prompt")
    require(kind is not None, "prompt: one of text and token_ids is needed")
    if kind == "text":
        require(bool(request.text), "text: must not be empty")
        require(
            len(request.text) <= 64 * limits.max_context,
            f"text: {len(request.text)} characters cannot fit {limits.max_context} tokens",
        )
        ids = encode(request.text)
        require(bool(ids), "text: encodes to no token")
    else:
        ids = list(request.token_ids.ids)
        require(bool(ids), "token_ids: must not be empty")
        worst = max(ids)
        require(worst < limits.vocab_size, f"token_ids: {worst} is not below {limits.vocab_size}")
    require(
        len(ids) < limits.max_context,
        f"{kind}: {len(ids)} tokens leave no room for an answer in {limits.max_context}",
    )
    return ids


def resolve(
    request: inference_pb2.GenerateRequest, prompt: Sequence[int], limits: Limits,
    draw_seed: Callable[[], int],
) -> control_pb2.ResolvedSampling:  # fmt: skip
    """Fills in every default and checks every range."""
    check_request_id(request.request_id)
    require(
        request.model in ("", limits.model),
        f"model: {request.model!r} is not served here, {limits.model!r} is",
    )
    require(len(request.tenant.encode()) <= 64, "tenant: longer than 64 bytes")
    s = request.sampling
    max_tokens = s.max_tokens if s.HasField("max_tokens") else MAX_TOKENS_DEFAULT
    _check_ranges(s, max_tokens)
    room = limits.max_context - len(prompt)
    if not s.HasField("max_tokens"):
        max_tokens = max(1, min(max_tokens, room))
    require(
        max_tokens <= room,
        f"max_tokens: {max_tokens} with a prompt of {len(prompt)} tokens exceeds the context of "
        f"{limits.max_context}",
    )
    for token in s.stop_token_ids:
        require(token < limits.vocab_size, f"stop_token_ids: {token} is not in the vocabulary")
    stops = set(s.stop_token_ids) | (set() if s.ignore_eos else set(limits.eos_token_ids))
    return control_pb2.ResolvedSampling(
        max_tokens=max_tokens, temperature=s.temperature,
        top_p=s.top_p if s.HasField("top_p") else 1.0, top_k=s.top_k, min_p=s.min_p,
        seed=s.seed if s.HasField("seed") else draw_seed(), stop_token_ids=sorted(stops),
        logprobs=s.logprobs,
    )  # fmt: skip


def _check_ranges(s: inference_pb2.SamplingParams, max_tokens: int) -> None:
    for name in ("temperature", "top_p", "min_p"):
        require(math.isfinite(getattr(s, name)), f"{name}: must be a finite number")
    require(max_tokens >= 1, "max_tokens: must be at least 1")
    require(0 <= s.temperature <= 10, f"temperature: {s.temperature:g} is not in 0 to 10")
    if s.HasField("top_p"):
        require(0 < s.top_p <= 1, f"top_p: {s.top_p:g} is not in (0, 1]")
    require(0 <= s.min_p < 1, f"min_p: {s.min_p:g} is not in [0, 1)")
    require(len(s.stop) <= 8, f"stop: {len(s.stop)} strings, at most 8")
    for stop in s.stop:
        require(1 <= len(stop.encode()) <= 256, "stop: each string must have 1 to 256 bytes")
    require(len(s.stop_token_ids) <= 64, f"stop_token_ids: {len(s.stop_token_ids)}, at most 64")
