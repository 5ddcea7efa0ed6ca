"""A model directory means here what it means to transformers, or it is refused by field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from services.engine.errors import ModelError
from services.engine.model import ModelConfig
from tests.support.models import TINY_MODELS, save_tiny_model

SIZES = {
    "vocab_size": 96,
    "hidden_size": 256,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
}
FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")


def write(directory: Path, family: str = "Llama", **fields: Any) -> Path:
    """config.json with the sizes every model must state, and `fields`."""
    config = {"architectures": [f"{family}ForCausalLM"], **SIZES, **fields}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def transformers_config(family: str, **fields: Any) -> Any:
    return getattr(transformers, f"{family}Config")(**SIZES, **fields)


def windows(theirs: Any) -> tuple[int, ...]:
    """The window of each layer as the transformers model classes apply it."""
    window: int = getattr(theirs, "sliding_window", None) or 0
    kinds = getattr(theirs, "layer_types", None)
    if kinds is None:
        layers: int = theirs.num_hidden_layers
        return (window,) * layers
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def assert_same(ours: ModelConfig, theirs: Any) -> None:
    assert ours.vocab_size == theirs.vocab_size
    assert ours.hidden == theirs.hidden_size
    assert ours.layers == theirs.num_hidden_layers
    assert ours.heads == theirs.num_attention_heads
    assert ours.kv_heads == theirs.num_key_value_heads
    derived = theirs.hidden_size // theirs.num_attention_heads
    assert ours.head_dim == getattr(theirs, "head_dim", derived)
    assert ours.intermediate == theirs.intermediate_size
    assert ours.rms_eps == theirs.rms_norm_eps
    assert ours.max_context == theirs.max_position_embeddings
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert ours.rope.kind == theirs.rope_parameters["rope_type"]
    assert ours.sliding_window == windows(theirs)
    assert ours.bos_token_id == theirs.bos_token_id


@pytest.mark.parametrize("name", TINY_MODELS)
def test_saved_models_read_as_transformers_reads_them(name: str, tmp_path: Path) -> None:
    """What save_pretrained writes gives the configuration transformers reads back from it."""
    directory = save_tiny_model(name, tmp_path)
    assert_same(ModelConfig.load(directory), transformers.AutoConfig.from_pretrained(directory))


@pytest.mark.parametrize("family", FAMILIES)
def test_unsaid_fields_take_the_family_defaults(family: str, tmp_path: Path) -> None:
    """A config.json with sizes alone means what the family's configuration class assumes."""
    config = ModelConfig.load(write(tmp_path, family))
    theirs = transformers_config(family)
    assert_same(config, theirs)
    assert config.eos_token_ids == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))
    assert config.architecture == f"{family}ForCausalLM"


@pytest.mark.parametrize("family", FAMILIES)
def test_null_fields_are_not_absent_ones(family: str, tmp_path: Path) -> None:
    """null KV heads mean one per head, and a null window none, where absent ones have a default."""
    fields = {"num_key_value_heads": None, "sliding_window": None, "bos_token_id": None}
    config = ModelConfig.load(write(tmp_path, family, **fields))
    assert (config.kv_heads, config.sliding_window, config.bos_token_id) == (32, (0,) * 4, None)


@pytest.mark.parametrize(
    ("family", "fields", "expected"),
    [
        ("Llama", {}, (False, False, False, False)),
        ("Llama", {"attention_bias": True}, (True, True, False, False)),
        ("Llama", {"mlp_bias": True}, (False, False, True, False)),
        ("Mistral", {"attention_bias": True, "mlp_bias": True}, (False, False, False, False)),
        ("Qwen2", {}, (True, False, False, False)),
        ("Qwen2", {"attention_bias": False}, (True, False, False, False)),
        ("Qwen3", {}, (False, False, False, True)),
        ("Qwen3", {"attention_bias": True}, (True, True, False, True)),
    ],
)
def test_biases_and_norms_of_each_family(
    family: str, fields: dict[str, bool], expected: tuple[bool, ...], tmp_path: Path
) -> None:
    """Which projections have a bias, and whether q and k are normed, is the family's to say; a
    field the family does not read changes nothing."""
    config = ModelConfig.load(write(tmp_path, family, **fields))
    assert (config.attention_bias, config.o_bias, config.mlp_bias, config.qk_norm) == expected


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3"])
@pytest.mark.parametrize(
    "fields",
    [
        {"sliding_window": 64},
        {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 3},
        {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 9},
        {"use_sliding_window": True, "max_window_layers": 2},
        {
            "use_sliding_window": True,
            "sliding_window": 64,
            "layer_types": ["full_attention", "sliding_attention"] * 2,
        },
    ],
)
def test_qwen_windows(family: str, fields: dict[str, Any], tmp_path: Path) -> None:
    """A Qwen layer has a window if they are switched on and its type, or its number, says so."""
    config = ModelConfig.load(write(tmp_path, family, **fields))
    assert config.sliding_window == windows(transformers_config(family, **fields))


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize("kind_field", ["type", "rope_type"])
def test_both_rope_spellings_mean_the_same(kind_field: str, tmp_path: Path) -> None:
    """`rope_theta` with `rope_scaling` equals one `rope_parameters` object."""
    common: dict[str, Any] = {"max_position_embeddings": 131072}
    scaling = {kind_field: "llama3", **LLAMA3}
    old = ModelConfig.load(write(tmp_path, rope_theta=5e5, rope_scaling=scaling, **common))
    new = ModelConfig.load(
        write(tmp_path, rope_parameters={**scaling, "rope_theta": 5e5}, **common)
    )
    assert old == new
    assert old.rope.kind == "llama3"
    assert old.rope.theta == 5e5
    assert old.rope.original_context == 8192


