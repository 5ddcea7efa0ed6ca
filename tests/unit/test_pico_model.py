"""The shipped model is what its card says, and the script that makes it keeps its rules."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")
from tokenizers import Tokenizer  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))  # as when scripts/train_pico.py is run
from pico.export import load_exported  # noqa: E402
from pico.model import Pico, PicoConfig, stream_losses  # noqa: E402
from pico.ngram import kneser_ney_losses, summarise  # noqa: E402
from pico.training import LEARNING_RATE, WARMUP_STEPS, Plan, WindowSampler  # noqa: E402

PICO = ROOT / "models" / "pico"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(PICO / "tokenizer.json"))


def test_sizes() -> None:
    """GQA, at least 8 layers, head size 64, context at least 2048, at most 40 MB."""
    config = json.loads((PICO / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["num_hidden_layers"] >= 8
    assert config["head_dim"] == 64
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["max_position_embeddings"] >= 2048
    assert sum(path.stat().st_size for path in PICO.iterdir()) <= 40_000_000


def test_weights_have_hugging_face_names() -> None:
    """bf16, 5 to 20 million parameters, every name of the architecture and no tied copy."""
    weights = safetensors_torch.load_file(PICO / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert 5e6 <= sum(tensor.numel() for tensor in weights.values()) <= 20e6
    assert set(weights) == set(Pico(PicoConfig()).state_dict())
    assert "model.layers.7.self_attn.k_proj.weight" in weights
    assert "lm_head.weight" not in weights


@pytest.mark.parametrize(
    "text", ["", "def f(x):\n\treturn x  \r\n", "naïve 世界 🎉 \x00\x7f", "a" * 300, " \n \n"]
)
def test_any_text_makes_the_round_trip(tokenizer: Tokenizer, text: str) -> None:
    """Decoding gives the text back, and encoding adds no special token."""
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert 0 not in ids


def test_one_token_is_bos_and_eos(tokenizer: Tokenizer) -> None:
    config = json.loads((PICO / "config.json").read_text())
    generation = json.loads((PICO / "generation_config.json").read_text())
    end_of_text = tokenizer.token_to_id("<|endoftext|>")
    for source in (config, generation):
        assert source["bos_token_id"] == source["eos_token_id"] == end_of_text
    assert tokenizer.get_vocab_size() == config["vocab_size"]


def test_it_has_learnt_python(tokenizer: Tokenizer) -> None:
    """New, ordinary code costs it less than 2 bits a byte; an untrained model pays more than 3."""
    text = (
        "class Counter:\n"
        '    """Count how many times each name is seen."""\n\n'
        "    def __init__(self):\n        self.names = {}\n\n"
        "    def add(self, name):\n"
        "        if name not in self.names:\n            self.names[name] = 0\n"
        "        self.names[name] += 1\n        return self.names[name]\n"
    )
    stream = np.array([0, *tokenizer.encode(text).ids], dtype=np.int64)
    trained = stream_losses(load_exported(PICO), stream, 2048)
    torch.manual_seed(0)
    untrained = stream_losses(Pico(PicoConfig()).eval(), stream, 2048)
    assert summarise(trained, len(text))["bits_per_byte"] < 2.0
    assert summarise(untrained, len(text))["bits_per_byte"] > 3.0


@pytest.mark.parametrize("order", [2, 3, 5])
def test_kneser_ney_is_a_distribution(order: int) -> None:
    """After any context, seen or not, the probabilities of all tokens add up to one."""
    vocab = 7
    train = np.random.default_rng(3).integers(0, vocab, 200)
    for context in ([1] * order, [2, 3, 4, 5, 6, 0][-order:]):
        total = 0.0
        for token in range(vocab):
            stream = np.array([*context, token], dtype=np.int64)
            total += math.exp(-kneser_ney_losses(train, stream, order, vocab)[-1])
        assert total == pytest.approx(1.0)


def test_batches_are_a_function_of_the_step() -> None:
    """A resumed run sees the batches that an unbroken one would; targets follow their inputs."""
    documents = [np.arange(start, start + 9000, dtype=np.int64) for start in (0, 10_000)]
    steps = [0, 1, 2, 3, 4, 5, 6]
    samplers = [WindowSampler(documents, seed=1, phase=0, length=512) for _ in range(2)]
    forwards = {step: samplers[0].batch(step) for step in steps}
    for step in reversed(steps):
        inputs, targets = samplers[1].batch(step)
        assert inputs.shape == targets.shape == (8, 512)
        assert torch.equal(inputs, forwards[step][0])
        assert torch.equal(targets[:, :-1], inputs[:, 1:])


def test_learning_rate_rises_then_falls_to_a_hundredth() -> None:
    plan = Plan((800, 200))
    rates = [plan.learning_rate(step) for step in range(plan.total)]
    assert max(rates) == pytest.approx(LEARNING_RATE, rel=1e-3)
    assert rates.index(max(rates)) in range(WARMUP_STEPS - 1, WARMUP_STEPS + 1)
    assert rates[-1] == pytest.approx(LEARNING_RATE / 100, rel=1e-2)
    assert plan.phase(799) == (0, 799)
    assert plan.phase(800) == (1, 0)
