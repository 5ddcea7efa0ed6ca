"""What the native engine owes over packed weights: the formats' numbers, and the same bits whatever
the batch, the chunk, the threads or the instruction set."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services import _native
from services.engine.backend import PageSource
from services.engine.checkpoint import LM_HEAD, WeightView, weight_shapes
from services.engine.model import ModelConfig, RopeConfig
from services.engine.native_backend import NativeBackend, Weight
from services.engine.packed import PackedMatrix
from tests.support.backends import BackendFactory, Runner, levels
from tests.support.oracle import bits
from tests.support.packing import FORMATS, pack_model, packed, random_model, unpack_model

every_format = pytest.mark.parametrize("format", FORMATS)
Model = tuple[ModelConfig, Mapping[str, Weight]]


def native(level: str = "", threads: int = 1) -> BackendFactory:
    def make(
        config: ModelConfig, weights: Mapping[str, WeightView], pages: PageSource
    ) -> NativeBackend:
        return NativeBackend(config, weights, pages, level, threads)  # type: ignore[arg-type]

    return make


def runner_of(model: Model, level: str = "", threads: int = 1, **options: int) -> Runner:
    config, weights = model
    return Runner(native(level, threads), config, weights, kv_dtype="bf16", **options)  # type: ignore[arg-type]


def config_of(
    hidden: int = 52, heads: int = 4, kv_heads: int = 2, head_dim: int = 10, intermediate: int = 77,
    vocab: int = 67, layers: int = 2, window: int = 0, context: int = 2048,
) -> ModelConfig:  # fmt: skip
    return ModelConfig(
        architecture="Qwen2ForCausalLM", vocab_size=vocab, hidden=hidden, layers=layers,
        heads=heads, kv_heads=kv_heads, head_dim=head_dim, intermediate=intermediate, rms_eps=1e-5,
        rope=RopeConfig(10000.0), max_context=context, tie_embeddings=False, attention_bias=True,
        o_bias=False, mlp_bias=False, qk_norm=False,
        sliding_window=(window,) + (0,) * (layers - 1), eos_token_ids=(), bos_token_id=None,
    )  # fmt: skip


def model_of(format: str, config: ModelConfig | None = None, seed: int = 1) -> Model:
    config = config or config_of()
    return config, pack_model(config, random_model(config, weight_shapes(config), seed), format)


def prompt_of(config: ModelConfig, length: int, seed: int = 1) -> list[int]:
    drawn: list[int] = np.random.default_rng(seed).integers(0, config.vocab_size, length).tolist()
    return drawn


# --- packing -----------------------------------------------------------------------------------------


@every_format
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (32, 128), (33, 65), (77, 130), (64, 31)])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_what_is_packed_comes_back(format: str, rows: int, cols: int, group: int) -> None:
    """Unpacked, a matrix is code times scale, or the bf16 values, exactly."""
    rng = np.random.default_rng(rows * cols)
    if format == "bf16":
        wide = rng.standard_normal((rows, cols), np.float32).view(np.uint32) & 0xFFFF0000
        matrix = PackedMatrix.of_bf16((wide >> 16).astype(np.uint16))
        assert bits(matrix.unpacked()) == bits(wide)
        return
    low, high = (-8, 7) if format == "int4" else (-127, 127)
    codes = rng.integers(low, high + 1, (rows, cols), np.int8)
    scales = rng.standard_normal((rows, -(-cols // group))).astype(np.float16)
    matrix = PackedMatrix.of_codes(format, codes, scales, group)
    expected = codes * np.repeat(scales, group, axis=1)[:, :cols].astype(np.float32)
    assert np.array_equal(matrix.unpacked(), expected)


def test_codes_out_of_range_are_refused() -> None:
    """A code that the format cannot hold is refused, not wrapped."""
    scales = np.ones((1, 1), np.float16)
    for format, code in (("int4", 8), ("int4", -9), ("int8", -128)):
        with pytest.raises(ValueError, match="codes"):
            PackedMatrix.of_codes(format, np.full((1, 32), code, np.int8), scales, 32)


# --- numbers -----------------------------------------------------------------------------------------


@every_format
@pytest.mark.parametrize("level", levels())
def test_logits_are_those_of_the_same_weights_unpacked(format: str, level: str) -> None:
    """Beside float32 kernels over the very same weights only the rounding of activations is left."""
    model = model_of(format)
    prompt = prompt_of(model[0], 150)
    plain = Runner(native(level), model[0], unpack_model(model[1])).feed((0, prompt))
    logits = runner_of(model, level).feed((0, prompt))
    error = np.sqrt(np.square(logits - plain).mean() / np.square(plain).mean())
    assert error < 0.03
    assert bits(logits) != bits(plain)


@every_format
@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize(("rows", "cols"), [(32, 64), (131, 77), (33, 896), (70, 31), (5, 2000)])
def test_a_product_is_the_float64_one(format: str, level: str, rows: int, cols: int) -> None:
    """One product, on fresh inputs: within what rounding the activations costs of float64's."""
    rng = np.random.default_rng()
    matrix = packed(format, rng.standard_normal((rows, cols)).astype(np.float32))
    x = rng.standard_normal((13, cols)).astype(np.float32)
    exact = x.astype(np.float64) @ matrix.unpacked().astype(np.float64).T
    y = _native.product(matrix.native(), x, level)
    assert y.shape == exact.shape
    step = 2.0**-9 if format == "bf16" else np.abs(x).max() / 127 / 2
    assert np.abs(y - exact).max() < 6 * step * np.sqrt(cols) * np.abs(matrix.unpacked()).max()
    one_by_one = np.concatenate([_native.product(matrix.native(), row[None], level) for row in x])
    assert bits(y) == bits(one_by_one)
    assert bits(y) == bits(_native.product(matrix.native(), x, "base"))


