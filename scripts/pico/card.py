"""The model card: held-out figures, samples and the record of the run, put into README.md.

It reads an exported directory, so the card can be written again without training.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from pico import END_OF_TEXT_ID
from pico.corpus import BUILTIN_MODULES, HELD_OUT_ONE_IN, collect_documents, tokenize_corpus
from pico.export import load_exported, write_atomically
from pico.model import Pico, PicoConfig, stream_losses
from pico.ngram import baselines, summarise
from pico.training import (
    GRADIENT_NORM_MAX,
    LEARNING_RATE,
    PHASES,
    TOKENS_PER_STEP,
    WARMUP_STEPS,
    WEIGHT_DECAY,
    Progress,
)

SAMPLE_PROMPTS = (
    "import os\nimport sys\n\ndef main(",
    "    def __init__(self, host, port, timeout=None):\n        self.host = host",
    "for i in range(",
    "try:\n    import json\nexcept",
    'The "for" statement is used to',
    "Return a list of",
)


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


def write_card(out: Path) -> None:
    """README.md, from training.json and the exported weights."""
    saved = json.loads((out / "training.json").read_text(encoding="utf-8"))
    card = render_card(PicoConfig(), saved["run"], saved["held_out"], sample_text(out))
    write_atomically(out / "README.md", card.encode())
