"""The requests of a run: prompts cut from real text, drawn from a seed. Pure but for reading the
standard library's source."""

from __future__ import annotations

import argparse
import inspect
import json.decoder
import textwrap
import threading
from collections.abc import Sequence
from pathlib import Path
from random import Random

from tokenizers import Tokenizer

from baton.chaos.scenario import Ask

_MODULES = (argparse, inspect, json.decoder, textwrap, threading)
PAGE_TOKENS = 64
STREAMS_MIN, STREAMS_MAX = 4, 6
NEW_MIN, NEW_MAX = 40, 160
Corpus = Sequence[int]


def read_corpus(model: str) -> list[int]:
    """Token ids of real text, far more than any prompt needs."""
    tokenizer = Tokenizer.from_file(str(Path(model) / "tokenizer.json"))
    text = "\n".join(inspect.getsource(module) for module in _MODULES)
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def ask(rng: Random, corpus: Corpus, length: int, *, new_min: int = NEW_MIN) -> Ask:
    """A prompt of `length` tokens, greedy or sampled, with `new_min` to NEW_MAX new ones."""
    start = rng.randrange(len(corpus) - length)
    prompt = tuple(corpus[start : start + length])
    new = rng.randint(new_min, NEW_MAX)
    if rng.random() < 0.5:
        return Ask(prompt, new)
    return Ask(
        prompt, new, round(rng.uniform(0.8, 1.0), 2), rng.choice((0.9, 0.95, 1.0)),
        rng.choice((0, 20, 50)), rng.randrange(1, 1 << 31),
    )  # fmt: skip


def length(rng: Random) -> int:
    """Mostly short, some long, and some next to a page's edge."""
    if rng.random() < 0.4:
        return PAGE_TOKENS * rng.randint(1, 6) + rng.choice((-1, 0, 1))
    return rng.randint(20, rng.choice((100, 300, 700)))


def sharing(rng: Random, asks: list[Ask]) -> list[Ask]:
    """Makes the last request begin like the first, from a page edge on its own."""
    first, last = asks[0], asks[-1]
    shared = len(first.token_ids) // PAGE_TOKENS * PAGE_TOKENS
    prompt = (first.token_ids[:shared] + last.token_ids)[: max(shared + 1, 200)]
    changed = Ask(prompt, last.max_tokens, last.temperature, last.top_p, last.top_k, last.seed)
    return [*asks[:-1], changed]


def mixed(rng: Random, corpus: Corpus, *, new_min: int = NEW_MIN) -> list[Ask]:
    """Several concurrent requests; both greedy and sampled ones are always among them."""
    count = rng.randint(STREAMS_MIN, STREAMS_MAX)
    while True:
        asks = [ask(rng, corpus, length(rng), new_min=new_min) for _ in range(count)]
        if len({ask.temperature > 0 for ask in asks}) == 2:
            return sharing(rng, asks) if rng.random() < 0.5 else asks