@pytest.mark.parametrize("level", levels())
def test_bf16_rounds_as_the_processor_does(level: str) -> None:
    """Two columns at a time, the upper one first, each step rounded once, denormals as zero: over
    values from the smallest to the largest."""
    rng = np.random.default_rng()
    drawn = rng.integers(0, 1 << 16, (64, 32), np.uint16)
    weights = np.where((drawn & 0x7F80) == 0x7F80, drawn & 0xBFFF, drawn).astype(np.uint16)
    wide = rng.integers(0, 1 << 32, (40, 32), np.uint32)
    x = np.where((wide & 0x7F800000) == 0x7F800000, wide & 0xBFFFFFFF, wide).astype(np.uint32)
    matrix = PackedMatrix.of_bf16(weights)
    results = [
        _native.product(matrix.native(), x.view(np.float32), name) for name in (level, "base")
    ]
    assert bits(np.nan_to_num(results[0])) == bits(np.nan_to_num(results[1]))


def test_what_is_not_finite_stays_visible() -> None:
    """A NaN or an infinity among the activations makes its row NaN, and no other row."""
    for format in FORMATS:
        matrix = packed(format, np.ones((40, 96), np.float32))
        x = np.ones((3, 96), np.float32)
        x[1, 70] = np.nan
        y = _native.product(matrix.native(), x, "")
        assert np.isnan(y[1]).all()
        assert np.isfinite(y[[0, 2]]).all()


# --- the same bits -----------------------------------------------------------------------------------


@every_format
def test_bits_depend_on_nothing_but_the_tokens(format: str) -> None:
    """T0: whole, in chunks, in single rows and in batches of 1 to 16, with one, two and three threads
    and on every instruction set, past the first span of pages: one result, K and V and logits."""
    model = model_of(format, config_of(window=600))
    prompt = prompt_of(model[0], 700)
    whole = runner_of(model, tokens_max=768)
    logits = whole.feed((0, prompt))
    for level in levels():
        for threads in (1, 2, 3):
            other = runner_of(model, level, threads, tokens_max=768)
            first = other.feed((0, prompt[:511]))
            parts = [first, other.feed((0, prompt[511:695]))]
            parts += [other.feed((0, [token])) for token in prompt[695:]]
            assert bits(np.concatenate(parts)) == bits(logits), (level, threads)
            assert bits(other.stored()) == bits(whole.stored()), (level, threads)


@every_format
@pytest.mark.parametrize("threads", [1, 2])
def test_a_batch_changes_no_bit(format: str, threads: int) -> None:
    """Each of 1 to 16 streams, at contexts of their own, gets the bits it would get alone."""
    model = model_of(format)
    prompts = [prompt_of(model[0], 40 + 9 * i, seed=i) for i in range(16)]
    alone = []
    for prompt in prompts:
        single = runner_of(model, tokens_max=256)
        single.feed((0, prompt))
        alone.append([bits(single.feed((0, [t]))) for t in (3, 5)])
    for batch in (1, 2, 3, 5, 7, 8, 11, 16):
        shared = runner_of(model, threads=threads, sequences=batch, tokens_max=256)
        shared.feed(*((i, prompts[i]) for i in range(batch)))
        for step, token in enumerate((3, 5)):
            logits = shared.feed(*((i, [token]) for i in range(batch)))
            assert [bits(row) for row in logits] == [alone[i][step] for i in range(batch)]


