"""A model's architecture as read from a Hugging Face directory: everything a forward pass needs.

Four decoder families share one forward pass; they differ in what config.json may leave unsaid and
in where biases, norms and attention windows sit. Those differences end here: the rest of the engine
reads `ModelConfig` and never asks for the family. Knows nothing of weights, devices or pages.

The defaults are those of the `transformers` configuration classes, for both spellings of the rotary
parameters: `rope_theta` + `rope_scaling` (up to version 4) and `rope_parameters` (from version 5).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.engine.errors import ModelError

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding parameters; a kind ignores the fields it does not name.

    linear, dynamic: factor. llama3: factor, original_context, low_freq_factor, high_freq_factor.
    yarn: factor, original_context, beta_fast, beta_slow, truncate, and attention_factor or else
    mscale with mscale_all_dim (0 = unset).
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float = 0.0
    mscale_all_dim: float = 0.0


@dataclass(frozen=True)
class ModelConfig:
    """One decoder-only model. Sizes are in elements, `max_context` in tokens.

    `attention_bias` stands for the q, k and v projections, `o_bias` for the output projection.
    `sliding_window[layer]` counts the positions a row sees, itself included; 0 means all of them.
    `eos_token_ids` comes from generation_config.json if that names any, else from config.json.
    """

    architecture: str
    vocab_size: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    rms_eps: float
    rope: RopeConfig
    max_context: int
    tie_embeddings: bool
    attention_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_window: tuple[int, ...]
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None

    def __post_init__(self) -> None:
        assert self.heads % self.kv_heads == 0
        assert self.head_dim % 2 == 0
        assert len(self.sliding_window) == self.layers

    @classmethod
    def load(cls, directory: Path | str) -> ModelConfig:
        """Reads config.json and, if there is one, generation_config.json. Raises ModelError."""
        path = Path(directory) / "config.json"
        fields = _Fields("config.json", read_json_object(path))
        architecture, family = _family(fields)
        _refuse_unsupported(fields)
        heads = fields.integer("num_attention_heads")
        hidden = fields.integer("hidden_size")
        layers = fields.integer("num_hidden_layers")
        max_context = fields.integer("max_position_embeddings", family.max_context)
        qkv_bias, o_bias = family.attention_biases(fields)
        return cls(
            architecture=architecture,
            vocab_size=fields.integer("vocab_size"),
            hidden=hidden,
            layers=layers,
            heads=heads,
            kv_heads=_kv_heads(fields, family, heads),
            head_dim=_head_dim(fields, family, hidden, heads),
            intermediate=fields.integer("intermediate_size"),
            rms_eps=fields.number("rms_norm_eps", 1e-6),
            rope=_rope(fields, max_context),
            max_context=max_context,
            tie_embeddings=fields.flag("tie_word_embeddings", False),
            attention_bias=qkv_bias,
            o_bias=o_bias,
            mlp_bias=family.mlp_bias_field and fields.flag("mlp_bias", False),
            qk_norm=family.qk_norm,
            sliding_window=family.windows(fields, layers),
            eos_token_ids=_eos_token_ids(path.parent, fields, family),
            bos_token_id=fields.token_id("bos_token_id", family.bos_token_id),
        )


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in one file of a model directory. ModelError names the file."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: not a JSON object")
    return value


class _Fields:
    """Typed reads from one JSON object; null counts as absent, and every error names its field."""

    def __init__(self, where: str, values: dict[str, Any]) -> None:
        self._where = where
        self._values = values

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def error(self, name: str, problem: str) -> ModelError:
        return ModelError(f"{self._where}: {name}: {problem}")

    def raw(self, name: str) -> Any:
        return self._values.get(name)

    def names_of_objects(self) -> list[str]:
        return [name for name, value in self._values.items() if isinstance(value, dict)]

    def _required(self, name: str, default: Any) -> Any:
        value = self._values.get(name)
        value = default if value is None else value
        if value is None:
            raise self.error(name, "missing")
        return value

    def integer(self, name: str, default: int | None = None) -> int:
        """An integer of at least 1."""
        value = self._required(name, default)
        if type(value) is not int or value < 1:
            raise self.error(name, f"{value!r} is not an integer of at least 1")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A number above 0."""
        value = self._required(name, default)
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            raise self.error(name, f"{value!r} is not a number above 0")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._required(name, default)
        if type(value) is not bool:
            raise self.error(name, f"{value!r} is not true or false")
        return value

    def token_id(self, name: str, default: int | None) -> int | None:
        """A token id; absent gives the default, null gives None."""
        value = self._values.get(name, default)
        if value is not None and (type(value) is not int or value < 0):
            raise self.error(name, f"{value!r} is not a token id")
        return value

    def token_ids(self, name: str, default: int | None) -> tuple[int, ...]:
        """One token id, a list of them, or none; as `token_id`."""
        value = self._values.get(name, default)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(token) is int and token >= 0 for token in ids):
            raise self.error(name, f"{value!r} is not a token id or a list of them")
        return tuple(ids)

    def section(self, name: str) -> _Fields | None:
        """A nested object; None when it is absent, null or empty."""
        value = self._values.get(name)
        if not value:
            return None
        if not isinstance(value, dict):
            raise self.error(name, "not an object")
        return _Fields(f"{self._where}: {name}", value)


