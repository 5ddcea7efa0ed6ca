"""The sampler: which tokens may be chosen, how often, and that its arguments alone decide."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from baton.v1 import control_pb2
from services.engine import sampling
from services.engine.errors import NumericsError
from services.engine.sampling import SamplingParams, philox4x32, sample, uniform
from services.wire.messages import sampling_params

INF = float("inf")
JUST_BELOW_ONE = 1 - 2.0**-53


def logits_of(*values: float) -> NDArray[np.float32]:
    return np.array(values, np.float32)


def random_logits(vocab: int, seed: int = 0, spread: float = 3.0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal(vocab) * spread).astype(np.float32)


def chosen(logits: NDArray[np.float32], params: SamplingParams, draws: int = 300) -> set[int]:
    return {sample(logits, params, position)[0] for position in range(draws)}


def test_greedy_takes_the_lowest_of_equals() -> None:
    """Temperature 0 takes the most probable token, of equals the lowest id, for any filters."""
    logits = logits_of(1, 3, 3, -INF, 3)
    assert sample(logits, SamplingParams(), 0) == (1, 0.0)
    assert sample(logits, SamplingParams(top_k=1, top_p=0.1, min_p=0.5, seed=9), 7)[0] == 1


@pytest.mark.parametrize("bad", [[float("nan"), 1], [1, float("nan")], [INF, 1], [-INF, -INF]])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_never_give_a_token(bad: list[float], temperature: float) -> None:
    """A NaN, a plus infinity or nothing finite at all is refused."""
    with pytest.raises(NumericsError, match="logits"):
        sample(logits_of(*bad), SamplingParams(temperature=temperature), 0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 10.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", -0.1),
        ("min_p", 1.0),
        ("seed", -1),
        ("seed", 1 << 64),
    ],
)
def test_a_parameter_out_of_range_is_named(field: str, value: float) -> None:
    """Ranges are those of the public contract, and the error names the field."""
    with pytest.raises(ValueError, match=field):
        SamplingParams(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("fraction", [0.96, 0.1, 1 / 3, 0.999999999])
def test_the_wire_does_not_change_the_draw(fraction: float) -> None:
    """A sampler asked over the wire and one asked in its own process are asked the same."""
    here = SamplingParams(temperature=fraction, top_p=fraction, min_p=fraction / 2)
    sent = control_pb2.ResolvedSampling(temperature=fraction, top_p=fraction, min_p=fraction / 2)
    assert here == sampling_params(sent)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        (
            (0, 0, 0, 0),
            (0, 0),
            (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        ),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    """The generator is Philox4x32-10, by the known answers of its authors' Random123 library."""
    assert philox4x32(counter, key) == expected


def test_uniforms_are_even_and_unrelated() -> None:
    """Over positions, and over seeds, uniforms are spread evenly and do not follow each other."""
    by_position = np.array([uniform(1, position) for position in range(4000)])
    by_seed = np.array([uniform(seed, 1) for seed in range(4000)])
    for values in (by_position, by_seed):
        assert values.min() >= 0
        assert values.max() < 1
        counts = np.histogram(values, 20, (0, 1))[0]
        assert ((counts - 200) ** 2 / 200).sum() < 43.8  # chi-square, 19 degrees, p = 0.001
        assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.05
    assert len({*by_position, *by_seed}) == 7999  # they share (seed 1, position 1)


def test_high_bits_of_seed_and_position_count() -> None:
    """All 64 bits of the seed and of the position matter."""
    draws = {uniform(seed, position) for seed in (0, 1 << 32, 1 << 63) for position in (0, 1 << 40)}
    assert len(draws) == 6


