"""The chaos judge: it must see each way in which a stream can be spoiled, and nothing else."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.chaos import command, full_disk, network, report
from baton.chaos.corrupt import WHERE
from baton.chaos.failures import GUARDS_OF_ALL, ROWS, row_of, schedule_rows
from baton.chaos.judge import LENGTH, PromptWork, Verdict, judge_stream, recomputed, stall_s
from baton.chaos.plan import PLANS, draw, schedule
from baton.chaos.report import Result, percentile
from baton.chaos.scenario import Ask, Crash, Scenario
from baton.chaos.setups import SETUPS

EXPECTED = [11, 22, 33, 44]
WHOLE = list(enumerate(EXPECTED))
CORPUS = list(range(3000))
RECORDINGS = sorted((Path(__file__).parent.parent / "chaos").glob("*.json"))


def test_an_undisturbed_stream_is_clean() -> None:
    """Every index once, in order, with the reference's token, then one final event."""
    assert judge_stream(WHOLE, [LENGTH], EXPECTED).clean


@pytest.mark.parametrize("missing", range(4))
def test_a_lost_token_is_seen(missing: int) -> None:
    """An index that never came is lost, wherever it is, and whatever came after it."""
    seen = [pair for pair in WHOLE if pair[0] != missing]
    assert judge_stream(seen, [LENGTH], EXPECTED) == Verdict(lost=1, wrong_answers=1)


@pytest.mark.parametrize("again", range(4))
def test_a_duplicate_is_seen(again: int) -> None:
    """An index that comes twice is a duplicate, even with an equal token."""
    seen = [*WHOLE, WHOLE[again]]
    assert judge_stream(seen, [LENGTH], EXPECTED) == Verdict(duplicated=1)


def test_a_mismatch_is_seen() -> None:
    """A token that the undisturbed run has not got at that index."""
    seen = [*WHOLE[:2], (2, 99), WHOLE[3]]
    assert judge_stream(seen, [LENGTH], EXPECTED) == Verdict(mismatched=1, wrong_answers=1)


def test_a_token_too_many_is_a_mismatch() -> None:
    """An index beyond the undisturbed run's end."""
    assert judge_stream([*WHOLE, (4, 55)], [LENGTH], EXPECTED) == Verdict(
        mismatched=1, wrong_answers=1
    )


def test_a_late_index_is_seen() -> None:
    """Tokens that come out of order are neither lost nor duplicated, and wrong all the same."""
    seen = [WHOLE[0], WHOLE[2], WHOLE[1], WHOLE[3]]
    assert judge_stream(seen, [LENGTH], EXPECTED) == Verdict(disordered=1)


@pytest.mark.parametrize(
    "endings", [[], [LENGTH, LENGTH], ["FINISH_REASON_CANCELLED"], ["INTERNAL"]]
)
def test_a_bad_ending_is_seen(endings: list[str]) -> None:
    """No final event, two of them, or one that says something else."""
    assert judge_stream(WHOLE, endings, EXPECTED) == Verdict(bad_endings=1)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12))
def test_events_add_up(indexes: list[int]) -> None:
    """Of the events of right tokens, each is the first of its index or a duplicate."""
    verdict = judge_stream([(i, EXPECTED[i]) for i in indexes], [LENGTH], EXPECTED)
    assert verdict.mismatched == 0
    assert len(indexes) - verdict.duplicated == len(EXPECTED) - verdict.lost


@pytest.mark.parametrize(
    ("work", "count"),
    [
        (PromptWork(100, 0, 0, due=100), 0),
        (PromptWork(100, 7, 0, due=100), 7),
        (PromptWork(100, 0, 8, due=100), 8),
        (PromptWork(109, 0, 0, due=100), 9),
        (PromptWork(60, 0, 0, due=100), 0),
        (PromptWork(60, 0, 0, due=100, done_by_the_dead=40), 0),
        (PromptWork(60, 0, 0, due=100, done_by_the_dead=64), 24),
    ],
)
def test_recomputation_is_seen_by_any_account(work: PromptWork, count: int) -> None:
    """The scheduler's counter, the final events, or more prefill than there were new tokens."""
    assert recomputed(work) == count


