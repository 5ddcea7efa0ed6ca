"""Draws scenarios: the same (seed, run, name) and model always give the same one. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from baton.chaos.asks import (
    NEW_MIN,
    PAGE_TOKENS,
    STREAMS_MAX,
    STREAMS_MIN,
    Corpus,
    ask,
    mixed,
)
from baton.chaos.scenario import Ask, Crash, Scenario
from baton.chaos.setups import CHUNK_TOKENS

SUSPECT_MS = 700  # the scheduler's default

Plan = tuple[Sequence[Ask], Crash]
Planner = Callable[[Random, Corpus], Plan]


def _random(rng: Random, corpus: Corpus) -> Plan:
    asks = mixed(rng, corpus)
    stream = rng.randrange(len(asks))
    index = rng.randrange(asks[stream].max_tokens - 1)
    return asks, Crash("token", stream, index, victim=rng.choice(("owner", "busiest")))


def _in_the_middle(**more: Any) -> Planner:
    """A kill when one stream is well under way, with something more."""

    def plan(rng: Random, corpus: Corpus) -> Plan:
        asks = mixed(rng, corpus, new_min=100)
        return asks, Crash("token", rng.randrange(len(asks)), rng.randint(10, 60), **more)

    return plan


def _at_point(point: str) -> Planner:
    """A failpoint inside the computation of some token of the first stream that gets there."""

    def plan(rng: Random, corpus: Corpus) -> Plan:
        asks = mixed(rng, corpus)
        return asks, Crash("failpoint", index=rng.randint(5, NEW_MIN - 1), point=point)

    return plan


def _at_arrival(point: str) -> Planner:
    """A failpoint that has no token index: the first stream to get there dies of it."""
    return lambda rng, corpus: (mixed(rng, corpus), Crash("failpoint", point=point))


def _at_token(number: int) -> Planner:
    """Generated token `number`, in prompts whose rows reach a page's edge at the same step."""

    def plan(rng: Random, corpus: Corpus) -> Plan:
        # Token i is computed with the row at position prompt + i - 1.
        edges = [(row - number + 1) % PAGE_TOKENS + PAGE_TOKENS for row in (63, 64, 65, 62)]
        asks = [ask(rng, corpus, length, new_min=number + 10) for length in edges]
        point = rng.choice(("decode.kv_written", "decode.committed"))
        return asks, Crash("failpoint", index=number, point=point)

    return plan


def _at_row(row: int) -> Planner:
    """The row at position 63, 64 or 65, prompt included, of a stream whose prompt ends before."""

    def plan(rng: Random, corpus: Corpus) -> Plan:
        index = rng.randint(15, 40)
        lengths = (row + 1 - index, row + 1 - index + PAGE_TOKENS, row + 1 - index, 100)
        asks = [ask(rng, corpus, length, new_min=60) for length in lengths]
        point = rng.choice(("decode.kv_written", "decode.committed", "decode.mid_layer"))
        return asks, Crash("failpoint", index=index, point=point)

    return plan


def _paused(point: str) -> Planner:
    """A decode that stops inside a step, is replaced there, and wakes up in the same step."""

    def plan(rng: Random, corpus: Corpus) -> Plan:
        asks = mixed(rng, corpus, new_min=100)
        index = rng.randint(10, 60)
        return asks, Crash("failpoint", index=index, point=point, signal="STOP")

    return plan


def _paused_at_its_last(rng: Random, corpus: Corpus) -> Plan:
    """A decode that has committed the last token of a stream stops before it can report it."""
    asks = mixed(rng, corpus, new_min=120)
    first = dataclasses.replace(asks[0], max_tokens=80)
    crash = Crash("failpoint", index=79, point="decode.committed", signal="STOP")
    return [first, *asks[1:]], crash


def _paused_for_a_while(rng: Random, corpus: Corpus) -> Plan:
    """A decode that wakes up in the moment in which it is being replaced."""
    asks, crash = _paused_at_its_last(rng, corpus)
    if rng.random() < 0.5:
        crash = dataclasses.replace(crash, index=rng.randint(10, 60))
    return asks, dataclasses.replace(crash, pause_ms=rng.randint(SUSPECT_MS - 100, SUSPECT_MS + 30))


def _while_prefilling(victim: str) -> Planner:
    def plan(rng: Random, corpus: Corpus) -> Plan:
        count = rng.randint(STREAMS_MIN, STREAMS_MAX)
        asks = [ask(rng, corpus, rng.randint(300, 700)) for _ in range(count)]
        return asks, Crash("placed", victim=victim)

    return plan


