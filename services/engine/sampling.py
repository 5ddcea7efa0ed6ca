"""From logits to a token: the one sampler of prefill and decode, a pure function of its arguments.

The draw depends on (seed, position) alone, through Philox4x32-10 (Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", SC 2011) with the seed as key and the position as counter. So a
request that moves to another process, or is replayed, draws the same tokens, and no state travels.
Philox in plain Python integers costs about 5 us, half of building `numpy.random.Philox`, and any
other language can repeat it; a plain splitmix64 would be faster still, but there the streams of two
seeds are one stream at two offsets.

Bit-identical for identical logits on machines of one instruction set: numpy's float64 `exp` may
differ in its last bit between instruction sets. Knows nothing of models, requests or processes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.engine.errors import NumericsError

_MASK32 = (1 << 32) - 1


@dataclass(frozen=True)
class SamplingParams:
    """How a token is chosen. Ranges as in `baton.v1.SamplingParams`; ValueError names the field.

    temperature 0 is greedy and ignores the filters. top_k 0, top_p 1 and min_p 0 are off. Fractions
    are float32, as on the wire: whoever asks for 0.96 gets the same tokens with and without one.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    logprobs: bool = False

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p"):
            object.__setattr__(self, name, float(np.float32(getattr(self, name))))
        if not 0 <= self.temperature <= 10:
            raise ValueError(f"temperature: {self.temperature} is not in [0, 10]")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: {self.top_p} is not in (0, 1]")
        if self.top_k < 0:
            raise ValueError(f"top_k: {self.top_k} is below 0")
        if not 0 <= self.min_p < 1:
            raise ValueError(f"min_p: {self.min_p} is not in [0, 1)")
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed: {self.seed} is not an unsigned 64-bit integer")


def sample(logits: NDArray[np.float32], params: SamplingParams, position: int) -> tuple[int, float]:
    """The token at `position` and its log probability (0.0 unless `params.logprobs`).

    logits: float32[vocab], read only; -inf forbids a token. position: of the token to be chosen.
    The filters apply in this order, each to what the one before has left:

        temperature   logits / temperature
        top_k         the k most probable
        top_p         the smallest set whose probabilities, renormalised, reach top_p
        min_p         those at least min_p times as probable as the most probable

    Equal logits rank by token id, lower first. The draw is by inverse CDF in float64 over the
    tokens left, in order of their ids, so filters that remove nothing change nothing. The log
    probability is of the model's own distribution, before temperature and filters.
    Raises NumericsError if a logit is not a number or none is finite.
    """
    assert logits.ndim == 1
    assert logits.dtype == np.float32
    best = int(logits.argmax())  # the first of equals; a NaN counts as the largest
    if not math.isfinite(logits[best]):
        raise NumericsError(f"logits: {logits[best]} at token {best}")
    token = best
    if params.temperature > 0:
        token = _draw(logits, float(logits[best]), params, uniform(params.seed, position))
    return token, _logprob(logits, token, best) if params.logprobs else 0.0


def uniform(seed: int, position: int) -> float:
    """A float64 in [0, 1) with 53 random bits, from (seed, position) alone."""
    assert 0 <= position < 1 << 64
    words = philox4x32((position & _MASK32, position >> 32, 0, 0), (seed & _MASK32, seed >> 32))
    return ((words[0] << 32 | words[1]) >> 11) * 2.0**-53


def philox4x32(
    counter: tuple[int, int, int, int], key: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Philox4x32-10: four random 32-bit words from a 128-bit counter and a 64-bit key."""
    a, b, c, d = counter
    left, right = key
    for _ in range(10):
        first, second = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b = (second >> 32) ^ b ^ left, second & _MASK32
        c, d = (first >> 32) ^ d ^ right, first & _MASK32
        left, right = (left + 0x9E3779B9) & _MASK32, (right + 0xBB67AE85) & _MASK32
    return a, b, c, d


def _draw(logits: NDArray[np.float32], best: float, params: SamplingParams, u: float) -> int:
    """Filters, then the first token whose cumulative weight exceeds u times the total."""
    ids: NDArray[np.intp] | None = None  # in ascending order; None: every token
    if 0 < params.top_k < logits.size:
        ids = _top_k(logits, params.top_k)
        logits = logits[ids]
    weights = _weights(logits, best, params.temperature)
    if params.top_p < 1:
        kept = _nucleus(logits, weights, params.top_p)
        ids, weights = kept if ids is None else ids[kept], weights[kept]
    weights[weights < params.min_p] = 0.0  # the most probable token weighs 1
    cumulative = np.cumsum(weights)
    total = cumulative[-1]
    index = int(np.searchsorted(cumulative, u * total, side="right"))
    if index == cumulative.size:  # u * total was rounded up to the total
        index = int(np.searchsorted(cumulative, total))
    return index if ids is None else int(ids[index])


def _weights(logits: NDArray[np.float32], best: float, temperature: float) -> NDArray[np.float64]:
    """Probabilities as multiples of the largest: exp((logit - best) / temperature)."""
    scaled = logits.astype(np.float64)
    scaled -= best
    with np.errstate(over="ignore"):  # a tiny temperature sends all but the best to -inf
        scaled /= temperature
    return np.exp(scaled, out=scaled)


def _top_k(logits: NDArray[np.float32], top_k: int) -> NDArray[np.intp]:
    """The ids of the `top_k` most probable tokens, ascending; of equals the lower ids."""
    least = np.partition(logits, logits.size - top_k)[logits.size - top_k]
    above = np.flatnonzero(logits > least)
    equal = np.flatnonzero(logits == least)[: top_k - above.size]
    return np.sort(np.concatenate((above, equal)))


def _nucleus(
    logits: NDArray[np.float32], weights: NDArray[np.float64], top_p: float
) -> NDArray[np.intp]:
    """Ascending indices of the smallest set of the heaviest that reaches top_p of the total.

    Tokens below (1 - top_p) of the mean weight sum to less than 1 - top_p of the total together,
    so none of them can be needed, and only the rest (half the bound, for rounding) is sorted.
    """
    total = np.cumsum(weights)[-1]
    likely = np.flatnonzero(weights >= 0.5 * (1 - top_p) * total / weights.size)
    ranked = likely[_ranking(logits[likely])]
    cumulative = np.cumsum(weights[ranked])
    return np.sort(ranked[: int(np.searchsorted(cumulative, top_p * total)) + 1])


def _ranking(logits: NDArray[np.float32]) -> NDArray[np.intp]:
    """Indices from the largest logit to the smallest, of equals the lower index first.

    A float's bits, with the sign resolved, sort as an unsigned integer; the index in the low half
    makes every key unique. So numpy's vectorised, unstable sort gives the stable order.
    """
    bits = (logits + np.float32(0)).view(np.uint32)  # + 0 turns -0.0 into 0.0
    descending = np.where(bits >> 31, bits, ~bits & np.uint32(0x7FFFFFFF))
    keys = descending.astype(np.uint64) << np.uint64(32)
    keys |= np.arange(logits.size, dtype=np.uint64)
    keys.sort()
    return (keys & np.uint64(_MASK32)).astype(np.intp)


def _logprob(logits: NDArray[np.float32], token: int, best: int) -> float:
    normaliser = math.log(np.cumsum(_weights(logits, float(logits[best]), 1.0))[-1])
    return float(logits[token]) - float(logits[best]) - normaliser
