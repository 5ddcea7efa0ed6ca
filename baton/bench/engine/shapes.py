"""The shapes that are measured: a model's config.json and its tensors, without weights. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

FORMATS = ("bf16", "int8", "int4")


@dataclass(frozen=True)
class Shape:
    """A decoder of the Llama or the Qwen2 family; sizes in elements."""

    name: str
    family: str  # llama or qwen2
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    tied: bool
    rope_theta: float = 10000.0
    rms_eps: float = 1e-5
    max_context: int = 8192

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def config(self) -> dict[str, Any]:
        """The fields of a Hugging Face config.json."""
        return {
            "architectures": [{"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[self.family]],
            "model_type": self.family, "hidden_act": "silu", "torch_dtype": "bfloat16",
            "hidden_size": self.hidden, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads,
            "intermediate_size": self.intermediate, "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied, "rope_theta": self.rope_theta,
            "rms_norm_eps": self.rms_eps, "max_position_embeddings": self.max_context,
            "bos_token_id": 0, "eos_token_id": 0,
        }  # fmt: skip

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor by its Hugging Face name, in the order of the layers."""
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab, self.hidden)
        }
        for layer in range(self.layers):
            for name, shape in self._layer().items():
                shapes[f"model.layers.{layer}.{name}"] = shape
        shapes["model.norm.weight"] = (self.hidden,)
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocab, self.hidden)
        return shapes

    def _layer(self) -> dict[str, tuple[int, ...]]:
        key = self.kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (self.hidden,),
            "self_attn.q_proj.weight": (self.hidden, self.hidden),
            "self_attn.k_proj.weight": (key, self.hidden),
            "self_attn.v_proj.weight": (key, self.hidden),
            "self_attn.o_proj.weight": (self.hidden, self.hidden),
            "post_attention_layernorm.weight": (self.hidden,),
            "mlp.gate_proj.weight": (self.intermediate, self.hidden),
            "mlp.up_proj.weight": (self.intermediate, self.hidden),
            "mlp.down_proj.weight": (self.hidden, self.intermediate),
        }
        if self.family == "qwen2":
            for name, rows in (("q", self.hidden), ("k", key), ("v", key)):
                shapes[f"self_attn.{name}_proj.bias"] = (rows,)
        return shapes

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.tensors().values())

    @property
    def head(self) -> str:
        """The tensor that the logits are computed with."""
        return "model.embed_tokens.weight" if self.tied else "lm_head.weight"

    def bits_per_weight(self, of: Callable[[str, tuple[int, ...]], float]) -> float:
        """Of what a decode step reads; `of(name, sizes)`: bits per weight of one matrix, with scales."""
        skipped = "" if self.tied else "model.embed_tokens.weight"
        matrices = {n: s for n, s in self.tensors().items() if len(s) == 2 and n != skipped}
        bits = sum(of(name, sizes) * math.prod(sizes) for name, sizes in matrices.items())
        return round(bits / self.read_per_step, 3)

    @property
    def read_per_step(self) -> int:
        """Weights that a decode step reads: every matrix once; of the embedding, only the head."""
        matrices = sum(math.prod(shape) for shape in self.tensors().values() if len(shape) == 2)
        return matrices if self.tied else matrices - self.vocab * self.hidden

    def prefill_flops(self, tokens: int) -> int:
        """Of a prompt: every layer for every token, causal attention, the head for the last one."""
        head = self.vocab * self.hidden
        pairs = tokens * (tokens + 1) // 2
        attention = 4 * self.layers * self.heads * self.head_dim * pairs
        return 2 * tokens * (self.read_per_step - head) + 2 * head + attention

    @property
    def kv_values_per_token(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("pico", "llama", 256, 8, 4, 2, 768, 4096, tied=True),
        Shape("m01", "llama", 768, 12, 12, 4, 2048, 32000, tied=True),
        # Qwen2.5-0.5B
        Shape("m05", "qwen2", 896, 24, 14, 2, 4864, 151936, tied=True, rope_theta=1e6, rms_eps=1e-6),
        # TinyLlama-1.1B
        Shape("m11", "llama", 2048, 22, 32, 4, 5632, 32000, tied=False),
    )
}  # fmt: skip