@dataclass(frozen=True)
class _Family:
    """What an architecture fixes, and what it assumes where config.json is silent.

    kv_heads: None means one per query head. head_dim: None means hidden // heads.
    """

    kv_heads: int | None
    head_dim: int | None
    max_context: int
    qkv_bias_always: bool = False
    attention_bias_field: bool = False
    mlp_bias_field: bool = False
    qk_norm: bool = False
    window_of_all: int = 0
    window_by_layer: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def attention_biases(self, fields: _Fields) -> tuple[bool, bool]:
        """Whether q, k and v have a bias, and whether the output projection has one."""
        if self.qkv_bias_always:
            return True, False
        bias = self.attention_bias_field and fields.flag("attention_bias", False)
        return bias, bias

    def windows(self, fields: _Fields, layers: int) -> tuple[int, ...]:
        """The attention window of each layer."""
        if self.window_by_layer:
            return _windows_by_layer(fields, layers)
        if fields.raw("layer_types") is not None:
            raise fields.error("layer_types", "not supported for this architecture")
        if not self.window_of_all:
            return (0,) * layers
        absent = "sliding_window" not in fields
        unlimited = not absent and fields.raw("sliding_window") is None
        window = 0 if unlimited else fields.integer("sliding_window", self.window_of_all)
        return (window,) * layers


