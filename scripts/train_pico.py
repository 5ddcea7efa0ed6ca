#!/usr/bin/env python3
"""Train models/pico, the small Llama-architecture model that ships with the repository.

Text: the sources, docstrings and reference topics of the running interpreter's standard library.
The run is a function of that text, the seed and the number of steps; `--minutes` only chooses the
number of steps, from the throughput it measures. This script knows nothing about serving.

    python scripts/train_pico.py --out models/pico --minutes 75 --seed 1 --threads 1
    python scripts/train_pico.py --out models/pico --eval
"""

from __future__ import annotations

import argparse
import ast
import ctypes
import datetime
import hashlib
import importlib
import inspect
import io
import json
import math
import os
import platform
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

Tokens = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0
HELD_OUT_ONE_IN = 20
TOKENS_PER_STEP = 4096
LEARNING_RATE = 2e-3
WARMUP_STEPS = 150
WEIGHT_DECAY = 0.1
GRADIENT_NORM_MAX = 1.0
ATTENTION_BLOCK = 256
CHECKPOINT_TOKENS = 32769  # of the held-out text, to choose which checkpoint is exported

# Sequence length of each part of training, and its share of the time. The last part is as long as
# the context, so that every position has been trained.
PHASES = ((512, 0.75), (2048, 0.25))

SAMPLE_PROMPTS = (
    "import os\nimport sys\n\ndef main(",
    "    def __init__(self, host, port, timeout=None):\n        self.host = host",
    "for i in range(",
    "try:\n    import json\nexcept",
    'The "for" statement is used to',
    "Return a list of",
)


# ---------------------------------------------------------------------------------------- corpus

SKIPPED_DIRECTORIES = {
    "__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test",
    "encodings",  # character tables, not prose and not code
    "pydoc_data",  # read as plain text by topic_documents()
}  # fmt: skip
BUILTIN_MODULES = (
    "_bisect", "_codecs", "_collections", "_csv", "_functools", "_heapq", "_io", "_json", "_random",
    "_socket", "_sre", "_struct", "_thread", "_warnings", "_weakref", "array", "atexit", "binascii",
    "builtins", "cmath", "errno", "faulthandler", "fcntl", "gc", "itertools", "marshal", "math",
    "mmap", "posix", "pwd", "resource", "select", "signal", "sys", "time", "types", "unicodedata",
    "zlib",
)  # fmt: skip


@dataclass(frozen=True)
class Document:
    """One separately shuffled piece of text; `held_out` ones are never trained on."""

    name: str
    text: str
    held_out: bool


def is_held_out(name: str) -> bool:
    """Whole files are held out, by name, so that the split is the same on every machine."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0


def source_documents(stdlib: Path) -> Iterator[Document]:
    """Every .py and .txt file of the standard library, without tests and generated tables."""
    for path in sorted(stdlib.rglob("*")):
        name = path.relative_to(stdlib).as_posix()
        skipped = SKIPPED_DIRECTORIES.intersection(name.split("/")) or "config-" in name
        if skipped or path.suffix not in {".py", ".txt"} or path.name.startswith("_sysconfigdata"):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if len(text) >= 64:
            yield Document(name, text, is_held_out(name))


def docstring_document(source: Document) -> Document | None:
    """The longer docstrings of a module as plain prose, so that unindented text is learnt too."""
    try:
        tree = ast.parse(source.text)
    except SyntaxError:
        return None
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
    prose = "\n\n".join(text for text in texts if len(text) >= 160)
    return Document(f"docstrings:{source.name}", prose + "\n", source.held_out) if prose else None


def topic_documents() -> Iterator[Document]:
    """The language reference, as `help("with")` shows it."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for topic, text in sorted(topics.items()):
        yield Document(f"topic:{topic}", text, is_held_out(f"topic:{topic}"))


def method_docstrings(owner: str, member: object) -> Iterator[str]:
    """The longer docstrings of a class's own attributes; nothing for what is not a class."""
    attributes = vars(member) if inspect.isclass(member) else {}
    for name, attribute in sorted(attributes.items()):
        doc = getattr(attribute, "__doc__", None)
        if not name.startswith("__") and isinstance(doc, str) and len(doc) > 60:
            yield f"{owner}.{name}\n\n{doc}"


