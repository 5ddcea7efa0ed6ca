"""The prefix index: the longest cached prefix, first come first kept, least recently used first out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.kv_store.index import PrefixIndex


def index_of(*names: str) -> PrefixIndex:
    index = PrefixIndex()
    for block, name in enumerate(names):
        assert index.add(name.encode(), block)
    return index


def chain(names: str) -> list[bytes]:
    return [name.encode() for name in names]


def test_the_longest_prefix_ends_at_the_first_gap() -> None:
    """A key behind a missing one is not part of the prefix, though it is there."""
    index = index_of("a", "b", "d")
    assert index.longest(chain("abcd")) == [0, 1]
    assert index.longest(chain("xab")) == []
    assert index.longest([]) == []


def test_the_first_block_of_a_key_stays() -> None:
    """A second block with the same content is refused and remains its owner's to free."""
    index = index_of("a")
    assert not index.add(b"a", 7)
    assert index.longest([b"a"]) == [0]
    assert 7 not in index
    assert len(index) == 1


def test_a_block_has_one_key() -> None:
    """Two keys for one block are our own mistake."""
    index = index_of("a")
    with pytest.raises(AssertionError):
        index.add(b"b", 0)


def test_what_is_removed_is_gone() -> None:
    """The key is free for another block, and the chain ends there."""
    index = index_of("a", "b")
    index.remove(0)
    assert index.longest(chain("ab")) == []
    assert 0 not in index
    assert index.add(b"a", 5)
    assert index.longest(chain("ab")) == [5, 1]


def test_the_oldest_use_goes_first() -> None:
    """Being found is a use; what may not be evicted is passed over."""
    index = index_of("a", "b", "c")
    assert index.oldest(lambda block: True) == 0
    index.longest([b"a"])
    index.check_invariants()
    assert index.oldest(lambda block: True) == 1
    assert index.oldest(lambda block: block != 1) == 2
    assert index.oldest(lambda block: False) is None


def test_the_end_of_a_prefix_goes_before_its_beginning() -> None:
    """A chain without its first block can never be found again."""
    index = index_of("a", "b", "c")
    index.longest(chain("abc"))
    assert list(index.blocks) == chain("cba")


def test_what_the_disk_lacks_is_known_in_the_order_of_use() -> None:
    """Until it has been written or has left; what was used since is not cold yet."""
    index = index_of("a", "b", "c")
    index.now = 5.0
    index.longest([b"a"])
    assert list(index.cold(4.9)) == [(b"b", 1), (b"c", 2)]
    assert list(index.cold(5.0)) == [(b"b", 1), (b"c", 2), (b"a", 0)]
    index.written(b"b")
    index.remove(2)
    assert list(index.cold(5.0)) == [(b"a", 0)]
    index.check_invariants()


@given(st.lists(st.tuples(st.sampled_from("auxf"), st.text("abcd", min_size=1, max_size=4))))
def test_it_is_a_mapping_with_an_order_of_use(acts: list[tuple[str, str]]) -> None:
    """Against a list of (key, block), oldest use first."""
    index, model, block = PrefixIndex(), dict[bytes, int](), 0
    for act, text in acts:
        key = text[:1].encode()
        if act == "a":
            assert index.add(key, block) == (key not in model)
            model.setdefault(key, block)
            block += 1
        elif act == "x" and key in model:
            index.remove(model.pop(key))
        elif act == "u":
            keys = chain(text)
            gap = next((i for i, k in enumerate(keys) if k not in model), len(keys))
            assert index.longest(keys) == [model[k] for k in keys[:gap]]
            for used in reversed(keys[:gap]):
                if used in model:
                    model[used] = model.pop(used)
        assert list(index.blocks.items()) == list(model.items())
        assert {b: k for k, b in model.items()} == index.keys
        assert index.oldest(lambda b: True) == next(iter(model.values()), None)
        assert len(index) == len(model)
        index.check_invariants()
