"""Prompts of real text and the tokens they ought to give."""

from __future__ import annotations

import inspect
import json
import textwrap
import threading
from dataclasses import dataclass, field
from typing import Any

from baton.client import Client
from services.engine.reference import Reference

MODULES = (inspect, json, textwrap, threading)


def text_of(module: int, start: int, length: int) -> str:
    """A piece of the standard library's source."""
    source = inspect.getsource(MODULES[module % len(MODULES)])
    return source[start : start + length]


def tokens_of(reference: Reference, module: int, count: int) -> list[int]:
    """The first `count` tokens of a module's source."""
    ids: list[int] = reference.tokenizer.encode(text_of(module, 0, 8 * count)).ids
    assert len(ids) >= count
    return ids[:count]


@dataclass(frozen=True)
class Ask:
    """One request: a prompt and how to continue it."""

    prompt: tuple[int, ...]
    max_tokens: int
    options: dict[str, Any] = field(default_factory=dict)

    def expected(self, reference: Reference) -> list[int]:
        request = {"token_ids": self.prompt, "max_tokens": self.max_tokens, "ignore_eos": True}
        answer: list[int] = reference.answer({**request, **self.options})["token_ids"]
        return answer

    def stream(self, client: Client, **more: Any) -> list[int]:
        """The token ids a cluster gives; asserts that indexes have no gap."""
        tokens = []
        options = {"ignore_eos": True, **self.options, **more}
        for event in client.generate(list(self.prompt), max_tokens=self.max_tokens, **options):
            if event.HasField("token"):
                assert event.token.index == len(tokens)
                tokens.append(event.token.token_id)
            else:
                assert event.HasField("finished"), event
        return tokens


SAMPLED = {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "seed": 7}


def varied(reference: Reference) -> list[Ask]:
    """Prompts around page and chunk edges, greedy and sampled, some sharing a prefix."""
    lengths = (1, 20, 63, 64, 65, 127, 128, 255, 256, 257, 400, 400)
    return [
        Ask(tuple(tokens_of(reference, i // 3, n)), 24 + 9 * i, SAMPLED if i % 2 else {})
        for i, n in enumerate(lengths)
    ]
