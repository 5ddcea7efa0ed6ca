"""Tiny random models in every supported family.

The weights are drawn wide enough that biases, norms and attention windows change the answer: with
the usual small initialisation a model that forgot one of them would still pass. Imports
transformers only when a model is made, since that costs seconds.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_COMMON: dict[str, Any] = {"max_position_embeddings": 512, "rms_norm_eps": 1e-5}

# name: configuration class and its arguments; sizes off the multiples of 16 and odd vocabularies.
TINY_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "LlamaConfig",
        {
            "vocab_size": 256,
            "hidden_size": 64,
            "intermediate_size": 160,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
    ),
    "llama-tied-llama3-biases": (
        "LlamaConfig",
        {
            "vocab_size": 131,
            "hidden_size": 52,
            "intermediate_size": 77,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "mistral-window": (
        "MistralConfig",
        {
            "vocab_size": 199,
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "sliding_window": 40,
        },
    ),
    "qwen2-tied-window": (
        "Qwen2Config",
        {
            "vocab_size": 211,
            "hidden_size": 56,
            "intermediate_size": 88,
            "num_hidden_layers": 3,
            "num_attention_heads": 7,
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 70,
            "max_window_layers": 1,
        },
    ),
    "qwen3-yarn": (
        "Qwen3Config",
        {
            "vocab_size": 157,
            "hidden_size": 40,
            "intermediate_size": 100,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 24,
            "attention_bias": True,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            },
        },
    ),
}


@cache
def tiny_model(name: str, dtype: str = "float32") -> Any:
    """The `transformers` model, in float32 to compute with; `dtype` is what its weights fit in."""
    import torch
    import transformers

    class_name, arguments = TINY_MODELS[name]
    config = getattr(transformers, class_name)(**_COMMON, **arguments)
    config.architectures = [class_name.replace("Config", "ForCausalLM")]
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(20240601)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            drawn = _spread(parameter_name, drawn)
            parameter.copy_(drawn.to(getattr(torch, dtype)))
    return model.float().eval()


def _spread(name: str, drawn: Any) -> Any:
    """Scales standard normal draws so that every parameter matters and activations stay near 1."""
    if name.endswith("norm.weight"):
        return 1 + 0.2 * drawn
    if name.endswith(".bias"):
        return 0.3 * drawn
    if "embed_tokens" in name:
        return 0.5 * drawn
    return drawn / drawn.shape[1] ** 0.5


def save_tiny_model(
    name: str, directory: Path, *, dtype: str = "float32", max_shard_size: str = "1GB"
) -> Path:
    """Writes the model as `transformers` does; a small `max_shard_size` gives several files."""
    import copy

    import torch

    model = copy.deepcopy(tiny_model(name, dtype)).to(getattr(torch, dtype))
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return directory


def reference_logits(name: str, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
    """float32[len(tokens), vocab]: what `transformers` computes for one whole sequence."""
    import torch

    with torch.no_grad():
        ids = torch.from_numpy(tokens.astype(np.int64))[None]
        result: NDArray[np.float32] = tiny_model(name)(ids, use_cache=False).logits[0].numpy()
    return result
