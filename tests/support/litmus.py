"""The other process of the two-process tests: a child that maps the same file and plays one part."""

from __future__ import annotations

import mmap
import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from services._native import Words

PAYLOAD_WORDS = 7
PARTNER_S = 30.0  # how long one side waits for the other before the test has failed

Part = Callable[[Path, int], None]


def shared_file(path: Path, words: int) -> Path:
    """A file of `words` zeroed 64-bit words."""
    path.write_bytes(bytes(8 * words))
    return path


def map_file(path: Path) -> mmap.mmap:
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), 0)


def map_words(path: Path) -> Words:
    """All words of the file, in this process's own mapping."""
    view = map_file(path)
    return Words(view, 0, len(view) // 8)


@contextmanager
def partner(part: Part, path: Path, number: int) -> Iterator[multiprocessing.process.BaseProcess]:
    """Runs `part(path, number)` in a fresh process; leaving waits for it and asserts that it ended
    well."""
    process = multiprocessing.get_context("spawn").Process(target=part, args=(path, number))
    process.start()
    try:
        yield process
        process.join(PARTNER_S)
        assert process.exitcode == 0, f"partner ended with {process.exitcode}"
    finally:
        process.kill()
        process.join()
        process.close()


def payload_of(mapping: mmap.mmap) -> NDArray[np.uint64]:
    """The plain words behind the flag word, PAYLOAD_WORDS for each round."""
    return np.ndarray((len(mapping) // 8 - 1,), np.uint64, mapping, 8)


def send_rounds(path: Path, rounds: int) -> None:
    """For each round: plain stores of the payload, then a release store of the flag."""
    mapping = map_file(path)
    flag, payload = Words(mapping, 0, 1), payload_of(mapping).reshape(-1, PAYLOAD_WORDS)
    for number in range(1, rounds + 1):
        payload[number - 1] = number
        flag.store(0, number)
        if number % 64 == 0 or number == rounds:
            flag.wake(0)
            os.sched_yield()


def increment(path: Path, times: int) -> None:
    """Word 0 by compare-and-swap, word 1 by `add`, once both sides are there (word 2)."""
    words = map_words(path)
    meet(words, 2)
    for turn in range(times):
        seen = words.load(0)
        while True:
            won, seen = words.cas(0, seen, seen + 1)
            if won:
                break
        words.add(1, 1)
        if turn % 50 == 0:
            os.sched_yield()


def meet(words: Words, at: int) -> None:
    """Returns when both processes have come here."""
    if words.add(at, 1) == 2:
        words.wake(at)
        return
    while (seen := words.load(at)) < 2:
        assert words.wait(at, seen, PARTNER_S) or words.load(at) == 2, "the other side never came"


def advance_until_last(path: Path, epochs: int) -> None:
    """A writer that owns whatever epoch it finds: it commits steps until it is fenced, notes in word
    `1 + epoch` how many commits were said to have succeeded, and goes on under the new epoch."""
    words = map_words(path)
    word, done = words.load(0), 0
    while word >> 32 < epochs:
        won, now = words.cas(0, word, word + 1)
        if won:
            done += 1
        else:
            words.store(1 + (word >> 32), done)
            done = 0
        word = now
        if word % 97 == 0:
            os.sched_yield()


def sleep_on(path: Path, seen: int) -> None:
    """Sleeps on word 0 while it is `seen`; word 1 says whether it was woken."""
    words = map_words(path)
    words.store(1, 1 + words.wait(0, seen, PARTNER_S))
