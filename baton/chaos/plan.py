"""Draws scenarios: the same (seed, run, name) and model always give the same one. Pure but for reading
the standard library's source, which the prompts are cut from."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json.decoder
import textwrap
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

from tokenizers import Tokenizer

from baton.chaos.scenario import Ask, Crash, Scenario

_MODULES = (argparse, inspect, json.decoder, textwrap, threading)
PAGE_TOKENS = 64
STREAMS_MIN, STREAMS_MAX = 4, 6
NEW_MIN, NEW_MAX = 40, 160
SUSPECT_MS = 700  # the scheduler's default

Plan = tuple[Sequence[Ask], Crash]
Corpus = Sequence[int]


def read_corpus(model: str) -> list[int]:
    """Token ids of real text, far more than any prompt needs."""
    tokenizer = Tokenizer.from_file(str(Path(model) / "tokenizer.json"))
    text = "\n".join(inspect.getsource(module) for module in _MODULES)
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def _ask(rng: Random, corpus: Corpus, length: int, *, new_min: int = NEW_MIN) -> Ask:
    start = rng.randrange(len(corpus) - length)
    prompt = tuple(corpus[start : start + length])
    new = rng.randint(new_min, NEW_MAX)
    if rng.random() < 0.5:
        return Ask(prompt, new)
    return Ask(
        prompt, new, round(rng.uniform(0.8, 1.0), 2), rng.choice((0.9, 0.95, 1.0)),
        rng.choice((0, 20, 50)), rng.randrange(1, 1 << 31),
    )  # fmt: skip


def _length(rng: Random) -> int:
    """Mostly short, some long, and some next to a page's edge."""
    if rng.random() < 0.4:
        return PAGE_TOKENS * rng.randint(1, 6) + rng.choice((-1, 0, 1))
    return rng.randint(20, rng.choice((100, 300, 700)))


def _sharing(rng: Random, asks: list[Ask]) -> list[Ask]:
    """Makes the last request begin like the first, from a page edge on its own."""
    first, last = asks[0], asks[-1]
    shared = len(first.token_ids) // PAGE_TOKENS * PAGE_TOKENS
    prompt = (first.token_ids[:shared] + last.token_ids)[: max(shared + 1, 200)]
    changed = Ask(prompt, last.max_tokens, last.temperature, last.top_p, last.top_k, last.seed)
    return [*asks[:-1], changed]


def _mixed(rng: Random, corpus: Corpus, *, new_min: int = NEW_MIN) -> list[Ask]:
    """Several concurrent requests; both greedy and sampled ones are always among them."""
    count = rng.randint(STREAMS_MIN, STREAMS_MAX)
    while True:
        asks = [_ask(rng, corpus, _length(rng), new_min=new_min) for _ in range(count)]
        if len({ask.temperature > 0 for ask in asks}) == 2:
            return _sharing(rng, asks) if rng.random() < 0.5 else asks


def _random(rng: Random, corpus: Corpus) -> Plan:
    asks = _mixed(rng, corpus)
    stream = rng.randrange(len(asks))
    index = rng.randrange(asks[stream].max_tokens - 1)
    return asks, Crash("token", stream, index, victim=rng.choice(("owner", "busiest")))


def _in_the_middle(**more: Any) -> Callable[[Random, Corpus], Plan]:
    """A kill when one stream is well under way, with something more."""

    def plan(rng: Random, corpus: Corpus) -> Plan:
        asks = _mixed(rng, corpus, new_min=100)
        return asks, Crash("token", rng.randrange(len(asks)), rng.randint(10, 60), **more)

    return plan


def _at_point(point: str) -> Callable[[Random, Corpus], Plan]:
    """A failpoint inside the computation of some token of the first stream that gets there."""

    def plan(rng: Random, corpus: Corpus) -> Plan:
        asks = _mixed(rng, corpus)
        return asks, Crash("failpoint", index=rng.randint(5, NEW_MIN - 1), point=point)

    return plan


def _at_arrival(point: str) -> Callable[[Random, Corpus], Plan]:
    """A failpoint that has no token index: the first stream to get there dies of it."""
    return lambda rng, corpus: (_mixed(rng, corpus), Crash("failpoint", point=point))


def _at_token(number: int) -> Callable[[Random, Corpus], Plan]:
    """Generated token `number`, in prompts whose rows reach a page's edge at the same step."""

    def plan(rng: Random, corpus: Corpus) -> Plan:
        # Token i is computed with the row at position prompt + i - 1.
        edges = [(row - number + 1) % PAGE_TOKENS + PAGE_TOKENS for row in (63, 64, 65, 62)]
        asks = [_ask(rng, corpus, length, new_min=number + 10) for length in edges]
        point = rng.choice(("decode.kv_written", "decode.committed"))
        return asks, Crash("failpoint", index=number, point=point)

    return plan


