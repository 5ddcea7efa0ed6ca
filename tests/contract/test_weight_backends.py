"""Every backend over quantised weights computes what the formats say."""

from __future__ import annotations

import numpy as np
import pytest

from services.engine.backend import PageSource
from services.engine.checkpoint import EMBEDDING, LM_HEAD, WeightView, weight_shapes
from services.engine.model import ModelConfig, RopeConfig
from services.engine.native_backend import NativeBackend
from services.engine.numpy_backend import NumpyBackend
from services.engine.packed import PackedMatrix
from services.engine.torch_backend import TorchBackend
from services.engine.weights.cache import obtain, recipe_of
from services.engine.weights.dequantised import dequantised, with_codes
from services.engine.weights.formats import F32, product
from services.engine.weights.rounding import quantise
from tests.support.backends import Runner, levels
from tests.support.oracle import Loaded, bits, every_model, prompt_for, prompt_logits

every_format = pytest.mark.parametrize("format", ["int8", "int4"])


def native(level: str = ""):  # type: ignore[no-untyped-def]
    def make(config: ModelConfig, weights: object, pages: PageSource) -> NativeBackend:
        return NativeBackend(config, weights, pages, level)  # type: ignore[arg-type]

    return make


def kl(expected: F32, got: F32) -> float:
    """The mean divergence of the rows' distributions, in nats."""
    p, q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (expected, got))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


@every_model
def test_the_numpy_reference_equals_transformers(name: str, loaded: Loaded) -> None:
    """Over a checkpoint's own weights it is a plain float32 forward pass."""
    runner = Runner(NumpyBackend, *loaded)  # type: ignore[arg-type]
    prompt = prompt_for(name)
    logits = np.concatenate([runner.feed((0, part)) for part in (prompt[:70], prompt[70:])])
    assert np.abs(logits - prompt_logits(name)).max() < 1e-4


def bare_model(rows: int, cols: int, x: F32) -> tuple[ModelConfig, dict[str, WeightView]]:
    """A model whose logits after token t are the head [rows, cols] times x[t], and nothing else.

    Its layer adds zero. Its final norm multiplies by exactly 1: beside an epsilon of 1 the mean square
    of such small x is lost.
    """
    assert np.square(x).mean(-1).max() < 2.0**-25
    config = ModelConfig(
        architecture="LlamaForCausalLM", vocab_size=rows, hidden=cols, layers=1, heads=1, kv_heads=1,
        head_dim=2, intermediate=2, rms_eps=1.0, rope=RopeConfig(10000.0), max_context=64,
        tie_embeddings=False, attention_bias=False, o_bias=False, mlp_bias=False, qk_norm=False,
        sliding_window=(0,), eos_token_ids=(), bos_token_id=None,
    )  # fmt: skip
    weights = {}
    for name, shape in weight_shapes(config).items():
        array = np.ones(shape, np.float32) if len(shape) == 1 else np.zeros(shape, np.float32)
        if name == EMBEDDING:
            array[: len(x)] = x
        weights[name] = WeightView("F32", shape, array)
    return config, weights


@every_format
@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize(("rows", "cols"), [(32, 64), (131, 77), (33, 896), (70, 31), (257, 200)])
def test_a_native_product_is_the_definition_s_bit_for_bit(
    level: str, format: str, rows: int, cols: int
) -> None:
    """On every instruction set, for odd sizes, for one row and for many, and for groups of zeros."""
    generator = np.random.default_rng(rows * cols)
    x = (generator.standard_normal((29, cols)) * 1e-5).astype(np.float32)
    x[3, : min(cols, 40)] = 0
    x[5] *= np.float32(1e-20)
    config, weights = bare_model(rows, cols, x)
    head = generator.standard_normal((rows, cols)).astype(np.float32)
    matrix = quantise(format, head, 32)
    packed = PackedMatrix.of_codes(format, matrix.codes, matrix.scales, matrix.group)
    expected = product(x, matrix)
    for count in (1, 4, 29):
        runner = Runner(native(level), config, {**weights, LM_HEAD: packed})  # type: ignore[arg-type]
        assert bits(runner.feed((0, range(count)))) == bits(expected[:count])


@every_format
@every_model
def test_served_weights_are_those_of_the_reference(
    name: str, format: str, loaded: Loaded, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Packed and mapped, a model's logits are the reference's, on every instruction set the same bits.

    Norms and attention round otherwise in numpy, so now and then an activation falls to the next code:
    that costs less than half of what rounding the activations costs, which torch does not do.
    """
    config, weights = loaded
    cache = tmp_path_factory.mktemp("cache")
    packed = obtain(cache, recipe_of("ab" * 32, format), config, weights)
    prompt = prompt_for(name, 90)
    codes = with_codes(config, weights, format)
    expected = Runner(NumpyBackend, config, codes).feed((0, prompt))  # type: ignore[arg-type]
    results = [
        Runner(native(level), config, {**weights, **packed}).feed((0, prompt))  # type: ignore[arg-type]
        for level in levels()
    ]
    assert len({bits(result) for result in results}) == 1
    plain = dequantised(config, weights, format)
    unrounded = Runner(TorchBackend, config, plain).feed((0, prompt))
    assert kl(expected, results[0]) < 0.5 * kl(expected, unrounded) < 1e-3