def test_frequencies_follow_the_tempered_distribution() -> None:
    """Over many positions, tokens come as often as softmax(logits / temperature) says."""
    logits = logits_of(0.3, 1.7, -0.5, -INF, 0.9, 1.1)
    params = SamplingParams(temperature=0.7, seed=11)
    weights = np.exp(logits.astype(np.float64) / 0.7)
    expected = 8000 * weights / weights.sum()
    counts = np.bincount([sample(logits, params, at)[0] for at in range(8000)], minlength=6)
    assert counts[3] == 0
    possible = expected > 0
    deviation = (counts - expected)[possible] ** 2 / expected[possible]
    assert deviation.sum() < 18.5  # chi-square, 4 degrees, p = 0.001


def naive_allowed(logits: NDArray[np.float32], params: SamplingParams) -> list[int]:
    """The tokens the filters leave, written as the rule is said."""
    ranked = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    best = float(logits[ranked[0]])
    weights = np.exp((logits.astype(np.float64) - best) / params.temperature)
    if params.top_k:
        ranked = ranked[: params.top_k]
    if params.top_p < 1:
        total = 0.0
        for token in sorted(ranked):
            total += weights[token]
        reached, kept = 0.0, []
        for token in ranked:
            kept.append(token)
            reached += weights[token]
            if reached >= params.top_p * total:
                break
        ranked = kept
    return sorted(token for token in ranked if weights[token] >= params.min_p)


@given(
    values=st.lists(st.sampled_from([-2.0, -0.0, 0.0, 0.5, 1.0, 3.0]), min_size=1, max_size=40),
    temperature=st.sampled_from([0.01, 0.5, 1.0, 2.5]),
    top_k=st.integers(0, 42),
    top_p=st.sampled_from([1e-9, 0.3, 0.5, 0.9, 0.999999, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.3]),
    u=st.floats(0, JUST_BELOW_ONE),
)
@settings(max_examples=400, deadline=None, derandomize=True)
def test_any_draw_is_by_inverse_cdf_over_what_the_filters_leave(
    values: list[float], temperature: float, top_k: int, top_p: float, min_p: float, u: float
) -> None:
    """For any filters and many equal logits, the token is where the uniform falls in the cumulative
    weights of the tokens left, in order of their ids."""
    logits = logits_of(*values)
    params = SamplingParams(temperature, top_p, top_k, min_p)
    allowed = naive_allowed(logits, params)
    best = float(logits.max())
    weights = np.exp((logits[allowed].astype(np.float64) - best) / temperature)
    cumulative = weights.cumsum()
    expected = allowed[int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))]
    assert sampling._draw(logits, best, params, u) == expected


def test_filters_apply_in_the_documented_order() -> None:
    """top_k renormalises before top_p: 0.55 is reached by the first of two, not of four."""
    logits = np.log(logits_of(0.4, 0.3, 0.2, 0.1))
    assert chosen(logits, SamplingParams(temperature=1, top_p=0.55)) == {0, 1}
    assert chosen(logits, SamplingParams(temperature=1, top_p=0.55, top_k=2)) == {0}


def test_temperature_comes_before_the_filters() -> None:
    """A high temperature flattens, so a nucleus holds more and min_p cuts less."""
    logits = np.log(logits_of(0.5, 0.3, 0.15, 0.05))
    assert chosen(logits, SamplingParams(temperature=1, min_p=0.5)) == {0, 1}
    assert chosen(logits, SamplingParams(temperature=4, min_p=0.5)) == {0, 1, 2, 3}
    assert chosen(logits, SamplingParams(temperature=1, top_p=0.7)) == {0, 1}
    assert chosen(logits, SamplingParams(temperature=4, top_p=0.7)) == {0, 1, 2}


def test_equal_logits_rank_by_token_id() -> None:
    """top_k and top_p cut a run of equals so that the lower ids stay; 0.0 and -0.0 are equal."""
    logits = logits_of(-1, -0.0, 0.0, 0.0, -0.0)
    assert chosen(logits, SamplingParams(temperature=1, top_k=2)) == {1, 2}
    assert chosen(logits, SamplingParams(temperature=1, top_k=4, top_p=0.7)) == {1, 2, 3}