def _in_prefill(rng: Random, corpus: Corpus) -> Plan:
    asks = [ask(rng, corpus, rng.randint(200, 600)) for _ in range(4)]
    return asks, Crash("failpoint", index=rng.randrange(4), point="prefill.mid_layer")


# --- what dies or falls silent beside a decode ---


def _silent_alone(rng: Random, corpus: Corpus) -> Plan:
    """The only decode is paused beyond suspicion: nobody can take over, and nobody may."""
    asks, crash = _in_the_middle(signal="STOP")(rng, corpus)
    pause_ms = rng.randint(SUSPECT_MS + 200, 2 * SUSPECT_MS)
    return asks, dataclasses.replace(crash, pause_ms=pause_ms, keeps_epoch=True)


def _in_a_chunk(rng: Random, corpus: Corpus) -> Plan:
    """Prefill dies in the middle of a chunk that is not the first: those before it are complete."""
    asks = [ask(rng, corpus, rng.randint(300, 600)) for _ in range(4)]
    begin = CHUNK_TOKENS * rng.randint(1, 3)
    return asks, Crash("failpoint", index=begin, point="prefill.mid_chunk", victim="prefill")


def _prefill_paused(rng: Random, corpus: Corpus) -> Plan:
    """Another prefill is there: it goes on, and what the paused one does afterwards is refused."""
    asks, crash = _in_a_chunk(rng, corpus)
    return asks, dataclasses.replace(crash, signal="STOP", pause_ms=2 * SUSPECT_MS)


def _paused_role(victim: str, ms_min: int, ms_max: int) -> Planner:
    """A process that only falls silent for a while, with streams under way."""

    def plan(rng: Random, corpus: Corpus) -> Plan:
        pause_ms = rng.randint(ms_min, ms_max)
        return _in_the_middle(victim=victim, signal="STOP", pause_ms=pause_ms)(rng, corpus)

    return plan


def _unrenewed(rng: Random, corpus: Corpus) -> Plan:
    """The scheduler is away until the leases of all its streams have run out."""
    return _in_the_middle(victim="scheduler", signal="STOP", expires=True)(rng, corpus)


def _new_work(victim: str, **more: Any) -> Planner:
    """Strikes while the prompts are still being computed."""

    def plan(rng: Random, corpus: Corpus) -> Plan:
        asks, _ = _while_prefilling("prefill")(rng, corpus)
        return asks, Crash("placed", victim=victim, **more)

    return plan


def _cut(trigger: str) -> Planner:
    """The link between the stores carries nothing for a while."""

    def plan(rng: Random, corpus: Corpus) -> Plan:
        pause_ms = rng.randint(100, 1500)
        asks, _ = _while_prefilling("prefill")(rng, corpus)
        index = rng.randint(0, 20) if trigger == "token" else None
        return asks, Crash(trigger, 0, index, victim="link", signal="CUT", pause_ms=pause_ms)

    return plan


def _parted(between: str, trigger: str, ms_min: int = 100, ms_max: int = 2500) -> Planner:
    """Two hosts do not hear each other for a while: from before they have noticed to long after."""

    def plan(rng: Random, corpus: Corpus) -> Plan:
        pause_ms = rng.randint(ms_min, ms_max)
        cut: dict[str, Any] = {
            "victim": "link", "signal": "CUT", "between": between, "pause_ms": pause_ms,
        }  # fmt: skip
        if trigger == "token":
            return _in_the_middle(**cut)(rng, corpus)
        asks, _ = _while_prefilling("prefill")(rng, corpus)
        return asks, Crash(trigger, **cut)

    return plan


def _host_lost(rng: Random) -> dict[str, Any]:
    """For good, as far as these requests are concerned, or for a while in which it starts anew."""
    return {"signal": "LOSE", "pause_ms": rng.choice((0, rng.randint(200, 2000)))}


def _prefill_host_lost(rng: Random, corpus: Corpus) -> Plan:
    return _new_work("prefill", **_host_lost(rng))(rng, corpus)


def _decode_host_lost(rng: Random, corpus: Corpus) -> Plan:
    return _in_the_middle(**_host_lost(rng))(rng, corpus)


