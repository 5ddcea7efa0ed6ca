"""Compares what a client saw with the undisturbed run. Pure: it knows no cluster and no clock."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

LENGTH = "FINISH_REASON_LENGTH"


@dataclass(frozen=True)
class Verdict:
    """Counts of what must not happen; verdicts add up."""

    lost: int = 0  # indexes that never came
    duplicated: int = 0  # events for an index that had come already
    mismatched: int = 0  # events whose token is not the undisturbed run's, or that it has not got
    disordered: int = 0  # events that came before an earlier index
    bad_endings: int = 0  # streams without exactly one final event, or with the wrong one
    broken_streams: int = 0  # whose call ended early although its scheduler lived
    prompt_tokens_recomputed: int = 0
    leaked_pages: int = 0
    wrong_answers: int = 0  # streams that ended well with other tokens than the undisturbed run's
    leaked_disk_files: int = 0  # half-written ones that stay
    epochs_lost: int = 0  # streams that were taken over although nobody could succeed their decode

    @property
    def clean(self) -> bool:
        return not any(dataclasses.astuple(self))

    def __add__(self, other: Verdict) -> Verdict:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Verdict(*(a + b for a, b in pairs))

    def story(self) -> str:
        """What is not zero, for people."""
        wrong = [f"{name} {count}" for name, count in dataclasses.asdict(self).items() if count]
        return ", ".join(wrong) or "clean"


def judge_stream(
    seen: Sequence[tuple[int, int]], endings: Sequence[str], expected: Sequence[int]
) -> Verdict:
    """`seen`: (index, token id) in order of arrival; `endings`: finish reasons or failure codes."""
    had: set[int] = set()
    duplicated = mismatched = disordered = 0
    for index, token in seen:
        duplicated += index in had
        disordered += index not in had and index < max(had, default=-1)
        mismatched += index >= len(expected) or expected[index] != token
        had.add(index)
    lost = len(set(range(len(expected))) - had)
    well = list(endings) == [LENGTH]
    wrong = well and (lost > 0 or mismatched > 0)
    return Verdict(
        lost, duplicated, mismatched, disordered, int(not well), wrong_answers=int(wrong)
    )


@dataclass(frozen=True)
class PromptWork:
    """What the scheduler says about prompt tokens, over one run."""

    computed: int  # by prefill
    recomputed: int  # its own count
    usage_recomputed: int  # what the requests' final events say, summed
    due: int  # tokens that prefill had to compute once: prompts without what was cached
    done_by_the_dead: int = 0  # of them, complete before the prefill that reports no more died


def recomputed(work: PromptWork) -> int:
    """Prompt tokens computed twice, by whichever of the three accounts says most."""
    again = work.computed + work.done_by_the_dead - work.due
    return max(work.recomputed, work.usage_recomputed, again)


def stall_s(times: Sequence[float], crash_at: float, *, first_too: bool = False) -> float | None:
    """The longest pause between two tokens that ends after the crash; None when it missed the
    stream: nothing had come before it, or nothing came after. With `first_too`, a stream that had
    no token yet has paused from the crash to its first one."""
    if first_too and times and times[0] > crash_at:
        return times[0] - crash_at
    gaps = [b - a for a, b in itertools.pairwise(times) if b > crash_at]
    return max(gaps) if gaps and times[0] <= crash_at else None
