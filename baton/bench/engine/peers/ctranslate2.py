"""CTranslate2, int8: `generate_batch` with a prompt and one new token, for prefill alone.

It keeps no cache between calls, so a decode at some context would be mostly prefill; and its batches
are of one call. Weights: one scale for each row, in every matrix.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np
from ctranslate2.specs import common_spec, transformer_spec
from numpy.typing import NDArray

from baton.bench.engine.engines import Setup
from baton.bench.engine.peers.source import Source, converted
from baton.bench.engine.shapes import SHAPES


def _convert(config: dict[str, Any], checkpoint: str, directory: Path) -> None:
    """Source of the mapping: ctranslate2.converters.transformers (LlamaLoader, Qwen2Loader)."""
    source = Source(checkpoint)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        config["num_hidden_layers"], heads, activation=common_spec.Activation.SWISH, pre_norm=True,
        ffn_glu=True, rms_norm=True, rotary_dim=0, rotary_interleave=False,
        rotary_base=config["rope_theta"], num_heads_kv=None if kv_heads == heads else kv_heads,
    )  # fmt: skip
    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = source["model.embed_tokens.weight"]
    decoder.layer_norm.gamma = source["model.norm.weight"]
    tied = config["tie_word_embeddings"]
    decoder.projection.weight = source["model.embed_tokens.weight" if tied else "lm_head.weight"]
    for layer, into in enumerate(decoder.layer):
        _layer(source, f"model.layers.{layer}.", into)
    spec.register_vocabulary([str(token) for token in range(config["vocab_size"])])
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = "0"
    spec.config.layer_norm_epsilon = config["rms_norm_eps"]
    spec.validate()
    spec.optimize(quantization="int8")
    spec.save(str(directory))


def _layer(source: Source, prefix: str, into: Any) -> None:
    attention = into.self_attention
    attention.layer_norm.gamma = source[f"{prefix}input_layernorm.weight"]
    into.ffn.layer_norm.gamma = source[f"{prefix}post_attention_layernorm.weight"]
    attention.linear[0].weight = _joined(source, prefix, "weight")
    if f"{prefix}self_attn.q_proj.bias" in source:
        attention.linear[0].bias = _joined(source, prefix, "bias")
    attention.linear[1].weight = source[f"{prefix}self_attn.o_proj.weight"]
    into.ffn.linear_0.weight = source[f"{prefix}mlp.gate_proj.weight"]
    into.ffn.linear_0_noact.weight = source[f"{prefix}mlp.up_proj.weight"]
    into.ffn.linear_1.weight = source[f"{prefix}mlp.down_proj.weight"]


def _joined(source: Source, prefix: str, kind: str) -> NDArray[np.float32]:
    return np.concatenate([source[f"{prefix}self_attn.{part}_proj.{kind}"] for part in "qkv"])


class CTranslate2:
    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._random = np.random.default_rng(1)
        directory = converted(
            setup.weights, lambda path: _convert(setup.config, setup.checkpoint, path)
        )
        self._generator = ctranslate2.Generator(
            str(directory), device="cpu", compute_type="int8", inter_threads=1,
            intra_threads=setup.threads,
        )  # fmt: skip

    def facts(self) -> dict[str, Any]:
        return {
            "version": ctranslate2.__version__, "flags": "int8, prefill alone", "streams_max": 0,
            "bits_per_weight": SHAPES[self._setup.shape].bits_per_weight(
                lambda _, sizes: 8 + 32 / sizes[1]
            ),
            "kv_bytes_per_token": 4 * self._setup.kv_values_per_token,
        }  # fmt: skip

    def prefill(self, tokens: int) -> float:
        prompt = self._random.integers(1, self._setup.config["vocab_size"], tokens)
        text = [str(token) for token in prompt]
        start = time.perf_counter()
        self._generator.generate_batch(
            [text], max_length=1, include_prompt_in_result=False, sampling_topk=1
        )
        return time.perf_counter() - start

    def decode(self, streams: int, context: int, steps: int) -> list[float]:
        raise NotImplementedError("prefill alone")


def make(setup: Setup) -> CTranslate2:
    return CTranslate2(setup)