def _crowd(rng: Random, corpus: Corpus) -> list[Ask]:
    """More at once than a small arena holds."""
    return [ask(rng, corpus, rng.randint(200, 500), new_min=100) for _ in range(12)]


def _pressure(rng: Random, corpus: Corpus) -> Plan:
    return _crowd(rng, corpus), Crash("pressure")


def _in_a_crowd(**more: Any) -> Planner:
    """A decode is lost while pages are short: its successor needs some, too."""
    return lambda rng, corpus: (
        _crowd(rng, corpus),
        Crash("token", 0, rng.randint(10, 60), victim="busiest", **more),
    )


DECODE_KILL: dict[str, Planner] = {
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
PREFILL_KILL: dict[str, Planner] = {
    "prefill-mid-layer": _in_prefill,
    "prefill-before-first": _at_arrival("handoff.before_first"),
    "prefill-after-first": _at_arrival("handoff.after_first"),
    "prefill-random": _while_prefilling("prefill"),
}
ZOMBIE: dict[str, Planner] = {
    "zombie": _in_the_middle(signal="STOP"),
    "zombie-returns": _in_the_middle(signal="STOP", then="decode.attaching"),
    "zombie-mid-layer": _paused("decode.mid_layer"),
    "zombie-not-committed": _paused("decode.kv_written"),
    "zombie-not-reported": _paused("decode.committed"),
    "zombie-last-token": _paused_at_its_last,
    "zombie-wakes": _paused_for_a_while,
}
OTHERS: dict[str, Planner] = {
    "store": _in_the_middle(victim="kv-store"),
    "store-new-work": _new_work("kv-store"),
    "store-paused": _paused_role("kv-store", 200, 1500),
    "store-paused-new-work": _new_work("kv-store", signal="STOP", pause_ms=600),
    "scheduler": _in_the_middle(victim="scheduler"),
    "scheduler-new-work": _new_work("scheduler"),
    "scheduler-paused": _paused_role("scheduler", 200, 1500),
    "store+scheduler": _in_the_middle(victim="kv-store", also="scheduler"),
    "prefill+store": _new_work("prefill", also="kv-store"),
    "prefill+scheduler": _new_work("prefill", also="scheduler"),
    "decode+prefill": _in_the_middle(also="prefill"),
}
ELSEWHERE: dict[str, dict[str, Planner]] = {
    "one-decode": {"silent": _silent_alone},
    "short-lease": {"lease-expired": _unrenewed},
    "two-prefills": {"prefill-mid-chunk": _in_a_chunk, "prefill-paused": _prefill_paused},
    "linked": {"link-placed": _cut("placed"), "link-token": _cut("token")},
    "hosts": {
        "hosts-prefill-decode": _parted("prefill/decode", "placed"),
        "hosts-scheduler-prefill": _parted("scheduler/prefill", "placed"),
        "hosts-scheduler-decode": _parted("scheduler/decode", "token"),
    },
    "hosts-apart": {"hosts-decode-alone": _parted("scheduler/owner", "token", 2 * SUSPECT_MS)},
    "hosts-spare": {
        "hosts-prefill-lost": _prefill_host_lost,
        "hosts-decode-lost": _decode_host_lost,
    },
    "small-arena": {
        "arena-full": _pressure,
        "arena-full-decode": _in_a_crowd(),
        "arena-full-zombie": _in_a_crowd(signal="STOP", pause_ms=2000),
    },
}
SETUP_OF = {name: setup for setup, plans in ELSEWHERE.items() for name in plans}
PLANS: dict[str, Planner] = {
    **DECODE_KILL, **PREFILL_KILL, **ZOMBIE, **OTHERS,
    **{name: plan for plans in ELSEWHERE.values() for name, plan in plans.items()},
}  # fmt: skip


def draw(name: str, seed: int, run: int, corpus: Corpus) -> Scenario:
    """The scenario of one run."""
    asks, crash = PLANS[name](Random(f"{seed}/{run}/{name}"), corpus)
    return Scenario(name, seed, run, tuple(asks), crash, setup=SETUP_OF.get(name, "standard"))


def schedule(names: Sequence[str], runs: int, seed: int) -> list[str]:
    """Every name at least once, the rest random moments (or round and round where there are none),
    in an order drawn from the seed."""
    fill = ["random"] if "random" in names else list(names)
    order = [*names, *(fill[i % len(fill)] for i in range(runs - len(names)))][:runs]
    Random(f"{seed}/order").shuffle(order)
    return order