def test_rope_precedence(tmp_path: Path) -> None:
    """A theta inside the rotary object wins over one beside it; `rope_scaling` over the new name;
    a pretraining length beside the object wins over one inside."""
    config = ModelConfig.load(
        write(
            tmp_path,
            rope_theta=1e6,
            original_max_position_embeddings=1024,
            rope_scaling={"rope_type": "llama3", "rope_theta": 2e4, **LLAMA3},
            rope_parameters={"rope_type": "default"},
        )
    )
    assert (config.rope.kind, config.rope.theta, config.rope.original_context) == (
        "llama3",
        2e4,
        1024,
    )


def test_generation_config_names_the_end(tmp_path: Path) -> None:
    """End tokens come from generation_config.json if it names any, else from config.json."""
    write(tmp_path, eos_token_id=7)
    assert ModelConfig.load(tmp_path).eos_token_ids == (7,)
    generation = tmp_path / "generation_config.json"
    generation.write_text("{}")
    assert ModelConfig.load(tmp_path).eos_token_ids == (7,)
    generation.write_text(json.dumps({"eos_token_id": [5, 9]}))
    assert ModelConfig.load(tmp_path).eos_token_ids == (5, 9)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("Gemma", {}, "architectures"),
    ("Llama", {"architectures": None}, "architectures"),
    ("Llama", {"architectures": [["LlamaForCausalLM"]]}, "architectures"),
    ("Llama", {"hidden_act": "gelu"}, "hidden_act"),
    ("Llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("Llama", {"vocab_size": None}, "vocab_size: missing"),
    ("Llama", {"vocab_size": "96"}, "vocab_size"),
    ("Llama", {"num_hidden_layers": 0}, "num_hidden_layers"),
    ("Llama", {"num_hidden_layers": True}, "num_hidden_layers"),
    ("Llama", {"rms_norm_eps": 0}, "rms_norm_eps"),
    ("Llama", {"tie_word_embeddings": "no"}, "tie_word_embeddings"),
    ("Llama", {"num_key_value_heads": 5}, "num_key_value_heads"),
    ("Llama", {"head_dim": 15}, "head_dim"),
    ("Llama", {"hidden_size": 250}, "head_dim"),
    ("Llama", {"eos_token_id": -1}, "eos_token_id"),
    ("Llama", {"eos_token_id": [1, "2"]}, "eos_token_id"),
    ("Llama", {"layer_types": ["full_attention"] * 4}, "layer_types"),
    ("Qwen2", {"layer_types": ["full_attention"] * 3}, "layer_types"),
    ("Qwen2", {"layer_types": ["chunked_attention"] * 4}, "layer_types"),
    ("Qwen2", {"layer_types": ["sliding_attention"] * 4}, "layer_types"),
    ("Qwen2", {"use_sliding_window": True, "max_window_layers": -1}, "max_window_layers"),
    ("Llama", {"rope_scaling": {"rope_type": "longrope"}}, "rope_type: 'longrope'"),
    ("Llama", {"rope_scaling": {"rope_type": "linear"}}, "factor: missing"),
    ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": float("nan")}}, "factor"),
    ("Llama", {"rope_scaling": {"type": "llama3", "factor": 8.0}}, "low_freq_factor: missing"),
    ("Llama", {"rope_parameters": {"full_attention": {}}}, "full_attention"),
    ("Llama", {"rope_parameters": 3}, "rope_parameters"),
    ("Llama", {"rope_theta": 1.0}, "rope_theta"),
    ("Llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
]


@pytest.mark.parametrize(("family", "fields", "named"), REFUSED)
def test_what_cannot_be_computed_is_refused(
    family: str, fields: dict[str, Any], named: str, tmp_path: Path
) -> None:
    """An unsupported or senseless value is refused, and the error names file and field."""
    write(tmp_path, family, **fields)
    with pytest.raises(ModelError, match=rf"^config\.json: .*{named}"):
        ModelConfig.load(tmp_path)


@pytest.mark.parametrize("text", [None, "", "[]", "{", "[" * 100_000, "\xff"])
def test_an_unreadable_config_is_refused(text: str | None, tmp_path: Path) -> None:
    """A missing or broken config.json is a ModelError with its path."""
    if text is not None:
        (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match=r"config\.json"):
        ModelConfig.load(tmp_path)
