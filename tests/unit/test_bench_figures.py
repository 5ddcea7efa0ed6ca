"""What a benchmark makes of its samples: ratios are taken within a round, slopes by least squares."""

from __future__ import annotations

import argparse
import importlib.util
import time
from types import ModuleType

import numpy as np
import pytest

from baton.bench import figures, handoff, prefix, takeover
from baton.bench.figures import quartiles
from baton.bench.kv import actors, command, mooncake, report
from baton.bench.kv.ways import Sample
from baton.bench.kv.world import KIB, MIB, World, worlds


def test_quartiles_of_few() -> None:
    """One value is its own spread; order does not matter."""
    assert quartiles([2.0]) == [2, 2, 2]
    assert quartiles([3.0, 1.0, 2.0]) == [1.5, 2, 2.5]
    assert quartiles([1.0, 9.0]) == [3, 5, 7]
    assert quartiles([]) == []


def test_steps_cover_every_page_once() -> None:
    """Chunk after chunk through all groups; a last run may be shorter."""
    world = World(64 * KIB, blocks=10, groups=3)
    for run in (64 * KIB, 256 * KIB, 16 * MIB):
        pages = [(g, b) for g, begin, end in world.steps(run) for b in range(begin, end)]
        assert sorted(pages) == [(g, b) for g in range(3) for b in range(10)]
        starts = [begin for _, begin, _ in world.steps(run)]
        assert starts == sorted(starts)


def test_worlds_hold_their_longest_run() -> None:
    """Pages are as large as the run, up to 64 KiB; every world has one run per group at least."""
    made = worlds([16 * KIB, MIB, 16 * MIB], 256 * MIB)
    assert {world.page_bytes for world in made.values()} == {16 * KIB, 64 * KIB}
    assert made[16 * MIB] == made[MIB]
    assert made[16 * MIB].group_bytes == 16 * MIB
    assert made[16 * MIB].total_bytes == 256 * MIB


def sample(way: str, number: int, seconds: float, cpu: float = 1.0) -> Sample:
    return Sample(way, MIB, number, 10**9, seconds, cpu)


def test_ratios_are_taken_within_a_round() -> None:
    """A machine that slows down by half between rounds does not change a ratio."""
    samples = []
    for number, slow in enumerate((1.0, 2.0, 4.0)):
        samples += [sample("memcpy", number, 0.1 * slow), sample("shm", number, 0.125 * slow)]
    goals = report.summary(samples, [MIB])["goals"]
    assert [(g["goal"], g["ratio"], g["met"]) for g in goals] == [
        ("shm / memcpy", [0.8, 0.8, 0.8], True)
    ]


def test_the_best_peer_counts() -> None:
    """Of a peer's variants the faster one is compared with."""
    samples = [sample("zmq tcp put", 0, 0.2), sample("grpc sync put", 0, 0.5)]
    samples += [sample("grpc aio put", 0, 0.3)]
    (goal,) = report.summary(samples, [MIB])["goals"]
    assert goal["ratio"][1] == pytest.approx(1.5)
    assert not goal["met"]


def test_the_table_tells_what_was_left_out() -> None:
    result = {**report.summary([sample("memcpy", 0, 0.1)], [MIB]), "skipped": {"grpc": "left out"}}
    text = report.table(result)
    assert "memcpy" in text
    assert "10.00" in text
    assert "grpc: left out" in text


def test_a_peer_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark goes on without it."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "mooncake-transfer-engine-non-cuda" in mooncake.missing()


def kills(intercept: float, per_1k: float, noise: float) -> list[takeover.Sample]:
    draw = np.random.default_rng(1)
    return [
        takeover.Sample(
            "takeover", number, context,
            intercept + per_1k * context / 1e3 + float(draw.normal(0, noise)), 1.0, 0, 1,
        )
        for number in range(9) for context in (256, 1024, 2048)
    ]  # fmt: skip


def test_a_slope_is_found() -> None:
    """Milliseconds for 1 000 tokens, exact where the samples are; single rounds agree."""
    exact = takeover.slope(kills(20, 50, 0))
    assert exact["ms_per_1k_tokens"] == pytest.approx(50)
    assert exact["standard_error"] == pytest.approx(0, abs=1e-6)
    assert exact["of_single_rounds"] == pytest.approx([50, 50, 50])
    assert exact["grows"]


def test_noise_is_no_slope() -> None:
    """A stall that does not depend on the context does not grow."""
    found = takeover.slope(kills(20, 0, 3))
    assert abs(found["ms_per_1k_tokens"]) < 3 * found["standard_error"]
    assert not found["grows"]
    assert takeover.slope([]) == {}


def test_kills_that_all_missed_are_said() -> None:
    """With few rounds there may be no figure for a length."""
    result = takeover.summary(kills(1, 0, 0), [7])
    assert "every kill missed" in takeover.table(result)


def asked(stream: str, ttft: float, second: float, exposed: float = 1.0) -> handoff.Sample:
    return handoff.Sample("shm", stream, 128, ttft, second, 8.0, 2.0, exposed, 1000)


def test_worse_is_later_in_three_pairs_of_four() -> None:
    """Pairs decide, not medians of either side."""
    layers = [asked("layers", 10 + n, 12 + n) for n in range(4)]
    better = [asked("whole", 11 + n, 13 + n) for n in range(4)]
    worse = [asked("whole", 9 + n, 13 + n) for n in range(4)]
    told = handoff.compared(layers, better)
    assert told["never_worse"]
    assert told["ttft_gain_ms"] == [1, 1, 1]
    assert not handoff.compared(layers, worse)["never_worse"]


def test_one_round_is_enough() -> None:
    """Its figures are their own spread; less than one is refused with words."""
    told = handoff.compared([asked("layers", 10, 12)], [asked("whole", 11, 14)])
    assert told["ttft_gain_ms"] == [1, 1, 1]
    assert told["layers"]["ttft_ms"] == [10, 10, 10]
    assert figures.rounds("1") == 1
    for text in ("0", "-1", "some", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="not a number from 1 on"):
            figures.rounds(text)


@pytest.mark.parametrize("bench", [handoff, prefix, takeover, command])
def test_every_benchmark_refuses_no_rounds(
    bench: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is started."""
    with pytest.raises(SystemExit):
        bench.main(["--rounds", "0"])
    assert "--rounds: '0' is not a number from 1 on" in capsys.readouterr().err


def test_exposed_is_held_against_a_group() -> None:
    """At most one layer group's transfer and a millisecond."""
    good = [asked("layers", 1, 2, exposed) for exposed in (2.0, 2.9, 3.0)]
    bad = [asked("layers", 1, 2, exposed) for exposed in (2.0, 3.1, 3.2)]
    assert handoff.compared(good, good)["exposed_within_a_group"]
    assert handoff.compared(good, good)["share_within_a_group"] == 1
    assert not handoff.compared(bad, bad)["exposed_within_a_group"]


class Clock:
    """An actor."""

    def busy(self, seconds: float) -> float:
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass
        return time.process_time()

    def fail(self) -> None:
        raise ValueError("on purpose")


def test_actors_answer_and_are_accounted_for() -> None:
    """Their CPU time is read from outside; what they raise reaches the caller."""
    with actors.Actor(Clock) as clock:
        before = actors.cpu_seconds([clock.pid])
        own = clock.call("busy", 0.05)
        spent = actors.cpu_seconds([clock.pid])
        assert spent - before >= 0.05
        assert spent >= own
        with pytest.raises(actors.ActorFailed, match="on purpose"):
            clock.call("fail")
    with pytest.raises(OSError, match="Invalid argument"):
        actors.cpu_seconds([clock.pid])