_FAMILIES = {
    "LlamaForCausalLM": _Family(
        kv_heads=None,
        head_dim=None,
        max_context=2048,
        attention_bias_field=True,
        mlp_bias_field=True,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "MistralForCausalLM": _Family(
        kv_heads=8,
        head_dim=None,
        max_context=131072,
        window_of_all=4096,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "Qwen2ForCausalLM": _Family(
        kv_heads=32,
        head_dim=None,
        max_context=32768,
        qkv_bias_always=True,
        window_by_layer=True,
    ),
    "Qwen3ForCausalLM": _Family(
        kv_heads=32,
        head_dim=128,
        max_context=32768,
        attention_bias_field=True,
        qk_norm=True,
        window_by_layer=True,
    ),
}


def _family(fields: _Fields) -> tuple[str, _Family]:
    names = fields.raw("architectures")
    for name in names if isinstance(names, list) else []:
        if isinstance(name, str) and name in _FAMILIES:
            return name, _FAMILIES[name]
    raise fields.error("architectures", f"{names!r} has none of {sorted(_FAMILIES)}")


def _refuse_unsupported(fields: _Fields) -> None:
    """Settings that would change the result and that this engine does not compute."""
    activation = fields.raw("hidden_act")
    if activation not in (None, "silu"):
        raise fields.error("hidden_act", f"{activation!r} is not supported, only 'silu'")
    if fields.raw("quantization_config") is not None:
        raise fields.error("quantization_config", "quantized weights are not supported")


def _kv_heads(fields: _Fields, family: _Family, heads: int) -> int:
    absent = "num_key_value_heads" not in fields
    default = family.kv_heads if absent and family.kv_heads else heads
    kv_heads = fields.integer("num_key_value_heads", default)
    if heads % kv_heads:
        raise fields.error("num_key_value_heads", f"{kv_heads} does not divide {heads} heads")
    return kv_heads


def _head_dim(fields: _Fields, family: _Family, hidden: int, heads: int) -> int:
    if fields.raw("head_dim") is None and family.head_dim is None and hidden % heads:
        raise fields.error("head_dim", f"missing, and {hidden} / {heads} heads is not whole")
    head_dim = fields.integer("head_dim", family.head_dim or hidden // heads)
    if head_dim % 2:
        raise fields.error("head_dim", f"{head_dim} is odd, and rotary embedding needs pairs")
    return head_dim


def _windows_by_layer(fields: _Fields, layers: int) -> tuple[int, ...]:
    """Qwen's rule: a switch, then a list of layer types or the first layer that has a window."""
    window = 0
    if fields.flag("use_sliding_window", False):
        unlimited = "sliding_window" in fields and fields.raw("sliding_window") is None
        window = 0 if unlimited else fields.integer("sliding_window", 4096)
    kinds = fields.raw("layer_types")
    if kinds is None:
        first = fields.raw("max_window_layers")
        first = 28 if first is None else first
        if type(first) is not int or first < 0:
            raise fields.error("max_window_layers", f"{first!r} is not a layer number")
        return tuple(window if layer >= first else 0 for layer in range(layers))
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise fields.error("layer_types", f"not a list of {layers} layer types")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise fields.error("layer_types", f"{kind!r} is not supported")
    if "sliding_attention" in kinds and not window:
        raise fields.error("layer_types", "sliding_attention without a sliding_window in use")
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def _rope(fields: _Fields, max_context: int) -> RopeConfig:
    """Either spelling; a value inside the rotary object wins over one beside it."""
    rope = fields.section("rope_scaling") or fields.section("rope_parameters")
    rope = rope or _Fields("config.json: rope_parameters", {})
    for nested in rope.names_of_objects():
        raise rope.error(nested, "rotary parameters per layer type are not supported")
    for holder in (fields, rope):
        if holder.raw("partial_rotary_factor") not in (None, 1, 1.0):
            raise holder.error("partial_rotary_factor", "only 1 is supported")
    kind = rope.raw("rope_type") or rope.raw("type") or "default"
    theta = rope.number("rope_theta", fields.number("rope_theta", 10000.0))
    if theta <= 1:
        raise rope.error("rope_theta", f"{theta} is not above 1")
    if kind == "default":
        return RopeConfig(theta)
    if kind in ("linear", "dynamic"):
        return RopeConfig(theta, kind, factor=rope.number("factor"))
    inside = rope.integer("original_max_position_embeddings", max_context)
    original = fields.integer("original_max_position_embeddings", inside)
    if kind == "llama3":
        return _llama3(rope, theta, original)
    if kind == "yarn":
        return _yarn(rope, theta, original, max_context)
    raise rope.error("rope_type", f"{kind!r} is not one of {list(ROPE_KINDS)}")


def _llama3(rope: _Fields, theta: float, original: int) -> RopeConfig:
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if high <= low:
        raise rope.error("high_freq_factor", f"{high} is not above low_freq_factor {low}")
    return RopeConfig(
        theta,
        "llama3",
        factor=rope.number("factor"),
        original_context=original,
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _yarn(rope: _Fields, theta: float, original: int, max_context: int) -> RopeConfig:
    given = rope.raw("attention_factor") is not None
    scales = rope.raw("mscale") and rope.raw("mscale_all_dim")
    return RopeConfig(
        theta,
        "yarn",
        factor=rope.number("factor", max_context / original),
        original_context=original,
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        truncate=rope.flag("truncate", True),
        attention_factor=rope.number("attention_factor") if given else None,
        mscale=rope.number("mscale") if scales else 0.0,
        mscale_all_dim=rope.number("mscale_all_dim") if scales else 0.0,
    )


def _eos_token_ids(directory: Path, fields: _Fields, family: _Family) -> tuple[int, ...]:
    """Generation settings win over the architecture's, as in `transformers`."""
    path = directory / "generation_config.json"
    if path.exists():
        generation = _Fields(path.name, read_json_object(path))
        ids = generation.token_ids("eos_token_id", None)
        if ids:
            return ids
    return fields.token_ids("eos_token_id", family.eos_token_id)