def test_a_stall_is_the_longest_pause_that_ends_after_the_crash() -> None:
    """Pauses that were over before it, and streams that it missed, do not count."""
    assert stall_s([0.0, 5.0, 5.1, 6.1, 6.2], crash_at=5.15) == pytest.approx(1.0)
    assert stall_s([0.0, 0.1], crash_at=0.2) is None
    assert stall_s([0.3, 0.9], crash_at=0.2) is None
    assert stall_s([], crash_at=0.2) is None


def test_a_stream_without_a_token_pauses_from_the_crash_on() -> None:
    """Where the first token itself was held up, its wait counts."""
    assert stall_s([0.5, 0.6], 0.2, first_too=True) == pytest.approx(0.3)
    assert stall_s([0.1, 0.6], 0.2, first_too=True) == pytest.approx(0.5)


def test_a_wrong_answer_is_one_that_ended_well() -> None:
    """Tokens that differ in a stream that broke off are mismatched; only a whole answer is wrong."""
    assert judge_stream([(0, 99)], ["INTERNAL"], EXPECTED).wrong_answers == 0
    assert judge_stream(WHOLE, [LENGTH], [*EXPECTED[:3], 99]).wrong_answers == 1


def test_percentiles_are_values_that_occurred() -> None:
    """The nearest rank: no interpolation between two measured pauses."""
    assert percentile(range(1, 101), 50) == 50
    assert percentile(range(1, 101), 99) == 99
    assert percentile([3.0], 99) == 3.0
    assert percentile([], 50) is None


def result(name: str, *stalls: float, **more: object) -> Result:
    return dataclasses.replace(Result(name, f"{name}-1-0", Verdict(), stalls, 4, 1, True), **more)  # type: ignore[arg-type]


def test_a_run_without_its_crash_is_a_failure() -> None:
    """A clean stream that nothing disturbed proves nothing."""
    assert result("mid-layer").good
    assert not result("mid-layer", reached=False).good
    assert not result("mid-layer", trouble="8 pages in use").good
    assert not result("mid-layer", verdict=Verdict(lost=1)).good


def test_kills_that_miss_are_reported() -> None:
    """Most random kills must have hit a running stream."""
    hit, miss = result("random", 30.0), result("random")
    assert not report.missed([hit, miss])
    assert report.missed([hit, miss, miss]) == "2 of 3 random kills hit no stream"


def test_pauses_are_told_apart() -> None:
    """The headline is of runs in which one decode died; beside it, the same runs with the prompt
    computed again."""
    runs = [
        dataclasses.replace(result("random", 30.0), label="random-1-0"),
        dataclasses.replace(result("random", 50.0), label="random-1-1"),
        result("decode+store", 900.0, only_a_decode=False),
    ]
    figures = report.paired(runs, [dataclasses.replace(runs[1], stalls_ms=(400.0, 410.0))])
    assert figures["stall_ms"] == {"p50": 30.0, "p99": 50.0, "max": 50.0, "streams": 2}
    assert figures["reprefill_ms"]["p50"] == 400.0
    assert figures["stall_ms_of_the_same_runs"]["p50"] == 50.0
    assert figures["stall_ms_when_more_dies"]["max"] == 900.0


# --- scenarios ---


@pytest.mark.parametrize("name", PLANS)
def test_a_scenario_survives_its_recording(name: str, tmp_path: Path) -> None:
    """What is read back is what was written, to the last token id."""
    scenario = draw(name, 7, 3, CORPUS)
    assert Scenario.read(scenario.write(tmp_path)) == scenario


@pytest.mark.parametrize("name", PLANS)
def test_a_scenario_comes_from_its_seed_alone(name: str) -> None:
    """Equal seeds give equal scenarios, other seeds and other runs others."""
    assert draw(name, 7, 3, CORPUS) == draw(name, 7, 3, CORPUS)
    assert draw(name, 7, 3, CORPUS) != draw(name, 8, 3, CORPUS)
    assert draw(name, 7, 3, CORPUS).requests != draw(name, 7, 4, CORPUS).requests


def test_random_scenarios_mix_greedy_and_sampled_streams() -> None:
    """4 to 6 streams at once, some of each kind, in every run."""
    for run in range(50):
        asks = draw("random", 1, run, CORPUS).requests
        assert 4 <= len(asks) <= 6
        assert {ask.temperature > 0 for ask in asks} == {True, False}


