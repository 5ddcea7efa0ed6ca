"""What counting alone achieves: unigram and Kneser-Ney losses on the same tokens as the model's.

Perplexity and bits per byte are computed here, for these baselines and for the model alike.
"""

from __future__ import annotations

import math

import numpy as np

from pico import Floats, Tokens
from pico.corpus import Corpus


def kneser_ney_losses(train: Tokens, stream: Tokens, order: int, vocab_size: int) -> Floats:
    """Nats for each token of `stream` but the first, under interpolated Kneser-Ney.

    One discount for each order, n1 / (n1 + 2 n2) (Ney, Essen and Kneser, 1994). A gram is one
    integer, the oldest token in its highest digit: `gram // vocab` is its context and
    `gram % vocab**(order - 1)` is the gram without its oldest token.
    """
    assert vocab_size**order < 2**62
    padding = np.zeros(order - 2, dtype=np.int64)
    stream = np.concatenate([padding, stream])  # as if separators came before the stream
    grams, counts = np.unique(_grams(train, order, vocab_size), return_counts=True)
    levels = [(grams, counts)]
    for lower in range(order - 1, 0, -1):  # how many different tokens precede the shorter gram
        grams, counts = np.unique(grams % vocab_size**lower, return_counts=True)
        levels.append((grams, counts))
    queries = _grams(stream, order, vocab_size)
    probability = np.full(len(queries), 1.0 / vocab_size)
    for length, (grams, counts) in enumerate(reversed(levels), start=1):
        query = queries % vocab_size**length
        probability = _interpolate(grams, counts, query, vocab_size, probability)
    losses: Floats = -np.log(probability)
    return losses


def _grams(stream: Tokens, order: int, vocab_size: int) -> Tokens:
    count = len(stream) - order + 1
    grams = np.zeros(count, dtype=np.int64)
    for offset in range(order):
        grams = grams * vocab_size + stream[offset : offset + count]
    return grams


def _interpolate(
    grams: Tokens, counts: Tokens, query: Tokens, vocab_size: int, lower: Floats
) -> Floats:
    """Discounted counts of one order, the discounted mass spread as `lower` says."""
    contexts, starts = np.unique(grams // vocab_size, return_index=True)
    totals = np.add.reduceat(counts, starts)
    kinds = np.diff(np.append(starts, len(grams)))
    singles, doubles = int((counts == 1).sum()), int((counts == 2).sum())
    discount = singles / (singles + 2 * doubles) if singles else 0.5
    count = _look_up(grams, counts, query)
    total = _look_up(contexts, totals, query // vocab_size)
    kind = _look_up(contexts, kinds, query // vocab_size)
    mixed = np.maximum(count - discount, 0.0) + discount * kind * lower
    return np.where(total > 0, mixed / np.maximum(total, 1), lower)


def _look_up(keys: Tokens, values: Tokens, query: Tokens) -> Tokens:
    """The value at each key, 0 where it is missing; `keys` are sorted."""
    index = np.minimum(np.searchsorted(keys, query), len(keys) - 1)
    return np.where(keys[index] == query, values[index], 0)


def unigram_losses(train: Tokens, stream: Tokens, vocab_size: int) -> Floats:
    """Nats for each token of `stream` but the first, under add-one unigram counts."""
    counts = np.bincount(train, minlength=vocab_size) + 1
    losses: Floats = -np.log(counts / counts.sum())[stream[1:]]
    return losses


def summarise(losses: Floats, text_bytes: int) -> dict[str, float]:
    """Perplexity for each token, and bits for each byte of the text."""
    bits = float(losses.sum()) / math.log(2) / text_bytes
    return {"perplexity": math.exp(float(losses.mean())), "bits_per_byte": bits}


def baselines(corpus: Corpus, vocab_size: int) -> dict[str, dict[str, float]]:
    train = np.concatenate(corpus.train_documents)
    rows = {"unigram": unigram_losses(train, corpus.held_out, vocab_size)}
    for order in (3, 5):
        rows[f"{order}-gram"] = kneser_ney_losses(train, corpus.held_out, order, vocab_size)
    return {name: summarise(losses, corpus.held_out_bytes) for name, losses in rows.items()}
