"""What every compute backend owes: the reference's numbers, T0 over pages, no byte too many."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from services.engine.checkpoint import load_weights
from services.engine.errors import ModelError
from services.engine.model import ModelConfig
from services.kv.heap import HeapPages
from services.kv.layout import KvLayout
from tests.support.backends import BACKENDS, Runner
from tests.support.models import reference_logits, save_tiny_model
from tests.support.oracle import (
    CHUNKS,
    Loaded,
    bits,
    every_backend,
    every_model,
    prompt_for,
    prompt_logits,
)


@every_backend
@every_model
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_logits_equal_transformers(
    backend: str, name: str, chunks: tuple[int, ...], loaded: Loaded
) -> None:
    """In whatever chunks a prompt is fed, every row's logits are within 1e-4 of transformers'."""
    runner = Runner(BACKENDS[backend], *loaded)
    prompt, parts, start = prompt_for(name), [], 0
    for chunk in chunks:
        parts.append(runner.feed((0, prompt[start : start + chunk])))
        start += chunk
    assert np.abs(np.concatenate(parts) - prompt_logits(name)).max() < 1e-4


@every_backend
@every_model
def test_greedy_tokens_equal_transformers(backend: str, name: str, loaded: Loaded) -> None:
    """64 greedy tokens after a prompt are the ones transformers would choose, one at a time."""
    prompt = prompt_for(name)
    tokens = Runner(BACKENDS[backend], *loaded).greedy(prompt, 64)
    # Given that all tokens before agree, the next agrees: one pass over them proves it for each.
    logits = reference_logits(name, np.array(prompt + tokens, np.int32))
    assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == tokens


@every_backend
@every_model
def test_bits_do_not_depend_on_company(backend: str, name: str, loaded: Loaded) -> None:
    """T0: a row's logits and stored K and V are the same bits in one pass, in single rows, and in a
    pass shared and interleaved with other sequences."""
    prompt, other = prompt_for(name, 83), prompt_for(name, 90, seed=2)
    alone = Runner(BACKENDS[backend], *loaded, kv_dtype="bf16")
    whole = alone.feed((0, prompt))

    rows = Runner(BACKENDS[backend], *loaded, kv_dtype="bf16")
    single = np.concatenate([rows.feed((0, [token])) for token in prompt])
    assert bits(single) == bits(whole)
    assert bits(rows.stored()) == bits(alone.stored())

    shared = Runner(BACKENDS[backend], *loaded, kv_dtype="bf16", sequences=3)
    shared.feed((2, other[:70]), (1, prompt[:11]), (0, other[:3]))
    mixed = shared.feed(
        (0, other[3:10]), (1, prompt[11:40]), (2, other[70:]), (1, prompt[40:]), (0, other[10:])
    )
    assert bits(mixed[7:36]) == bits(whole[11:40])
    assert bits(mixed[56:99]) == bits(whole[40:])
    assert bits(shared.stored(1)) == bits(alone.stored())


@every_backend
def test_logits_are_of_the_rows_asked_for(backend: str, name: str, loaded: Loaded) -> None:
    """Logits come for any rows, in any order, again and again, or for none."""
    runner = Runner(BACKENDS[backend], *loaded)
    whole = runner.feed((0, prompt_for(name, 40)))
    orders: list[list[int]] = [[39], [3, 3, 0, 25, 1], list(range(30, -1, -1)), []]
    for which in orders:
        rows = runner.backend.logits(np.array(which, np.int32))
        assert rows.dtype == np.float32
        assert rows.shape == (len(which), whole.shape[1])
        assert bits(rows) == bits(whole[np.array(which, np.intp)])


@every_backend
@pytest.mark.parametrize("layers_per_group", [2, 3])
def test_bits_do_not_depend_on_layer_groups(
    backend: str, name: str, loaded: Loaded, layers_per_group: int
) -> None:
    """How many layers share a page, the last group shorter or not, changes no bit."""
    prompt = prompt_for(name, 70)
    single = Runner(BACKENDS[backend], *loaded)
    grouped = Runner(BACKENDS[backend], *loaded, layers_per_group=layers_per_group)
    assert bits(grouped.feed((0, prompt))) == bits(single.feed((0, prompt)))
    assert bits(grouped.stored()) == bits(single.stored())


@every_backend
def test_another_backend_goes_on_from_the_pages(backend: str, name: str, loaded: Loaded) -> None:
    """A backend keeps nothing of a sequence: a second one with the pages continues bit for bit."""
    prompt = prompt_for(name, 100)
    undisturbed = Runner(BACKENDS[backend], *loaded, kv_dtype="bf16")
    undisturbed.feed((0, prompt[:77]))
    expected = undisturbed.feed((0, prompt[77:]))

    first = Runner(BACKENDS[backend], *loaded, kv_dtype="bf16")
    first.feed((0, prompt[:77]))
    second = Runner(BACKENDS[backend], *loaded, kv_dtype="bf16")
    second.pages.array[:] = first.pages.array
    second.lengths = first.lengths
    assert bits(second.feed((0, prompt[77:]))) == bits(expected)


@every_backend
@pytest.mark.parametrize("name", ["llama"])
def test_stored_rows_are_rounded_to_nearest_even(backend: str, name: str, loaded: Loaded) -> None:
    """A bf16 page holds the nearest bf16 of what an f32 page would hold, ties to even."""
    prompt = prompt_for(name, 70)
    exact = Runner(BACKENDS[backend], *loaded, kv_dtype="f32")
    rounded = Runner(BACKENDS[backend], *loaded, kv_dtype="bf16")
    exact.feed((0, prompt))
    rounded.feed((0, prompt))
    wide = exact.stored()[0].view(np.uint32)  # layer 0: its input is not rounded yet
    nearest = (wide + 0x7FFF + ((wide >> 16) & 1)) >> 16
    assert np.array_equal(rounded.stored()[0], nearest.astype(np.uint16))


@every_backend
@pytest.mark.parametrize("name", ["llama"])
def test_attention_reads_what_is_stored(backend: str, name: str, loaded: Loaded) -> None:
    """Attention is over the page's bytes, also for the rows of its own pass: with values as coarse
    as bf16 the logits move, and zeroed pages of the past move them further."""
    prompt = prompt_for(name, 80)
    exact = Runner(BACKENDS[backend], *loaded).feed((0, prompt))
    runner = Runner(BACKENDS[backend], *loaded, kv_dtype="bf16")
    coarse = runner.feed((0, prompt))
    assert bits(coarse[0]) != bits(exact[0])  # even the first row, which sees only itself
    assert np.abs(coarse - exact).max() < 0.1

    twin = Runner(BACKENDS[backend], *loaded, kv_dtype="bf16")
    twin.feed((0, prompt))
    twin.pages.array[:] = 0
    assert np.abs(twin.feed((0, [1])) - runner.feed((0, [1]))).max() > 0.1


@every_backend
def test_only_the_rows_asked_for_are_written(backend: str, name: str, loaded: Loaded) -> None:
    """A pass changes the bytes of its own rows in its own pages, and no other byte."""
    runner = Runner(BACKENDS[backend], *loaded, sequences=2)
    runner.feed((0, prompt_for(name, 60)))
    before = runner.pages.array.copy()
    runner.feed((0, prompt_for(name, 9)))
    changed = before.view(np.uint32) != runner.pages.array.view(np.uint32)
    for block, rows in ((0, slice(60, 64)), (1, slice(0, 5))):
        pages = runner.tables[0, block]
        assert changed[pages][:, :, :, :, rows].all()
        changed[pages[:, None], :, :, :, np.arange(64)[rows]] = False
    assert not changed.any()


@every_backend
def test_what_lies_behind_the_last_row_is_never_read(
    backend: str, name: str, loaded: Loaded
) -> None:
    """Bytes of a page after a sequence's last row, NaN or not, change no bit of the logits."""
    prompt = prompt_for(name, 90)
    results = []
    for fill in (0xFF, 0x00, 0x7F):  # NaN, zero, and about 3e38 in either dtype
        for kv_dtype in ("f32", "bf16"):
            runner = Runner(BACKENDS[backend], *loaded, kv_dtype=kv_dtype, fill=fill)
            results.append((kv_dtype, bits(runner.feed((0, prompt)))))
    assert len(set(results)) == 2


