"""What a client may ask for: every range at its borders, every refusal by the field's name."""

from __future__ import annotations

from typing import Any

import pytest

from baton.v1 import inference_pb2
from services.ops.errors import InvalidRequest
from services.scheduler.validate import Limits, check_request_id, prompt_ids, resolve

LIMITS = Limits(model="pico", vocab_size=1000, max_context=256, eos_token_ids=(0, 7))


def request(**fields: Any) -> inference_pb2.GenerateRequest:
    fields.setdefault("request_id", "r")
    return inference_pb2.GenerateRequest(**fields)


def asked(prompt: int = 10, request_fields: dict[str, Any] | None = None, **sampling: Any) -> Any:
    """The resolved sampling of a request with these fields."""
    body = request(**(request_fields or {}), sampling=inference_pb2.SamplingParams(**sampling))
    return resolve(body, [1] * prompt, LIMITS, lambda: 4711)


def test_every_default_is_filled_in() -> None:
    """Greedy, 128 tokens, the model's end of text, a seed that is drawn."""
    got = asked()
    assert (got.max_tokens, got.temperature, got.top_p, got.top_k, got.min_p) == (128, 0, 1, 0, 0)
    assert (got.seed, got.logprobs) == (4711, False)
    assert list(got.stop_token_ids) == [0, 7]


def test_what_is_given_is_kept() -> None:
    """Zeros included: they are not the same as nothing."""
    got = asked(
        max_tokens=5, temperature=0.5, top_p=0.25, top_k=3, min_p=0.125, seed=0, logprobs=True,
        stop_token_ids=[9, 3, 9], ignore_eos=True,
    )  # fmt: skip
    assert (got.max_tokens, got.temperature, got.top_p, got.top_k) == (5, 0.5, 0.25, 3)
    assert (got.min_p, got.seed, got.logprobs) == (0.125, 0, True)
    assert list(got.stop_token_ids) == [3, 9]


def test_stop_tokens_come_beside_the_models_own() -> None:
    """Each once and in order, so that equal requests are equal."""
    assert list(asked(stop_token_ids=[9, 0]).stop_token_ids) == [0, 7, 9]
    assert list(asked(ignore_eos=True).stop_token_ids) == []


@pytest.mark.parametrize(("prompt", "tokens"), [(10, 128), (128, 128), (129, 127), (255, 1)])
def test_the_default_length_shrinks_to_the_context(prompt: int, tokens: int) -> None:
    """Prompt and completion together fit it."""
    assert asked(prompt).max_tokens == tokens


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("max_tokens", [1, 246]), ("temperature", [0, 10]), ("top_p", [1e-6, 1]),
        ("top_k", [0, 2**32 - 1]), ("min_p", [0, 0.999]), ("seed", [0, 2**64 - 1]),
        ("stop", [["a"] * 8, ["x" * 256], ["ü" * 128]]),
        ("stop_token_ids", [[0], [999], list(range(64))]),
    ],
)  # fmt: skip
def test_the_borders_of_each_range_are_allowed(field: str, values: list[Any]) -> None:
    """The last good value on either side."""
    for value in values:
        asked(**{field: value})


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("max_tokens", [0, 247, 2**32 - 1]),
        ("temperature", [-0.001, 10.001, float("nan"), float("inf")]),
        ("top_p", [0, -1, 1.001, float("nan"), float("-inf")]),
        ("min_p", [-0.001, 1, float("nan")]),
        ("stop", [["a"] * 9, [""], ["ok", "x" * 257], ["ü" * 129]]),
        ("stop_token_ids", [[1000], [1, 2**32 - 1], [1] * 65]),
    ],
)
def test_behind_the_borders_the_field_is_named(field: str, values: list[Any]) -> None:
    """InvalidRequest whose message begins with the field."""
    for value in values:
        with pytest.raises(InvalidRequest, match=f"^{field}: "):
            asked(**{field: value})


def test_the_model_and_the_tenant_are_checked() -> None:
    """Another model is not served; no name means the one that is. A tenant has at most 64 bytes."""
    for fields in ({"model": ""}, {"model": "pico"}, {"tenant": "x" * 64}, {"tenant": "ü" * 32}):
        asked(request_fields=fields)
    for field, value in (("model", "Pico"), ("tenant", "x" * 65), ("tenant", "ü" * 33)):
        with pytest.raises(InvalidRequest, match=f"^{field}: "):
            asked(request_fields={field: value})


@pytest.mark.parametrize("name", ["a", "x" * 128, "A-z.0_9:-"])
def test_request_ids_that_are_fine(name: str) -> None:
    """1 to 128 of the named characters."""
    check_request_id(name)


@pytest.mark.parametrize("name", ["", "x" * 129, "a b", "a/b", "a\n", "ü", "a\0", "١"])
def test_request_ids_that_are_not(name: str) -> None:
    """Nothing that could confuse a log, a file name or a record."""
    with pytest.raises(InvalidRequest, match=r"^request_id: "):
        check_request_id(name)


def encode(text: str) -> list[int]:
    """One token for each character that is not a space."""
    return [ord(c) % 1000 for c in text if c != " "]


def ids(**prompt: Any) -> list[int]:
    return prompt_ids(request(**prompt), LIMITS, encode)


def tokens(*numbers: int) -> inference_pb2.TokenIds:
    return inference_pb2.TokenIds(ids=numbers)


def test_a_prompt_is_text_or_tokens() -> None:
    """Text is encoded, token ids are taken as they are, up to the vocabulary and the context."""
    assert ids(text="ab") == [97, 98]
    assert ids(token_ids=tokens(0, 999, 5)) == [0, 999, 5]
    assert len(ids(token_ids=tokens(*[1] * 255))) == 255
    assert len(ids(text="x" * 255)) == 255


def test_an_empty_prompt_is_refused() -> None:
    """Nothing, an empty one, or one that has no token."""
    for field, prompt in (
        ("prompt", {}), ("text", {"text": ""}), ("token_ids", {"token_ids": tokens()}),
        ("text", {"text": "   "}),
    ):  # fmt: skip
        with pytest.raises(InvalidRequest, match=f"^{field}: "):
            ids(**prompt)


def test_a_token_outside_the_vocabulary_is_refused() -> None:
    """Wherever it stands; its number is in the message."""
    for bad in ((1000,), (1, 2**32 - 1, 2)):
        with pytest.raises(InvalidRequest, match=f"^token_ids: {max(bad)} "):
            ids(token_ids=tokens(*bad))


def test_a_prompt_that_leaves_no_room_is_at_fault_itself() -> None:
    """Not max_tokens, which the client may not even have set."""
    for count in (256, 257, 5000):
        with pytest.raises(InvalidRequest, match=r"^token_ids: "):
            ids(token_ids=tokens(*[1] * count))
        with pytest.raises(InvalidRequest, match=r"^text: "):
            ids(text="x" * count)


def test_a_huge_text_is_not_even_encoded() -> None:
    """Its length alone says that it cannot fit."""

    def never(text: str) -> list[int]:
        raise AssertionError("a huge text was encoded")

    with pytest.raises(InvalidRequest, match=r"^text: "):
        prompt_ids(request(text="x" * (64 * 256 + 1)), LIMITS, never)