def _at_row(row: int) -> Callable[[Random, Corpus], Plan]:
    """The row at position 63, 64 or 65, prompt included, of a stream whose prompt ends before."""

    def plan(rng: Random, corpus: Corpus) -> Plan:
        index = rng.randint(15, 40)
        lengths = (row + 1 - index, row + 1 - index + PAGE_TOKENS, row + 1 - index, 100)
        asks = [_ask(rng, corpus, length, new_min=60) for length in lengths]
        point = rng.choice(("decode.kv_written", "decode.committed", "decode.mid_layer"))
        return asks, Crash("failpoint", index=index, point=point)

    return plan


def _paused(point: str) -> Callable[[Random, Corpus], Plan]:
    """A decode that stops inside a step, is replaced there, and wakes up in the same step."""

    def plan(rng: Random, corpus: Corpus) -> Plan:
        asks = _mixed(rng, corpus, new_min=100)
        index = rng.randint(10, 60)
        return asks, Crash("failpoint", index=index, point=point, signal="STOP")

    return plan


def _paused_at_its_last(rng: Random, corpus: Corpus) -> Plan:
    """A decode that has committed the last token of a stream stops before it can report it."""
    asks = _mixed(rng, corpus, new_min=120)
    first = dataclasses.replace(asks[0], max_tokens=80)
    crash = Crash("failpoint", index=79, point="decode.committed", signal="STOP")
    return [first, *asks[1:]], crash


def _paused_for_a_while(rng: Random, corpus: Corpus) -> Plan:
    """A decode that wakes up in the moment in which it is being replaced."""
    asks, crash = _paused_at_its_last(rng, corpus)
    if rng.random() < 0.5:
        crash = dataclasses.replace(crash, index=rng.randint(10, 60))
    return asks, dataclasses.replace(crash, pause_ms=rng.randint(SUSPECT_MS - 100, SUSPECT_MS + 30))


def _while_prefilling(victim: str) -> Callable[[Random, Corpus], Plan]:
    def plan(rng: Random, corpus: Corpus) -> Plan:
        count = rng.randint(STREAMS_MIN, STREAMS_MAX)
        asks = [_ask(rng, corpus, rng.randint(300, 700)) for _ in range(count)]
        return asks, Crash("placed", victim=victim)

    return plan


def _in_prefill(rng: Random, corpus: Corpus) -> Plan:
    asks = [_ask(rng, corpus, rng.randint(200, 600)) for _ in range(4)]
    return asks, Crash("failpoint", index=rng.randrange(4), point="prefill.mid_layer")


DECODE_KILL: dict[str, Callable[[Random, Corpus], Plan]] = {
    "random": _random,
    "mid-layer": _at_point("decode.mid_layer"),
    "kv-not-committed": _at_point("decode.kv_written"),
    "committed-not-reported": _at_point("decode.committed"),
    "token-63": _at_token(63),
    "token-64": _at_token(64),
    "token-65": _at_token(65),
    "row-63": _at_row(63),
    "row-64": _at_row(64),
    "row-65": _at_row(65),
    "hand-off": _at_arrival("decode.attaching"),
    "hand-off-attached": _at_arrival("decode.attached"),
    "hand-off-early": _while_prefilling("busiest"),
    "takeover": _in_the_middle(then="decode.attaching"),
    "takeover-store": _in_the_middle(then="store.fenced"),
    "takeover-scheduler": _in_the_middle(then="scheduler.worker_lost"),
    "decode+store": _in_the_middle(also="kv-store"),
    "decode+scheduler": _in_the_middle(also="scheduler"),
}
PREFILL_KILL: dict[str, Callable[[Random, Corpus], Plan]] = {
    "prefill-mid-layer": _in_prefill,
    "prefill-before-first": _at_arrival("handoff.before_first"),
    "prefill-after-first": _at_arrival("handoff.after_first"),
    "prefill-random": _while_prefilling("prefill"),
}
ZOMBIE: dict[str, Callable[[Random, Corpus], Plan]] = {
    "zombie": _in_the_middle(signal="STOP"),
    "zombie-returns": _in_the_middle(signal="STOP", then="decode.attaching"),
    "zombie-mid-layer": _paused("decode.mid_layer"),
    "zombie-not-committed": _paused("decode.kv_written"),
    "zombie-not-reported": _paused("decode.committed"),
    "zombie-last-token": _paused_at_its_last,
    "zombie-wakes": _paused_for_a_while,
}
PLANS = {**DECODE_KILL, **PREFILL_KILL, **ZOMBIE}


def draw(name: str, seed: int, run: int, corpus: Corpus) -> Scenario:
    """The scenario of one run."""
    asks, crash = PLANS[name](Random(f"{seed}/{run}/{name}"), corpus)
    return Scenario(name, seed, run, tuple(asks), crash)


def schedule(names: Sequence[str], runs: int, seed: int) -> list[str]:
    """Every name at least once, the rest random moments (or round and round where there are none),
    in an order drawn from the seed."""
    fill = ["random"] if "random" in names else list(names)
    order = [*names, *(fill[i % len(fill)] for i in range(runs - len(names)))][:runs]
    Random(f"{seed}/order").shuffle(order)
    return order