def builtin_documents() -> Iterator[Document]:
    """Docstrings of what is written in C: the module, its members, and theirs."""
    for module_name in BUILTIN_MODULES:
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            continue
        parts = [inspect.getdoc(module) or ""]
        for member_name, member in sorted(vars(module).items()):
            if member_name.startswith("__") or not (inspect.isclass(member) or callable(member)):
                continue
            parts.append(f"{module_name}.{member_name}\n\n{inspect.getdoc(member) or ''}")
            parts.extend(method_docstrings(member_name, member))
        name = f"builtin:{module_name}"
        yield Document(name, "\n\n".join(parts) + "\n", is_held_out(name))


def collect_documents() -> list[Document]:
    """The corpus, in a fixed order."""
    sources = list(source_documents(Path(sysconfig.get_path("stdlib"))))
    documents = [*sources, *topic_documents(), *builtin_documents()]
    for source in sources:
        prose = docstring_document(source) if source.name.endswith(".py") else None
        if prose is not None and not prose.held_out:  # held-out text is not counted twice
            documents.append(prose)
    assert len({document.name for document in documents}) == len(documents)
    return documents


def corpus_digest(documents: list[Document]) -> str:
    """sha256 over names and texts: two machines with the same digest train on the same text."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(hashlib.sha256(document.name.encode()).digest())
        digest.update(hashlib.sha256(document.text.encode()).digest())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE: all 256 bytes are in the vocabulary, so any text makes the round trip."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    assert tokenizer.token_to_id(END_OF_TEXT) == END_OF_TEXT_ID
    assert tokenizer.get_vocab_size() == vocab_size
    return tokenizer


def encode_documents(tokenizer: Tokenizer, texts: list[str]) -> list[Tokens]:
    """Each document's tokens, ended by the separator."""
    encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    return [np.array([*encoding.ids, END_OF_TEXT_ID], dtype=np.int64) for encoding in encodings]


@dataclass(frozen=True)
class Corpus:
    """Token streams. `held_out` starts with a separator, so its first real token has a context."""

    train_documents: list[Tokens]
    held_out: Tokens
    train_bytes: int
    held_out_bytes: int
    document_count: int
    digest: str

    @property
    def train_tokens(self) -> int:
        return sum(len(document) for document in self.train_documents)


def tokenize_corpus(documents: list[Document], tokenizer: Tokenizer) -> Corpus:
    train = [document.text for document in documents if not document.held_out]
    held_out = [document.text for document in documents if document.held_out]
    separator = np.array([END_OF_TEXT_ID], dtype=np.int64)
    return Corpus(
        train_documents=encode_documents(tokenizer, train),
        held_out=np.concatenate([separator, *encode_documents(tokenizer, held_out)]),
        train_bytes=sum(len(text.encode()) for text in train),
        held_out_bytes=sum(len(text.encode()) for text in held_out),
        document_count=len(documents),
        digest=corpus_digest(documents),
    )