@pytest.mark.parametrize("number", [63, 64, 65])
def test_token_scenarios_reach_page_edges(number: int) -> None:
    """The row that gives token i lies at prompt + i - 1: first, last and second of a page."""
    scenario = draw(f"token-{number}", 1, 0, CORPUS)
    rows = {(len(ask.token_ids) + number - 1) % 64 for ask in scenario.requests}
    assert {63, 0, 1} <= rows
    assert all(ask.max_tokens > number for ask in scenario.requests)


def test_every_row_is_performed_as_often_as_asked() -> None:
    """And each of its scenarios in turn, so that many seeds perform them all."""
    order = schedule_rows(tuple(ROWS), 20, 5)
    assert order == schedule_rows(tuple(ROWS), 20, 5)
    assert {name: [row_of(s) for s in order].count(name) for name in ROWS} == dict.fromkeys(
        ROWS, 20
    )
    assert set(order) == {name for row in ROWS.values() for name in row.scenarios}


def test_every_plan_stands_for_a_row() -> None:
    """A scenario that can be drawn is in the table, and its cluster is known."""
    assert {row_of(name) for name in [*PLANS, *WHERE, full_disk.ROW]} == set(ROWS)
    assert {draw(name, 1, 0, CORPUS).setup for name in PLANS} <= set(SETUPS)


def test_every_zero_of_the_table_has_a_control() -> None:
    """Some guard, switched off, must move it; three controls are of other kinds than a crash."""
    of_their_own = {"prompt_tokens_recomputed", "wrong_answers", "leaked_disk_files"}
    crashes = {guard.counter or name for name, guard in GUARDS_OF_ALL.items()}
    assert crashes | of_their_own == set(report.ZEROS)
    assert {guard.scenario for guard in GUARDS_OF_ALL.values()} <= set(PLANS)


def test_a_row_that_cannot_be_had_is_skipped_with_its_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Never in silence: without namespaces the table says why it has no hosts."""
    monkeypatch.setattr(network, "why_not", lambda: "network namespaces need root")
    assert command.skipped_rows() == {"hosts": "network namespaces need root"}
    monkeypatch.setattr(network, "why_not", lambda: "")
    assert command.skipped_rows() == {}


def test_a_schedule_holds_every_name_and_fills_with_random_moments() -> None:
    """And depends on nothing but the seed."""
    names = ["random", "takeover", "mid-layer"]
    order = schedule(names, 10, 5)
    assert order == schedule(names, 10, 5)
    assert sorted(order) == sorted([*names, *["random"] * 7])


@pytest.mark.parametrize(
    ("crash", "field"),
    [
        ({"trigger": "sometime"}, "trigger"),
        ({"trigger": "token"}, "index"),
        ({"trigger": "placed", "victim": "me"}, "victim"),
        ({"trigger": "placed", "point": "decode.attached"}, "point"),
        ({"trigger": "failpoint"}, "point"),
        ({"trigger": "placed", "signal": "CUT"}, "signal"),
        ({"trigger": "placed", "victim": "link"}, "signal"),
        ({"trigger": "placed", "between": "prefill/decode"}, "between"),
        ({"trigger": "placed", "between": "here/there"}, "between"),
        ({"trigger": "failpoint", "point": "decode.attached", "signal": "LOSE"}, "signal"),
        ({"trigger": "placed", "victim": "link", "signal": "CUT"}, "pause_ms"),
    ],
)
def test_a_crash_that_makes_no_sense_names_its_field(crash: dict[str, str], field: str) -> None:
    """A recording that was edited by hand fails before anything is started."""
    with pytest.raises(ValueError, match=f"^{field}: "):
        Crash(**crash)  # type: ignore[arg-type]


def test_a_recording_of_another_format_is_refused() -> None:
    """Instead of being misread."""
    text = Scenario("random", 1, 0, (Ask((1,), 2),), Crash("token", 0, 0)).to_json()
    with pytest.raises(ValueError, match=r"^format: "):
        Scenario.from_json(text.replace('"format": 1', '"format": 2'))


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_the_kept_recordings_can_be_read(path: Path) -> None:
    """Each is named after the scenario in it."""
    assert Scenario.read(path).label == path.stem