@every_format
def test_a_step_is_a_pass_in_one_call(format: str) -> None:
    """`step` gives the bits of begin, run_group and logits, and stores the same checksums."""
    model = model_of(format)
    results = []
    for one_call in (False, True):
        runner = runner_of(model, threads=2, layers_per_group=1)
        runner.pages.buffer[:] = 0
        runner.feed((0, prompt_of(model[0], 70)))
        rows = runner.rows([(0, [7])])
        seeds = np.array([99], np.uint32)
        backend = runner.backend
        assert isinstance(backend, NativeBackend)
        if one_call:
            logits = backend.step(rows, seeds)
        else:
            backend.begin(rows)
            for group in range(runner.pages.layout.groups):
                backend.run_group(group)
                pages = rows.tables[0, rows.positions // 64, group]
                runner.pages.native.stamp_rows(pages, rows.positions % 64, seeds, group)
            logits = backend.logits(np.zeros(1, np.int32))
        results.append((bits(logits), runner.pages.buffer.tobytes()))
    assert results[0] == results[1]


def test_logits_that_are_held_are_not_overwritten() -> None:
    """The room of logits is used again only when nobody looks at it any more."""
    runner = runner_of(model_of("int8"))
    first = runner.feed((0, [1, 2, 3]))
    row, copy = first[1], first[1].copy()
    del first
    runner.feed((0, [4, 5, 6]))
    assert np.array_equal(row, copy)


# --- shapes ------------------------------------------------------------------------------------------


@st.composite
def shapes(draw: st.DrawFn) -> tuple[ModelConfig, str, str, int, list[int]]:
    """A model of odd sizes, a format, a level, a number of threads, and chunks of a prompt."""
    kv_heads = draw(st.integers(1, 3))
    config = config_of(
        hidden=draw(st.integers(1, 140)), kv_heads=kv_heads,
        heads=kv_heads * draw(st.integers(1, 5)), head_dim=2 * draw(st.integers(1, 40)),
        intermediate=draw(st.integers(1, 140)), vocab=draw(st.integers(2, 100)), layers=1,
        window=draw(st.sampled_from([0, 1, 3, 64, 100])), context=192,
    )  # fmt: skip
    chunks = draw(st.lists(st.sampled_from([1, 1, 2, 7, 63, 64, 65, 100]), min_size=1, max_size=4))
    while sum(chunks) > config.max_context:
        chunks.pop()
    if draw(st.booleans()):
        chunks.append(config.max_context - sum(chunks))  # up to the last position there is
    chunks = [chunk for chunk in chunks if chunk]
    format = draw(st.sampled_from([*FORMATS, "plain"]))
    return config, format, draw(st.sampled_from(levels())), draw(st.integers(1, 3)), chunks


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(shapes(), st.sampled_from(["f32", "bf16"]))
def test_any_shape(drawn: tuple[ModelConfig, str, str, int, list[int]], kv_dtype: str) -> None:
    """Odd sizes, one token, page edges, the maximum context: finite logits, and the bits of a
    single-threaded pass over the whole prompt on the plainest instruction set."""
    config, format, level, threads, chunks = drawn
    plain = random_model(config, weight_shapes(config), seed=3)
    weights: Mapping[str, Weight] = (
        plain if format == "plain" else pack_model(config, plain, format)
    )
    prompt = prompt_of(config, sum(chunks))
    sizes = {"kv_dtype": kv_dtype, "tokens_max": 192}
    whole = Runner(native("base"), config, weights, **sizes).feed((0, prompt))  # type: ignore[arg-type]
    runner = Runner(native(level, threads), config, weights, **sizes)  # type: ignore[arg-type]
    at = 0
    for chunk in chunks:
        logits = runner.feed((0, prompt[at : at + chunk]))
        assert np.isfinite(logits).all()
        assert bits(logits) == bits(whole[at : at + chunk])
        at += chunk


def test_matrices_of_another_shape_are_refused() -> None:
    """A matrix that does not fit the model is refused at the start, by name."""
    config, weights = model_of("int8")
    small = packed("int8", np.ones((config.vocab_size - 1, config.hidden), np.float32))
    with pytest.raises(ValueError, match="head"):
        runner_of((config, {**weights, LM_HEAD: small}))
