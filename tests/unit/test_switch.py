"""The switch between simulated hosts: what it does to a frame, without a cable and without a clock."""

from __future__ import annotations

from baton.chaos.switch import VNET_BYTES, Fabric

A, B = b"\2\0\0\0\0\1", b"\2\0\0\0\0\2"
BROADCAST = b"\xff" * 6


def fabric(**settings: object) -> Fabric:
    return Fabric(("a", "b", "c"), {A: "a", B: "b"}, **settings)  # type: ignore[arg-type]


def frame(target: bytes) -> bytes:
    return bytes(VNET_BYTES) + target + b"payload"


def sent(switch: Fabric, now: float) -> list[str]:
    cables: list[str] = []
    switch.due(now, lambda cable, _: cables.append(cable))
    return cables


def test_a_frame_goes_where_it_is_addressed_and_a_broadcast_to_all_others() -> None:
    """Never back to where it came from."""
    switch = fabric()
    switch.take(0.0, "a", frame(B))
    assert sent(switch, 0.0) == ["b"]
    switch.take(0.0, "a", frame(BROADCAST))
    assert sent(switch, 0.0) == ["b", "c"]


def test_delay_holds_a_frame_and_keeps_the_order() -> None:
    """Nothing before its time; the caller learns how long it may sleep."""
    switch = fabric(delay_s=0.02)
    switch.take(1.0, "a", frame(B))
    assert sent(switch, 1.019) == []
    assert switch.due(1.015, lambda *_: None) is not None
    switch.take(1.01, "b", frame(A))
    assert sent(switch, 1.03) == ["b", "a"]
    assert switch.due(2.0, lambda *_: None) is None


def test_a_cut_drops_what_is_in_flight_too_and_in_one_direction_alone() -> None:
    """A partition is silence at once, not after the frames under way."""
    switch = fabric(delay_s=0.02)
    switch.take(0.0, "a", frame(B))
    switch.command({"cut": [["a", "b"]]})
    switch.take(0.0, "b", frame(A))
    assert sent(switch, 0.1) == ["a"]
    assert switch.lost == 1
    switch.command({"cut": []})
    switch.take(0.2, "a", frame(B))
    assert sent(switch, 0.3) == ["b"]


def test_losses_are_drawn_from_the_seed() -> None:
    """The same seed loses the same frames; about the share that was asked for."""

    def survivors(seed: int) -> list[int]:
        switch = fabric(seed=seed, loss=0.05)
        return [n for n in range(2000) if switch.take(n, "a", frame(B)) or sent(switch, n)]

    assert survivors(1) == survivors(1) != survivors(2)
    assert 1850 < len(survivors(1)) < 1950