class WindowSampler:
    """Batches as a pure function of (seed, phase, step), so a resumed run sees the same ones.

    Each pass shuffles the documents, joins them, cuts the stream into windows and shuffles those.
    """

    def __init__(self, documents: list[Tokens], seed: int, phase: int, length: int) -> None:
        self._documents = documents
        self._key = [seed, phase]
        self._length = length
        self._batch = TOKENS_PER_STEP // length
        total = sum(len(document) for document in documents)
        self._batches_per_pass = (total - 1) // length // self._batch
        self._pass = -1
        self._windows: Tokens = np.empty((0, length + 1), dtype=np.int64)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of one step: two int64 tensors [batch, length]."""
        number, index = divmod(step, self._batches_per_pass)
        if number != self._pass:
            self._cut(number)
        rows = torch.from_numpy(self._windows[index * self._batch : (index + 1) * self._batch])
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def _cut(self, number: int) -> None:
        rng = np.random.default_rng([*self._key, number])
        order = rng.permutation(len(self._documents))
        stream = np.concatenate([self._documents[i] for i in order])
        stream = np.roll(stream, int(rng.integers(len(stream))))
        starts = np.arange((len(stream) - 1) // self._length) * self._length
        starts = rng.permutation(starts)
        self._windows = stream[starts[:, None] + np.arange(self._length + 1)]
        self._pass = number


# ----------------------------------------------------------------------------------------- model


@dataclass(frozen=True)
class PicoConfig:
    """The sizes, under their Hugging Face names."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 8
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02

    def to_hugging_face(self) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **asdict(self),
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "rope_scaling": None,
            "tie_word_embeddings": True,
            "bos_token_id": END_OF_TEXT_ID,
            "eos_token_id": END_OF_TEXT_ID,
            "torch_dtype": "bfloat16",
            "use_cache": True,
        }


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, halves convention; x [batch, heads, length, head_dim]."""
    wide = x.float()
    left, right = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-right, left), dim=-1) * sin).to(x.dtype)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Grouped causal attention, the softmax in float32.

    q [batch, heads, length, head_dim]; k and v [batch, KV heads, length, head_dim]. A block of
    queries sees only the keys up to its end. On the CPUs tried, this under torch.compile is 1.6
    times as fast as scaled_dot_product_attention in bf16.
    """
    batch, heads, length, size = q.shape
    kv_heads = k.shape[1]
    blocks = []
    for start in range(0, length, ATTENTION_BLOCK):
        end = min(start + ATTENTION_BLOCK, length)
        count = end - start
        grouped = q[:, :, start:end].reshape(batch, kv_heads, -1, size)
        scores = (grouped @ k[:, :, :end].transpose(-1, -2)).float() * size**-0.5
        future = torch.full((count, end), -math.inf).triu(start + 1)
        scores = scores.view(batch, kv_heads, -1, count, end) + future
        weights = torch.softmax(scores, dim=-1).to(q.dtype).view(batch, kv_heads, -1, end)
        blocks.append((weights @ v[:, :, :end]).view(batch, heads, count, size))
    return torch.cat(blocks, dim=2)


class Attention(nn.Module):
    def __init__(self, config: PicoConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        split = (batch, length, -1, self.head_dim)
        q = rotate(self.q_proj(x).view(split).transpose(1, 2), cos, sin)
        k = rotate(self.k_proj(x).view(split).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(split).transpose(1, 2)
        mixed = causal_attention(q, k, v)
        joined: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))
        return joined


