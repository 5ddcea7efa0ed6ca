"""A shape as an OpenVINO model: the graph that GenAI's pipelines expect, with compressed weights.

`int8`: one scale of 16 bits for each row; `int4`: one for each 128 weights of a row, as Optimum's
defaults are, symmetric, the head beside int4 in int8; the embedding stays in float16. The names
of inputs, states and outputs, and the forms of norm, rotary embedding and grouped keys that OpenVINO
fuses, are those of openvino.genai's GGUF reader (src/cpp/src/gguf_utils/building_blocks.cpp).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as ops
from numpy.typing import NDArray
from openvino.op.util import Variable, VariableInfo

from baton.bench.engine.peers.source import Source

INT4_GROUP = 128


def bits_per_weight(format_: str, columns: int, head: bool) -> float:
    """With scales, of a matrix with so many columns."""
    format_ = "int8" if head and format_ == "int4" else format_
    return {"bf16": 16.0, "int8": 8 + 16 / columns, "int4": 4 + 16 / _group(columns)}[format_]


def write(config: dict[str, Any], checkpoint: str, format_: str, directory: Path) -> None:
    """openvino_model.xml and .bin, and the JSON files beside them."""
    builder = _Builder(config, Source(checkpoint), format_)
    ov.save_model(builder.model(), directory / "openvino_model.xml", compress_to_fp16=False)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))


def _group(columns: int) -> int:
    return INT4_GROUP if columns % INT4_GROUP == 0 else 32


def _int(*values: int) -> Any:
    return ops.constant(np.array(values, np.int64))


class _Builder:
    def __init__(self, config: dict[str, Any], source: Source, format_: str) -> None:
        self._config, self._source, self._format = config, source, format_
        self._heads = config["num_attention_heads"]
        self._kv_heads = config["num_key_value_heads"]
        self._dim = config["hidden_size"] // self._heads
        self._sinks: list[Any] = []
        self._variables: list[Variable] = []
        self._shared: list[Any] = []  # a constant of a packed tensor does not own its bytes

    def model(self) -> ov.Model:
        self._ids = self._input("input_ids", [-1, -1])
        mask = self._input("attention_mask", [-1, -1])
        self._positions = self._input("position_ids", [-1, -1])
        self._beams = self._input("beam_idx", [-1], np.int32)
        self._batch = ops.gather(ops.shape_of(self._ids), _int(0), _int(0))
        self._cos, self._sin = self._rotary()
        embedding = ops.constant(self._source["model.embed_tokens.weight"].astype(np.float16))
        x = ops.gather(ops.convert(embedding, "f32"), self._ids, _int(0))
        for layer in range(self._config["num_hidden_layers"]):
            x = self._layer(x, f"model.layers.{layer}.", layer)
        self._format = "int8" if self._format == "int4" else self._format  # of the head
        head = "model.embed_tokens" if self._config["tie_word_embeddings"] else "lm_head"
        logits = self._linear(self._norm(x, "model.norm"), head)
        result = ops.result(logits)
        result.get_output_tensor(0).set_names({"logits"})
        inputs = [self._ids, mask, self._positions, self._beams]
        return ov.Model([result], self._sinks, inputs, self._variables, "decoder")

    def _input(self, name: str, shape: list[int], dtype: Any = np.int64) -> Any:
        node = ops.parameter(shape, dtype)
        node.set_friendly_name(name)
        node.output(0).set_names({name})
        return node

    def _rotary(self) -> tuple[Any, Any]:
        """cos and sin, [batch, 1, tokens, dim]."""
        theta = self._config["rope_theta"]
        inverse = theta ** (-np.arange(0, self._dim, 2) / self._dim)
        places = ops.convert(ops.unsqueeze(self._positions, _int(2)), "f32")
        angles = ops.multiply(places, ops.constant(inverse.astype(np.float32)[None, None]))
        both = ops.concat([angles, angles], -1)
        return ops.unsqueeze(ops.cos(both), _int(1)), ops.unsqueeze(ops.sin(both), _int(1))

    def _rotate(self, x: Any) -> Any:
        half, end = self._dim // 2, np.iinfo(np.int64).max
        upper = ops.slice(x, _int(half), _int(end), _int(1), _int(3))
        lower = ops.slice(x, _int(0), _int(half), _int(1), _int(3))
        turned = ops.concat([ops.multiply(upper, ops.constant(np.float32(-1))), lower], -1)
        return ops.add(ops.multiply(x, self._cos), ops.multiply(turned, self._sin))

    def _norm(self, x: Any, name: str) -> Any:
        mean = ops.reduce_mean(ops.power(x, ops.constant(np.float32(2))), _int(-1), True)
        eps = np.full((1, 1, 1), self._config["rms_norm_eps"], np.float32)
        root = ops.sqrt(ops.add(mean, ops.constant(eps)))
        scaled = ops.multiply(x, ops.divide(ops.constant(np.float32(1)), root))
        return ops.multiply(scaled, ops.constant(self._source[f"{name}.weight"][None, None]))

    def _linear(self, x: Any, name: str) -> Any:
        out = ops.matmul(x, self._matrix(self._source[f"{name}.weight"]), False, True)
        if f"{name}.bias" in self._source:
            out = ops.add(out, ops.constant(self._source[f"{name}.bias"][None, None]))
        return out

    def _matrix(self, values: NDArray[np.float32]) -> Any:
        rows, columns = values.shape
        if self._format == "bf16":
            return ops.convert(ops.constant(values.astype(np.float16)), "f32")
        if self._format == "int8":
            scale = (abs(values).max(1, keepdims=True) / 127).astype(np.float16)
            codes = np.clip(np.rint(values / scale.astype(np.float32)), -127, 127).astype(np.int8)
            whole = ops.convert(ops.constant(codes), "f16")
            return ops.convert(ops.multiply(whole, ops.constant(scale)), "f32")
        grouped = values.reshape(rows, -1, _group(columns))
        scale = (abs(grouped).max(2, keepdims=True) / 7).astype(np.float16)
        codes = np.clip(np.rint(grouped / scale.astype(np.float32)), -8, 7).astype(np.int8)
        nibbles = codes.reshape(-1, 2).view(np.uint8) & 15
        packed = (nibbles[:, 0] | nibbles[:, 1] << 4).astype(np.uint8)
        tensor = ov.Tensor(packed, ov.Shape(list(grouped.shape)), ov.Type.i4)
        self._shared += [packed, tensor]
        whole = ops.convert(ops.constant(tensor), "f16")
        scaled = ops.multiply(whole, ops.constant(scale))
        return ops.convert(ops.reshape(scaled, _int(rows, columns), False), "f32")

    def _heads_of(self, x: Any, count: int) -> Any:
        return ops.transpose(ops.reshape(x, _int(0, 0, count, self._dim), True), _int(0, 2, 1, 3))

    def _cache(self, name: str, new: Any) -> Any:
        """What was cached before and `new`, along the tokens."""
        info = VariableInfo()
        info.data_shape = ov.PartialShape([-1, self._kv_heads, -1, self._dim])
        info.data_type, info.variable_id = ov.Type.f32, name
        variable = Variable(info)
        empty = ops.broadcast(
            ops.constant(np.float32(0)),
            ops.concat([self._batch, _int(self._kv_heads), _int(0), _int(self._dim)], 0),
        )
        past = ops.gather(ops.read_value(empty, variable), self._beams, _int(0))
        joined = ops.concat([past, new], 2)
        self._sinks.append(ops.assign(joined, variable))
        self._variables.append(variable)
        return joined

    def _grouped(self, x: Any) -> Any:
        """Each key head once for every query head of its group."""
        shape = ops.shape_of(x)
        batch, tokens = ops.gather(shape, _int(0), _int(0)), ops.gather(shape, _int(2), _int(0))
        each = self._heads // self._kv_heads
        wide = ops.concat([batch, _int(self._kv_heads), _int(each), tokens, _int(self._dim)], 0)
        repeated = ops.broadcast(ops.unsqueeze(x, _int(2)), wide)
        return ops.reshape(repeated, _int(0, self._heads, -1, self._dim), True)

    def _visible(self, keys: Any) -> Any:
        """[batch, 1, queries, keys]: 0 where a query may look, else very low."""
        count = ops.gather(ops.shape_of(keys), _int(2), ops.constant(np.int64(0)))
        places = ops.range(
            ops.constant(np.int64(0)), ops.squeeze(count, _int(0)), ops.constant(np.int64(1)), "i64"
        )
        ok = ops.less_equal(places, ops.unsqueeze(self._positions, _int(1, 3)))
        return ops.select(ok, ops.constant(np.float32(0)), ops.constant(np.float32(-65504)))

    def _layer(self, x: Any, prefix: str, layer: int) -> Any:
        normed = self._norm(x, f"{prefix}input_layernorm")
        q, k, v = (self._linear(normed, f"{prefix}self_attn.{part}_proj") for part in "qkv")
        q, k = self._heads_of(q, self._heads), self._heads_of(k, self._kv_heads)
        v = self._heads_of(v, self._kv_heads)
        name = f"past_key_values.{layer}."
        k = self._cache(f"{name}keypresent.{layer}.key", self._rotate(k))
        v = self._cache(f"{name}valuepresent.{layer}.value", v)
        if layer == 0:
            self._mask = self._visible(k)
        attended = ops.scaled_dot_product_attention(
            self._rotate(q), self._grouped(k), self._grouped(v), self._mask
        )
        flat = ops.reshape(
            ops.transpose(attended, _int(0, 2, 1, 3)), _int(0, 0, self._heads * self._dim), True
        )
        x = ops.add(x, self._linear(flat, f"{prefix}self_attn.o_proj"))
        normed = self._norm(x, f"{prefix}post_attention_layernorm")
        gate = ops.swish(self._linear(normed, f"{prefix}mlp.gate_proj"))
        up = self._linear(normed, f"{prefix}mlp.up_proj")
        return ops.add(x, self._linear(ops.multiply(gate, up), f"{prefix}mlp.down_proj"))
