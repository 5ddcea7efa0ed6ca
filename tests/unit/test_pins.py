"""Pins: what people want kept is kept, within a bound, also after a restart."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from baton.v1 import store_pb2
from services.kv_store import pinfile, report
from services.kv_store.pins import PINS_MAX, PinTable
from services.ops.errors import InvalidRequest, NeverFits, Overloaded
from tests.support.store_actors import tokens_of
from tests.support.store_world import StoreWorld

A, B, C = b"a" * 16, b"b" * 16, b"c" * 16


@pytest.fixture
def world(tmp_path: Path) -> Iterator[StoreWorld]:
    with StoreWorld(tmp_path) as world:
        yield world


def cache(world: StoreWorld, family: int, prompt: int) -> None:
    request_id = world.open(family, prompt, 0)
    world.compute(request_id, prompt + 1)
    world.release(request_id)


def pressure(world: StoreWorld) -> None:
    """Somebody wants every block there is."""
    blocks = world.store.begin_fill(10_000, [])
    world.check()
    world.store.end_fill([], blocks, [])


def test_a_pinned_prefix_is_not_evicted(world: StoreWorld) -> None:
    """The others are; unpinned, it is like them."""
    cache(world, 0, 192)
    cache(world, 1, 192)
    world.pin("system", 0, 3)
    pressure(world)
    index = world.store.state.index
    assert set(index.blocks) == set(world.pins["system"])
    world.unpin("system")
    pressure(world)
    assert not len(index)
    world.end()


def test_a_pin_holds_for_what_comes_later(world: StoreWorld) -> None:
    """It names the prefix, not the blocks that happen to be cached."""
    world.pin("system", 0, 2)
    cache(world, 0, 192)
    pressure(world)
    assert len(world.store.state.index) == 2
    [pin] = report.pages(world.store, "").pins
    assert (pin.name, pin.blocks, pin.cached_blocks) == ("system", 2, 2)


def test_pins_survive_a_restart(world: StoreWorld) -> None:
    """So does what they keep."""
    world.pin("system", 0, 2)
    cache(world, 0, 192)
    world.restart()
    world.check()
    pressure(world)
    assert len(world.store.state.index) == 2
    world.end()


def test_pins_are_bounded(world: StoreWorld) -> None:
    """A refused pin changes nothing; the same keys under two names count once."""
    most = world.store.arena.plan.blocks // 4
    world.pin("a", 0, most)
    world.pin("b", 0, most)
    with pytest.raises(Overloaded, match="pins_max_bytes"):
        world.pin("c", 1, 1)
    world.check()
    world.pin("a", 0, 1)
    world.unpin("b")
    world.pin("c", 1, most - 1)
    world.check()


def test_what_fits_only_without_the_pins_is_refused(world: StoreWorld) -> None:
    """Waiting would not help; with room that others hold for now it would."""
    world.pin("system", 0, 2)
    cache(world, 0, 192)
    total = world.store.arena.plan.blocks
    wish = world.wish(1, 64, (total - 1) * 64 + 1)
    with pytest.raises(NeverFits, match=f"{total} blocks wanted, {total - 2} of {total}"):
        world.store.open(wish)
    held = world.store.begin_fill(total, [])
    wish.max_new_tokens = 64 * 3
    with pytest.raises(Overloaded):
        world.store.open(wish)
    world.store.end_fill([], held, [])
    assert world.store.open(wish).cached_tokens == 0


def test_names_and_lengths_are_checked(world: StoreWorld) -> None:
    """Each field by its name."""
    ids = tokens_of(0, 64).tolist()
    for name, tokens, field in (
        ("", ids, "name"),
        ("x" * 65, ids, "name"),
        ("x", ids[:63], "token_ids"),
    ):
        with pytest.raises(InvalidRequest, match=f"^{field}: "):
            world.store.pin(store_pb2.PinRequest(name=name, token_ids=tokens))
    assert not world.store.unpin("nobody's")
    world.check()


def test_there_are_not_too_many_names() -> None:
    """One that is there already may always be changed."""
    pins = PinTable(8)
    for n in range(PINS_MAX):
        pins.pin(str(n), [A])
    with pytest.raises(Overloaded, match="name: "):
        pins.pin("more", [A])
    pins.pin("0", [B])
    pins.check_invariants()
    assert B in pins
    assert C not in pins


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"fingerprint": "f"}', '{"fingerprint": "f", "pins": {"a": ["zz"]}}']
)
def test_a_damaged_file_is_no_pins(tmp_path: Path, text: str) -> None:
    """The store starts all the same."""
    path = tmp_path / "pins.json"
    path.write_text(text)
    assert not pinfile.load(path, "f", 8).names


def test_pins_of_another_model_do_not_count(tmp_path: Path) -> None:
    """Their keys mean nothing here."""
    path, pins = tmp_path / "pins.json", PinTable(8)
    pins.pin("a", [A, B])
    pinfile.save(path, "f", pins)
    assert pinfile.load(path, "f", 8).names == {"a": (A, B)}
    assert not pinfile.load(path, "g", 8).names
    assert not pinfile.load(path, "f", 1).names, "more than may be pinned now"
