"""Rotary tables equal those of transformers, for every kind of scaling this engine accepts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from services.engine import rope
from services.engine.model import ROPE_KINDS, ModelConfig, RopeConfig

MAX_CONTEXT = 4096

# Our parameters and what transformers calls them.
CASES: dict[str, tuple[RopeConfig, dict[str, Any]]] = {
    "default": (RopeConfig(10000.0), {"rope_type": "default", "rope_theta": 10000.0}),
    "large theta": (RopeConfig(1e6), {"rope_type": "default", "rope_theta": 1e6}),
    "linear": (
        RopeConfig(10000.0, "linear", factor=3.0),
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
    ),
    "dynamic": (
        RopeConfig(10000.0, "dynamic", factor=3.0),
        {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.0},
    ),
    "llama3": (
        RopeConfig(
            5e5,
            "llama3",
            factor=8.0,
            original_context=1024,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
        ),
        {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "original_max_position_embeddings": 1024,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
    ),
    "yarn": (
        RopeConfig(1e6, "yarn", factor=4.0, original_context=1024),
        {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 4.0,
            "original_max_position_embeddings": 1024,
        },
    ),
    "yarn with every field": (
        RopeConfig(
            10000.0,
            "yarn",
            factor=16.0,
            original_context=256,
            beta_fast=24.0,
            beta_slow=2.0,
            truncate=False,
            mscale=1.2,
            mscale_all_dim=0.7,
        ),
        {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 256,
            "beta_fast": 24.0,
            "beta_slow": 2.0,
            "truncate": False,
            "mscale": 1.2,
            "mscale_all_dim": 0.7,
        },
    ),
    "yarn without a ramp": (
        RopeConfig(10000.0, "yarn", factor=2.0, original_context=6),
        {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 2.0,
            "original_max_position_embeddings": 6,
        },
    ),
    "yarn with its attention factor": (
        RopeConfig(10000.0, "yarn", factor=16.0, original_context=256, attention_factor=0.9),
        {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 256,
            "attention_factor": 0.9,
        },
    ),
}

every_case = pytest.mark.parametrize(("ours", "theirs"), CASES.values(), ids=CASES)
every_head_dim = pytest.mark.parametrize("head_dim", [8, 20, 64, 128])


def transformers_rope(parameters: dict[str, Any], head_dim: int) -> LlamaRotaryEmbedding:
    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        max_position_embeddings=MAX_CONTEXT,
        rope_parameters=dict(parameters),
    )
    return LlamaRotaryEmbedding(config)


def model_config(ours: RopeConfig, head_dim: int) -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=8,
        hidden=4 * head_dim,
        layers=1,
        heads=4,
        kv_heads=4,
        head_dim=head_dim,
        intermediate=8,
        rms_eps=1e-6,
        rope=ours,
        max_context=MAX_CONTEXT,
        tie_embeddings=False,
        attention_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        sliding_window=(0,),
        eos_token_ids=(),
        bos_token_id=None,
    )


def test_every_accepted_kind_is_computed() -> None:
    """The kinds a config may name are exactly those with frequencies, and each has a case here."""
    assert set(ROPE_KINDS) == set(rope._KINDS)
    assert {ours.kind for ours, _ in CASES.values()} == set(ROPE_KINDS)


@every_case
@every_head_dim
def test_frequencies_equal_transformers(
    ours: RopeConfig, theirs: dict[str, Any], head_dim: int
) -> None:
    """Frequencies are float32 within two units in the last place; the attention factor is equal."""
    expected = transformers_rope(theirs, head_dim)
    frequencies, attention_factor = rope.rope_frequencies(ours, head_dim)
    assert frequencies.dtype == np.float32
    np.testing.assert_array_max_ulp(frequencies, expected.inv_freq.numpy(), 2)
    assert attention_factor == pytest.approx(expected.attention_scaling, rel=1e-12)


@every_case
@every_head_dim
def test_tables_equal_transformers(ours: RopeConfig, theirs: dict[str, Any], head_dim: int) -> None:
    """cos and sin are within 2e-6 of transformers' at every position of the context."""
    expected = transformers_rope(theirs, head_dim)
    cos, sin = expected(torch.zeros(1), torch.arange(MAX_CONTEXT)[None])
    tables = rope.rope_tables(model_config(ours, head_dim), MAX_CONTEXT)
    for table, full in zip(tables, (cos, sin), strict=True):
        assert table.shape == (MAX_CONTEXT, head_dim // 2)
        assert table.dtype == np.float32
        both_halves = np.concatenate((table, table), axis=1)
        assert np.abs(both_halves - full[0].numpy()).max() < 2e-6


def test_a_table_is_a_prefix_of_a_longer_one() -> None:
    """A position's row does not depend on how many positions were asked for."""
    config = model_config(CASES["dynamic"][0], 64)
    short, long = rope.rope_tables(config, 100), rope.rope_tables(config, 1000)
    for table, longer in zip(short, long, strict=True):
        assert np.array_equal(table, longer[:100])