class FeedForward(nn.Module):
    def __init__(self, config: PicoConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return result


class Layer(nn.Module):
    def __init__(self, config: PicoConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = FeedForward(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        change: Tensor = self.mlp(self.post_attention_layernorm(x))
        return x + change


class Decoder(nn.Module):
    def __init__(self, config: PicoConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Pico(nn.Module):
    """Llama with tied embeddings; the parameters have their Hugging Face names."""

    def __init__(self, config: PicoConfig) -> None:
        super().__init__()
        self.model = Decoder(config)
        half = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        positions = torch.arange(config.max_position_embeddings, dtype=torch.float32)
        angles = torch.outer(positions, config.rope_theta**-half).repeat(1, 2)
        self.cos, self.sin = angles.cos(), angles.sin()  # not buffers: they stay float32
        residual_scale = (2 * config.num_hidden_layers) ** -0.5
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                last = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = config.initializer_range * (residual_scale if last else 1.0)
                nn.init.normal_(parameter, std=std)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [batch, length, vocab] of int64 tokens [batch, length]."""
        length = tokens.shape[1]
        cos, sin = self.cos[:length], self.sin[:length]
        x = self.model.embed_tokens(tokens)
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)

    def mean_loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy in nats per token, the softmax in float32."""
        return F.cross_entropy(self(inputs).float().flatten(0, 1), targets.flatten())

    def compile_layers(self) -> None:
        """One compiled graph serves all layers, so compiling takes seconds and not minutes."""
        for layer in self.model.layers:
            layer.compile(dynamic=False)


@torch.no_grad()
def stream_losses(model: nn.Module, stream: Tokens, context: int) -> Floats:
    """Nats for each token of `stream` but the first, in windows of `context` without overlap."""
    losses: list[Tensor] = []
    for start in range(0, len(stream) - 1, context):
        window = torch.from_numpy(stream[start : start + context + 1])
        logits = model(window[None, :-1])[0].float()
        losses.append(F.cross_entropy(logits, window[1:], reduction="none"))
    result: Floats = torch.cat(losses).double().numpy()
    return result


# ------------------------------------------------------------------------------------- baselines


def kneser_ney_losses(train: Tokens, stream: Tokens, order: int, vocab_size: int) -> Floats:
    """Nats for each token of `stream` but the first, under interpolated Kneser-Ney.

    One discount for each order, n1 / (n1 + 2 n2) (Ney, Essen and Kneser, 1994). A gram is one
    integer, the oldest token in its highest digit: `gram // vocab` is its context and
    `gram % vocab**(order - 1)` is the gram without its oldest token.
    """
    assert vocab_size**order < 2**62
    padding = np.zeros(order - 2, dtype=np.int64)
    stream = np.concatenate([padding, stream])  # as if separators came before the stream
    grams, counts = np.unique(_grams(train, order, vocab_size), return_counts=True)
    levels = [(grams, counts)]
    for lower in range(order - 1, 0, -1):  # how many different tokens precede the shorter gram
        grams, counts = np.unique(grams % vocab_size**lower, return_counts=True)
        levels.append((grams, counts))
    queries = _grams(stream, order, vocab_size)
    probability = np.full(len(queries), 1.0 / vocab_size)
    for length, (grams, counts) in enumerate(reversed(levels), start=1):
        query = queries % vocab_size**length
        probability = _interpolate(grams, counts, query, vocab_size, probability)
    losses: Floats = -np.log(probability)
    return losses


def _grams(stream: Tokens, order: int, vocab_size: int) -> Tokens:
    count = len(stream) - order + 1
    grams = np.zeros(count, dtype=np.int64)
    for offset in range(order):
        grams = grams * vocab_size + stream[offset : offset + count]
    return grams


def _interpolate(
    grams: Tokens, counts: Tokens, query: Tokens, vocab_size: int, lower: Floats
) -> Floats:
    """Discounted counts of one order, the discounted mass spread as `lower` says."""
    contexts, starts = np.unique(grams // vocab_size, return_index=True)
    totals = np.add.reduceat(counts, starts)
    kinds = np.diff(np.append(starts, len(grams)))
    singles, doubles = int((counts == 1).sum()), int((counts == 2).sum())
    discount = singles / (singles + 2 * doubles) if singles else 0.5
    count = _look_up(grams, counts, query)
    total = _look_up(contexts, totals, query // vocab_size)
    kind = _look_up(contexts, kinds, query // vocab_size)
    mixed = np.maximum(count - discount, 0.0) + discount * kind * lower
    return np.where(total > 0, mixed / np.maximum(total, 1), lower)


def _look_up(keys: Tokens, values: Tokens, query: Tokens) -> Tokens:
    """The value at each key, 0 where it is missing; `keys` are sorted."""
    index = np.minimum(np.searchsorted(keys, query), len(keys) - 1)
    return np.where(keys[index] == query, values[index], 0)


def unigram_losses(train: Tokens, stream: Tokens, vocab_size: int) -> Floats:
    """Nats for each token of `stream` but the first, under add-one unigram counts."""
    counts = np.bincount(train, minlength=vocab_size) + 1
    losses: Floats = -np.log(counts / counts.sum())[stream[1:]]
    return losses


def summarise(losses: Floats, text_bytes: int) -> dict[str, float]:
    """Perplexity for each token, and bits for each byte of the text."""
    bits = float(losses.sum()) / math.log(2) / text_bytes
    return {"perplexity": math.exp(float(losses.mean())), "bits_per_byte": bits}


def baselines(corpus: Corpus, vocab_size: int) -> dict[str, dict[str, float]]:
    train = np.concatenate(corpus.train_documents)
    rows = {"unigram": unigram_losses(train, corpus.held_out, vocab_size)}
    for order in (3, 5):
        rows[f"{order}-gram"] = kneser_ney_losses(train, corpus.held_out, order, vocab_size)
    return {name: summarise(losses, corpus.held_out_bytes) for name, losses in rows.items()}


# ---------------------------------------------------------------------------------------- export


def write_atomically(path: Path, data: bytes) -> None:
    """Readers see the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    temporary.chmod(0o644)
    temporary.replace(path)


def write_json(path: Path, value: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def export_tokenizer(out: Path, tokenizer: Tokenizer, config: PicoConfig) -> None:
    """Everything but the weights: known before training starts."""
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "tokenizer.json", (tokenizer.to_str(pretty=True) + "\n").encode())
    write_json(out / "config.json", config.to_hugging_face())
    special = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
    write_json(out / "special_tokens_map.json", special)
    write_json(
        out / "tokenizer_config.json",
        {
            **special,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": config.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
        },
    )
    ids = {"bos_token_id": END_OF_TEXT_ID, "eos_token_id": END_OF_TEXT_ID}
    write_json(out / "generation_config.json", ids)


def export_weights(out: Path, model: Pico) -> None:
    """model.safetensors in bf16; no lm_head, it is tied to the embeddings."""
    weights = {
        name: tensor.detach().to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
    }
    data = safetensors.torch.save(weights, metadata={"format": "pt"})
    write_atomically(out / "model.safetensors", data)


def load_exported(out: Path) -> Pico:
    """The exported weights, computing in float32."""
    raw = json.loads((out / "config.json").read_text(encoding="utf-8"))
    model = Pico(PicoConfig(**{name: raw[name] for name in asdict(PicoConfig())}))
    model.load_state_dict(safetensors.torch.load_file(out / "model.safetensors"))
    return model.float().eval()


@torch.no_grad()
def continue_text(model: Pico, tokenizer: Tokenizer, prompt: str, temperature: float) -> str:
    """Up to 64 more tokens, greedily at temperature 0."""
    generator = torch.Generator().manual_seed(0)
    tokens = list(tokenizer.encode(prompt).ids)
    start = len(tokens)
    while len(tokens) < start + 64:
        logits = model(torch.tensor([tokens]))[0, -1].float()
        if temperature == 0:
            chosen = int(logits.argmax())
        else:
            weights = torch.softmax(logits / temperature, dim=-1)
            chosen = int(torch.multinomial(weights, 1, generator=generator))
        if chosen == END_OF_TEXT_ID:
            break
        tokens.append(chosen)
    return tokenizer.decode(tokens[start:])


# -------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Plan:
    """How many steps each phase has; the learning rate is a function of the step."""

    steps: tuple[int, ...]

    @property
    def total(self) -> int:
        return sum(self.steps)

    def phase(self, step: int) -> tuple[int, int]:
        """(phase, step inside it)."""
        assert 0 <= step < self.total
        for phase, steps in enumerate(self.steps):
            if step < steps:
                return phase, step
            step -= steps
        raise AssertionError

    def learning_rate(self, step: int) -> float:
        """A linear warm-up, then a cosine down to 1% of the peak."""
        if step < WARMUP_STEPS:
            return LEARNING_RATE * (step + 1) / WARMUP_STEPS
        progress = (step - WARMUP_STEPS) / max(1, self.total - WARMUP_STEPS)
        return LEARNING_RATE * (0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * progress)))


class Trainer:
    """bf16 weights for the arithmetic, float32 copies for AdamW; it owns both."""

    def __init__(self, config: PicoConfig, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = Pico(config)
        self._masters = [parameter.detach().clone() for parameter in self.model.parameters()]
        self.model.bfloat16()
        self.model.compile_layers()
        matrices = [master for master in self._masters if master.ndim == 2]
        vectors = [master for master in self._masters if master.ndim == 1]
        self._optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": WEIGHT_DECAY},
                {"params": vectors, "weight_decay": 0.0},
            ],
            betas=(0.9, 0.95),
            fused=True,
        )

    def gradients(self, inputs: Tensor, targets: Tensor) -> float:
        """Leaves the gradients in the bf16 parameters and gives the loss."""
        loss = self.model.mean_loss(inputs, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    def clear_gradients(self) -> None:
        self.model.zero_grad(set_to_none=True)

    def step(self, inputs: Tensor, targets: Tensor, learning_rate: float) -> float:
        loss = self.gradients(inputs, targets)
        for parameter, master in zip(self.model.parameters(), self._masters, strict=True):
            assert parameter.grad is not None
            master.grad = parameter.grad.float()
        torch.nn.utils.clip_grad_norm_(self._masters, GRADIENT_NORM_MAX)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self.copy_masters()
        self.clear_gradients()
        return loss

    @torch.no_grad()
    def copy_masters(self) -> None:
        for parameter, master in zip(self.model.parameters(), self._masters, strict=True):
            parameter.copy_(master)

    def save(self, path: Path, extra: dict[str, Any]) -> None:
        state = {**extra, "masters": self._masters, "optimizer": self._optimizer.state_dict()}
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomically(path, buffer.getvalue())

    def restore(self, path: Path) -> dict[str, Any]:
        state: dict[str, Any] = torch.load(path, weights_only=True)
        for master, saved in zip(self._masters, state.pop("masters"), strict=True):
            master.copy_(saved)
        self._optimizer.load_state_dict(state.pop("optimizer"))
        self.copy_masters()
        return state


def plan_from_minutes(trainer: Trainer, samplers: list[WindowSampler], minutes: float) -> Plan:
    """Time each phase's step and fill 95% of the minutes."""
    steps = []
    for sampler, (length, share) in zip(samplers, PHASES, strict=True):
        batch = sampler.batch(0)
        trainer.gradients(*batch)
        start = time.perf_counter()
        for _ in range(6):
            trainer.gradients(*batch)
        seconds = (time.perf_counter() - start) / 6 + 0.03  # the optimizer's part
        trainer.clear_gradients()
        log(f"length {length}: {TOKENS_PER_STEP / seconds:.0f} tokens/s")
        steps.append(max(1, round(0.95 * minutes * 60 * share / seconds)))
    return Plan(tuple(steps))


def log(message: str) -> None:
    print(f"{datetime.datetime.now():%H:%M:%S} {message}", flush=True)


@dataclass
class Progress:
    """What a checkpoint keeps besides the weights."""

    plan: Plan
    step: int = 0
    seconds: float = 0.0
    best: dict[int, float] = field(default_factory=dict)  # sequence length -> perplexity

    def to_dict(self) -> dict[str, Any]:
        return {
            "steps": list(self.plan.steps),
            "step": self.step,
            "seconds": self.seconds,
            "best": self.best,
        }

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Progress:
        plan = Plan(tuple(raw["steps"]))
        return cls(plan, raw["step"], raw["seconds"], raw["best"])


class Run:
    """One training run: steps, and now and then a checkpoint and an export."""

    def __init__(self, options: argparse.Namespace, config: PicoConfig, corpus: Corpus) -> None:
        self._out: Path = options.out
        self._state: Path = options.state
        self._every: int = options.export_every
        self._corpus = corpus
        self._config = config
        self._trainer = Trainer(config, options.seed)
        self._samplers = [
            WindowSampler(corpus.train_documents, options.seed, phase, length)
            for phase, (length, _) in enumerate(PHASES)
        ]
        self.progress = self._start(options)

    def _start(self, options: argparse.Namespace) -> Progress:
        if options.resume:
            return Progress.from_dict(self._trainer.restore(self._state))
        if options.steps:
            return Progress(Plan(tuple(options.steps)))
        return Progress(plan_from_minutes(self._trainer, self._samplers, options.minutes))

    def train(self) -> None:
        plan, progress = self.progress.plan, self.progress
        log(f"steps {plan.steps}, {TOKENS_PER_STEP} tokens each; at step {progress.step}")
        losses: list[float] = []
        while progress.step < plan.total:
            start = time.perf_counter()
            phase, index = plan.phase(progress.step)
            batch = self._samplers[phase].batch(index)
            losses.append(self._trainer.step(*batch, plan.learning_rate(progress.step)))
            progress.step += 1
            progress.seconds += time.perf_counter() - start
            if progress.step % 50 == 0:
                rate = progress.step * TOKENS_PER_STEP / progress.seconds
                log(f"step {progress.step} loss {np.mean(losses):.4f} {rate:.0f} tokens/s")
                losses.clear()
            if progress.step % self._every == 0 or progress.step == plan.total:
                self._checkpoint()

    def _checkpoint(self) -> None:
        """Save the state; export when the held-out text says that it is the best so far.

        The windows are as long as the phase's sequences: a model that has seen 512 positions is
        measured on 512, and the first checkpoint of a longer phase is exported whatever it says.
        """
        start = time.perf_counter()
        candidate = Pico(self._config)
        candidate.load_state_dict(self._trainer.model.state_dict())
        length = PHASES[self.progress.plan.phase(self.progress.step - 1)[0]][0]
        losses = stream_losses(candidate.eval(), self._corpus.held_out[:CHECKPOINT_TOKENS], length)
        perplexity = math.exp(float(losses.mean()))
        log(f"step {self.progress.step} held-out perplexity {perplexity:.3f} at length {length}")
        if perplexity < self.progress.best.get(length, math.inf):
            self.progress.best[length] = perplexity
            export_weights(self._out, candidate)
        self.progress.seconds += time.perf_counter() - start
        self._trainer.save(self._state, self.progress.to_dict())


# ------------------------------------------------------------------------------------ model card


def evaluate(out: Path) -> dict[str, Any]:
    """Held-out figures of an exported directory, computed in float32 from its bf16 weights."""
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    corpus = tokenize_corpus(collect_documents(), tokenizer)
    model = load_exported(out)
    context = json.loads((out / "config.json").read_text())["max_position_embeddings"]
    losses = stream_losses(model, corpus.held_out, context)
    late = np.arange(len(losses)) % context >= context // 2
    return {
        "corpus_digest": corpus.digest,
        "documents": corpus.document_count,
        "train_bytes": corpus.train_bytes,
        "train_tokens": corpus.train_tokens,
        "held_out_bytes": corpus.held_out_bytes,
        "held_out_tokens": len(losses),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "context": context,
        "pico": summarise(losses, corpus.held_out_bytes),
        "late_position_perplexity": math.exp(float(losses[late].mean())),
        "baselines": baselines(corpus, tokenizer.get_vocab_size()),
    }


def sample_text(out: Path) -> str:
    """Markdown: what the exported model writes after each of SAMPLE_PROMPTS."""
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    model = load_exported(out)
    parts = []
    for prompt in SAMPLE_PROMPTS:
        for label, temperature in (("greedy", 0.0), ("temperature 0.7", 0.7)):
            text = continue_text(model, tokenizer, prompt, temperature)
            parts.append(f"{label}, after `{json.dumps(prompt)}`:\n\n~~~text\n{prompt}{text}\n~~~")
    return "\n\n".join(parts)


def training_record(options: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """What the card says about the run itself."""
    plan = progress.plan
    return {
        "seed": options.seed,
        "steps": list(plan.steps),
        "lengths": [length for length, _ in PHASES],
        "tokens": plan.total * TOKENS_PER_STEP,
        "seconds": round(progress.seconds),
        "threads": options.threads,
        "machine": f"{cpu_name()}, {options.threads} thread(s) of {os.cpu_count()} CPU(s)",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")


CARD = """---
license: other
license_name: psf-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# pico

A {parameters_millions:.2f} M parameter Llama-architecture model that continues Python source and
its documentation. It exists so that a serving system can be built, tested and shown on any machine,
with real weights and a real tokenizer. `scripts/train_pico.py` made it and wrote this card.

| | |
|---|---|
| architecture | `LlamaForCausalLM`, tied embeddings, bf16 |
| layers, hidden, feed-forward | {layers}, {hidden}, {feed_forward} |
| query heads, KV heads, head size | {heads}, {kv_heads}, {head_dim} |
| vocabulary | {vocab}, byte-level BPE |
| context | {context} |

One special token, `<|endoftext|>` (id 0), stands between documents: it is bos and eos. The
tokenizer does not add it; a prompt may start with it to say that a document begins.

## Data

The standard library of CPython {python}: its `.py` and `.txt` files without tests and the character
tables of `encodings`; the language reference topics of `pydoc_data`; the docstrings of {builtins}
modules written in C; and, once more as plain prose, the longer docstrings of the training files.
One file in {one_in}, chosen by the sha256 of its name, is held out whole. The tokenizer has seen
the training part only.

| | bytes | tokens |
|---|---|---|
| training | {train_bytes:,} | {train_tokens:,} |
| held out | {held_out_bytes:,} | {held_out_tokens:,} |

{documents} documents; corpus sha256 `{corpus_digest}`.

## Training

{phases}.
{tokens:,} tokens in all ({passes:.1f} passes), {tokens_per_step} a step, seed {seed}.
AdamW (0.9, 0.95), weight decay {decay}, peak learning rate {rate}, {warmup} warm-up steps, cosine
to 1%, gradients clipped at {clip}; bf16 arithmetic, float32 master weights.
{minutes:.0f} minutes ({speed:.0f} tokens/s) on {machine}; torch {torch}.

To repeat it: `python scripts/train_pico.py --out DIR --seed {seed} --threads {threads} --steps
{steps_text}`. The same corpus, seed, steps and torch build give the same batches; the arithmetic of
another CPU, or thread count, may round differently.

## Held-out text

Float32 arithmetic on the bf16 weights, windows of {context} without overlap, every token counted
once. The n-grams are interpolated Kneser-Ney on the same tokens, computed by the same script.

| | perplexity per token | bits per byte |
|---|---|---|
{rows}

On positions {half} to {context} of a window alone, pico's perplexity is {late:.2f}.

`python scripts/train_pico.py --out models/pico --eval` computes these figures again.

## What it writes

One draw each (seed 0), the first 64 tokens, after the prompt alone. Greedy text soon repeats itself;
a temperature of 0.7 reads better.

{samples}

## Licence and limits

The text is CPython's, under the PSF licence version 2 (a few of its files carry permissive notices
of their own); the weights are offered under the same. The model knows the shape of Python and of
its documentation, and little else. It states falsehoods, invents names and repeats itself, and it
can repeat passages of the standard library. It was not made to follow instructions. Use it to test
a server, not to learn from.
"""


def render_card(
    config: PicoConfig, run: dict[str, Any], figures: dict[str, Any], samples: str
) -> str:
    scores = {**figures["baselines"], "**pico**": figures["pico"]}
    rows = [
        f"| {name} | {score['perplexity']:.2f} | {score['bits_per_byte']:.3f} |"
        for name, score in scores.items()
    ]
    phases = zip(run["steps"], run["lengths"], strict=True)
    return CARD.format(
        **{**figures, **run},
        parameters_millions=figures["parameters"] / 1e6,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        feed_forward=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        vocab=config.vocab_size,
        builtins=len(BUILTIN_MODULES),
        one_in=HELD_OUT_ONE_IN,
        phases=", then ".join(f"{n} steps on sequences of {length}" for n, length in phases),
        passes=run["tokens"] / figures["train_tokens"],
        tokens_per_step=TOKENS_PER_STEP,
        decay=WEIGHT_DECAY,
        rate=LEARNING_RATE,
        warmup=WARMUP_STEPS,
        clip=GRADIENT_NORM_MAX,
        minutes=run["seconds"] / 60,
        speed=run["tokens"] / run["seconds"],
        steps_text=" ".join(map(str, run["steps"])),
        rows="\n".join(rows),
        half=figures["context"] // 2,
        late=figures["late_position_perplexity"],
        samples=samples,
    )


# ------------------------------------------------------------------------------------------ main


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the model directory")
    parser.add_argument("--minutes", type=float, default=75.0, help="of training, about")
    parser.add_argument(
        "--steps", type=int, nargs=len(PHASES), help="of each phase, in place of --minutes"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--cpus", type=int, nargs="*", help="pin the process to these CPUs")
    parser.add_argument(
        "--state", type=Path, default=Path("/tmp/train_pico.pt"), help="checkpoint, not for export"
    )
    parser.add_argument("--resume", action="store_true", help="go on from --state")
    parser.add_argument("--export-every", type=int, default=500, metavar="STEPS")
    parser.add_argument("--eval", action="store_true", help="print held-out figures as JSON, stop")
    parser.add_argument("--card", action="store_true", help="write README.md again, stop")
    return parser.parse_args()


def set_up_process(options: argparse.Namespace) -> None:
    if options.cpus:
        os.sched_setaffinity(0, options.cpus)
    torch.set_num_threads(options.threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Large tensors come and go each step; glibc would map and unmap them each time, and the page
    # faults cost a fifth of the step. Limits: no mmap, keep 2 GiB, grow by 256 MiB.
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):
            libc.mallopt(option, value)


def train(options: argparse.Namespace) -> None:
    config = PicoConfig()
    documents = collect_documents()
    log(f"{len(documents)} documents, sha256 {corpus_digest(documents)}")
    texts = [document.text for document in documents if not document.held_out]
    tokenizer = train_tokenizer(texts, config.vocab_size)
    export_tokenizer(options.out, tokenizer, config)
    corpus = tokenize_corpus(documents, tokenizer)
    log(f"{corpus.train_tokens} training tokens, {len(corpus.held_out)} held out")
    run = Run(options, config, corpus)
    run.train()
    record = training_record(options, run.progress)
    write_json(options.out / "training.json", {"run": record, "held_out": evaluate(options.out)})
    write_card(options.out)


def write_card(out: Path) -> None:
    """README.md, from training.json and the exported weights."""
    saved = json.loads((out / "training.json").read_text(encoding="utf-8"))
    card = render_card(PicoConfig(), saved["run"], saved["held_out"], sample_text(out))
    write_atomically(out / "README.md", card.encode())


def main() -> None:
    options = parse_options()
    set_up_process(options)
    if options.eval:
        print(json.dumps(evaluate(options.out)))
    elif options.card:
        write_card(options.out)
    else:
        train(options)


if __name__ == "__main__":
    main()