@pytest.mark.parametrize("vocab", [5, 4099])
def test_filters_that_remove_nothing_change_nothing(vocab: int) -> None:
    """A filter that keeps every token leaves the same draws as no filter."""
    logits = random_logits(vocab)
    plain = SamplingParams(temperature=0.9, seed=3)
    for same in (
        SamplingParams(temperature=0.9, seed=3, top_k=vocab),
        SamplingParams(temperature=0.9, seed=3, top_k=vocab + 7),
        SamplingParams(temperature=0.9, seed=3, top_p=1 - 1e-16),
        SamplingParams(temperature=0.9, seed=3, min_p=1e-300),
    ):
        assert [sample(logits, same, at) for at in range(40)] == [
            sample(logits, plain, at) for at in range(40)
        ]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1),
        SamplingParams(temperature=1, top_k=3),
        SamplingParams(temperature=1, top_p=0.999),
        SamplingParams(temperature=1e-45),
        SamplingParams(temperature=10, min_p=0.999),
    ],
)
@pytest.mark.parametrize("u", [0.0, 0.5, JUST_BELOW_ONE])
def test_a_forbidden_token_is_never_drawn(params: SamplingParams, u: float) -> None:
    """A token of weight zero is not drawn, not even by the smallest or the largest uniform."""
    logits = np.concatenate((logits_of(-INF), random_logits(1001, seed=4), logits_of(-INF, -INF)))
    token = sampling._draw(logits, float(logits.max()), params, u)
    assert np.isfinite(logits[token])


def test_the_log_probability_is_the_models_own() -> None:
    """It is of the distribution before temperature and filters, drawn or not; 0.0 unasked."""
    logits = random_logits(1000, seed=2)
    wide = logits.astype(np.float64)
    expected = wide - np.log(np.exp(wide - wide.max()).sum()) - wide.max()
    for params in (
        SamplingParams(logprobs=True),
        SamplingParams(temperature=0.5, top_k=3, top_p=0.8, min_p=0.01, logprobs=True),
        SamplingParams(temperature=2.0, logprobs=True),
    ):
        token, logprob = sample(logits, params, 5)
        assert logprob == pytest.approx(expected[token], abs=1e-12)
    assert sample(logits, SamplingParams(temperature=2.0), 5)[1] == 0.0


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    """Draws repeated, in any order, with others between, are the same; another seed is another."""
    logits = random_logits(500)
    params = SamplingParams(temperature=1.5, seed=77)
    forward = [sample(logits, params, position)[0] for position in range(60)]
    other = [sample(logits, SamplingParams(temperature=1.5, seed=78), at)[0] for at in range(60)]
    backward = [sample(logits, params, position)[0] for position in reversed(range(60))]
    assert forward == backward[::-1]
    assert forward != other


def test_the_logits_are_only_read() -> None:
    """The caller's logits may be read-only, and are unchanged after any draw."""
    logits = random_logits(300)
    copy = logits.copy()
    logits.flags.writeable = False
    sample(logits, SamplingParams(temperature=1.0, top_k=9, top_p=0.9, min_p=0.1), 0)
    sample(logits, SamplingParams(temperature=1.0, min_p=0.1, logprobs=True), 0)
    assert np.array_equal(logits, copy)


SCRIPT = """
import numpy as np
from services.engine.sampling import SamplingParams, sample
logits = (np.random.default_rng(6).standard_normal(4096) * 3).astype(np.float32)
params = SamplingParams(temperature=1.1, top_p=0.95, top_k=200, min_p=0.001, seed=5, logprobs=True)
print([(token, logprob.hex()) for token, logprob in (sample(logits, params, p) for p in range(50))])
"""


@pytest.mark.processes
def test_two_processes_draw_the_same_bits() -> None:
    """The same arguments give the same tokens and the same bits of log probability elsewhere."""
    outputs = {
        subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            check=True,
            timeout=60,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
    assert outputs.pop().startswith(b"[(")