@every_backend
@pytest.mark.parametrize("name", ["llama", "qwen2-tied-window"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_weights_are_widened(
    backend: str, name: str, dtype: str, tmp_path: Path, directories: dict[str, Path]
) -> None:
    """A BF16 or F16 checkpoint computes as a float32 checkpoint of the same values, to the bit."""
    import torch
    from safetensors.torch import load_file, save_file

    half = save_tiny_model(name, tmp_path / dtype, dtype=dtype)
    full = save_tiny_model(name, tmp_path / "float32", dtype=dtype)
    tensors = load_file(full / "model.safetensors")
    widened = {key: tensor.to(torch.float32) for key, tensor in tensors.items()}
    save_file(widened, full / "model.safetensors")
    results = []
    for directory in (half, full):
        config = ModelConfig.load(directory)
        runner = Runner(BACKENDS[backend], config, load_weights(directory, config))
        results.append(bits(runner.feed((0, prompt_for(name, 20)))))
    assert results[0] == results[1]


@every_backend
def test_groups_run_in_order(backend: str, name: str, loaded: Loaded) -> None:
    """A group out of order, or logits before the last group, is a mistake and asserts."""
    runner = Runner(BACKENDS[backend], *loaded)
    runner.feed((0, [1, 2, 3]))
    runner.backend.begin(runner.rows([(0, [4])]))
    with pytest.raises(AssertionError):
        runner.backend.run_group(1)
    runner.backend.run_group(0)
    with pytest.raises(AssertionError):
        runner.backend.logits(np.zeros(1, np.int32))


@every_backend
@pytest.mark.parametrize("field", ["layers", "kv_heads", "head_dim"])
def test_a_layout_of_another_model_is_refused(
    backend: str, name: str, loaded: Loaded, field: str
) -> None:
    """Pages that were laid out for another model are refused at start, and the field is named."""
    config, weights = loaded
    sizes = {"layers": config.layers, "kv_heads": config.kv_heads, "head_dim": config.head_dim}
    sizes[field] += 2
    pages = HeapPages(KvLayout(**sizes, layers_per_group=1, kv_dtype="f32"), 1)
    with pytest.raises(ModelError, match=field):
        BACKENDS[backend](config, weights, pages)


def test_every_instruction_set_gives_the_same_bits(name: str, loaded: Loaded) -> None:
    """The native kernels round alike on every level, so KV may be shared between processors."""
    results = {
        backend: bits(
            Runner(BACKENDS[backend], *loaded, kv_dtype="bf16").feed((0, prompt_for(name)))
        )
        for backend in BACKENDS
        if backend.startswith("native")
    }
    assert len(set(results.values())) == 1, sorted(results)
