"""Text as it is shown, token by token: stop strings are never seen, nothing else is lost."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.scheduler.text import TextStream


def show(pieces: list[str], stops: list[str], last: int | None = None) -> tuple[list[str], bool]:
    """What each piece shows until the stream stops; `last` is the token that ends it, by default the
    final one."""
    stream = TextStream(lambda token: pieces[token], stops)
    last = len(pieces) - 1 if last is None else last
    shown = []
    for token in range(len(pieces)):
        shown.append(stream.push(token, token == last))
        if stream.stopped:
            break
    return shown, stream.stopped


def test_without_stops_every_token_shows_its_piece() -> None:
    """Nothing is held back, and an empty piece shows nothing."""
    assert show(["a", "", "bc", "ü"], []) == (["a", "", "bc", "ü"], False)


def test_a_stop_string_is_not_shown() -> None:
    """Neither it nor what follows it in the same token."""
    assert show(["one ", "two STOP three"], ["STOP"]) == (["one ", "two "], True)


def test_a_stop_string_may_lie_over_token_borders() -> None:
    """Its beginning is held back until it is certain."""
    assert show(["ab", "cS", "T", "O", "Pd"], ["STOP"]) == (["ab", "c", "", "", ""], True)


def test_what_turns_out_to_be_no_stop_is_shown_then() -> None:
    """Only as much is held as can still become a stop string."""
    assert show(["aS", "T", "A", "STSTOP"], ["STOP"]) == (["a", "", "STA", "ST"], True)
    assert show(["xSTO", "STO", "y"], ["STOP"]) == (["x", "STO", "STOy"], False)


def test_the_last_token_holds_nothing_back() -> None:
    """A stream that ends in half a stop string shows it."""
    assert show(["abST"], ["STOP"]) == (["abST"], False)
    assert show(["abS", "TO"], ["STOP"]) == (["ab", "STO"], False)


def test_the_earliest_of_several_stops_counts() -> None:
    """By where it begins, among those that a token completes."""
    assert show(["a--b##"], ["##", "--"]) == (["a"], True)
    assert show(["abcd"], ["bc", "abc"]) == ([""], True)


def test_the_longest_candidate_is_held() -> None:
    """Two stops share a beginning: what may be the longer one is held for it."""
    assert show(["a", "b", "c", "x"], ["abcd", "bce"]) == (["", "", "", "abcx"], False)
    assert show(["ab", "ce"], ["abcd", "bce"]) == (["", "a"], True)


def test_a_stop_of_one_character_is_never_held() -> None:
    """It is there or it is not."""
    assert show(["ab", "c.d"], ["."]) == (["ab", "c"], True)


small = st.text("abc", max_size=3)


some_stops = st.lists(st.text("abc", min_size=1, max_size=4), max_size=3)


@given(st.lists(small, min_size=1, max_size=12), some_stops)
def test_what_is_shown_is_the_text_before_the_first_stop(
    pieces: list[str], stops: list[str]
) -> None:
    """Against the definition: after each token look at the whole text; stop with the first token that
    completes a stop string, at the one that begins first. Before that everything is shown but the
    longest end that may still become one."""
    shown, stopped = show(pieces, stops)
    whole = ""
    for token, piece in enumerate(pieces):
        whole += piece
        starts = [whole.find(stop) for stop in stops if stop in whole]
        so_far = "".join(shown[: token + 1])
        if starts:
            assert stopped
            assert len(shown) == token + 1
            assert so_far == whole[: min(starts)]
            return
        ends = [s[:size] for s in stops for size in range(len(s)) if whole.endswith(s[:size])]
        held = max(map(len, ends), default=0) if token < len(pieces) - 1 else 0
        assert so_far == whole[: len(whole) - held]
    assert not stopped
