"""`baton accuracy`: what a weight format costs, in perplexity and in divergence from float32.

Each format computes the same text in windows without overlap, with the native engine as it serves: its
weights, activations and KV as they are stored. The reference is the checkpoint in float32 throughout.
The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from baton import machine
from baton.cluster import default_model
from services.engine.backend import Backend, Rows
from services.engine.checkpoint import WeightView, load_weights
from services.engine.identity import identify
from services.engine.load import Weights, packed_weights
from services.engine.model import ModelConfig
from services.engine.native_backend import NativeBackend, Weight
from services.engine.packed import PackedMatrix
from services.engine.weights.names import AS_IS, FORMATS
from services.engine.weights.plan import floats, items
from services.kv.heap import HeapPages
from services.kv.layout import blocks_for

Tokens = NDArray[np.int64]
CHUNK = 256  # rows of a pass, as in prefill
FLOAT32 = "float32"


@dataclass(frozen=True)
class Accuracy:
    """One format's figures. bits_per_weight: of the packed matrices, scales and padding counted; a
    format may keep the head in more bits. perplexity_change: from bf16's, in percent. kl: the mean
    divergence of the next token's distribution from float32's, in nats."""

    format: str
    bits_per_weight: float
    kv: str
    perplexity: float
    perplexity_change: float
    kl: float
    seconds: float


class Subject:
    """A model in one format, with room for one window."""

    def __init__(self, model: str, format: str, cache: str) -> None:
        identity = identify(
            model, kv_dtype="f32" if format == FLOAT32 else "auto", layers_per_group=1_000_000,
            prefill_device="cpu", decode_device="cpu",
        )  # fmt: skip
        self.config: ModelConfig = identity.config
        views = load_weights(model, self.config)
        weights: dict[str, Weight] = {**views}
        if format == FLOAT32:
            weights = {name: _wide(view) for name, view in views.items()}
        elif format != AS_IS:
            chosen = Weights(format, cache, identity.weights)
            weights = packed_weights(model, self.config, views, chosen)
        matrices = [weights[item.tensor] for item in items(self.config, AS_IS)]
        self.bits_per_weight = 8 * sum(map(_bytes, matrices)) / sum(map(_count, matrices))
        self.kv = identity.layout.kv_dtype
        layout = identity.layout
        self._pages = HeapPages(layout, blocks_for(self.config.max_context) * layout.groups)
        self._backend: Backend = NativeBackend(self.config, weights, self._pages)

    def distributions(self, window: Tokens) -> Iterator[NDArray[np.float64]]:
        """The logarithms of the next token's probabilities after each token: float64[rows, vocab] for
        one chunk of the window after another."""
        for start in range(0, len(window), CHUNK):
            tokens = window[start : start + CHUNK].astype(np.int32)
            at = np.arange(start, start + len(tokens), dtype=np.int32)
            self._backend.begin(Rows(tokens, at, np.zeros_like(at), self._pages.table))
            self._backend.run_group(0)
            logits = self._backend.logits(np.arange(len(tokens), dtype=np.int32)).astype(np.float64)
            logits -= logits.max(-1, keepdims=True)
            yield logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def measure(model: str, stream: Tokens, formats: Sequence[str], cache: str) -> list[Accuracy]:
    """The figures of float32, bf16 and `formats` over a stream of tokens, every token but the first
    predicted once."""
    names = list(dict.fromkeys((FLOAT32, "bf16", *formats)))
    subjects = {name: Subject(model, name, cache) for name in names}
    window = subjects[FLOAT32].config.max_context
    losses, divergences, seconds = (dict.fromkeys(names, 0.0) for _ in range(3))
    for start in range(0, len(stream) - 1, window):
        asked, answers = stream[start : start + window], stream[start + 1 : start + window + 1]
        asked = asked[: len(answers)]
        reference = list(subjects[FLOAT32].distributions(asked))
        for name, subject in subjects.items():
            begun = time.monotonic()
            for number, chunk in enumerate(subject.distributions(asked)):
                rows = np.arange(len(chunk))
                losses[name] -= chunk[rows, answers[number * CHUNK : (number + 1) * CHUNK]].sum()
                expected = reference[number]
                divergences[name] += float((np.exp(expected) * (expected - chunk)).sum())
            seconds[name] += time.monotonic() - begun
    count = len(stream) - 1
    base = losses["bf16"]
    return [
        Accuracy(
            name, round(subject.bits_per_weight, 3), subject.kv, math.exp(losses[name] / count),
            100 * math.expm1((losses[name] - base) / count), divergences[name] / count,
            round(seconds[name], 2),
        )
        for name, subject in subjects.items()
    ]  # fmt: skip


def held_out_stream(model: str) -> Tokens:
    """The text that the model that ships was not trained on, as scripts/train_pico.py splits it off."""
    scripts = Path(__file__).resolve().parent.parent / "scripts"
    sys.path.insert(0, str(scripts))
    from pico.corpus import collect_documents, tokenize_corpus  # type: ignore[import-not-found]

    stream: Tokens = tokenize_corpus(collect_documents(), _tokenizer(model)).held_out
    return stream


def text_stream(model: str, paths: Sequence[str]) -> Tokens:
    """The tokens of some files, one after the other."""
    tokenizer = _tokenizer(model)
    encoded = [
        tokenizer.encode(Path(path).read_text(encoding="utf-8"), add_special_tokens=False).ids
        for path in paths
    ]
    return np.concatenate([np.array(ids, np.int64) for ids in encoded])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the measurement."""
    parser = argparse.ArgumentParser(prog="baton accuracy", description=__doc__)
    parser.add_argument("--model", default=default_model(), help="(default: %(default)s)")
    parser.add_argument("--text", nargs="*", help="files; default: pico's held-out text")
    parser.add_argument("--formats", default="int8,int4", help="(default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=0, help="of the text at most; 0: all")
    parser.add_argument("--weights-cache", default="", help="default: a temporary one, in /tmp")
    parser.add_argument("--json", action="store_true", help="print only the JSON object")
    options = parser.parse_args(argv)
    formats = options.formats.split(",")
    if unknown := set(formats) - {*FORMATS}:
        parser.error(f"formats: {', '.join(sorted(unknown))} is not one of {', '.join(FORMATS)}")
    text = options.text
    stream = text_stream(options.model, text) if text else held_out_stream(options.model)
    if options.tokens:
        stream = stream[: options.tokens + 1]
    with tempfile.TemporaryDirectory(prefix="baton-accuracy-") as temporary:
        results = measure(options.model, stream, formats, options.weights_cache or temporary)
    if not options.json:
        print(_table(results))
    figures = [dataclasses.asdict(result) for result in results]
    whole = {"command": "accuracy", "model": options.model, "tokens": len(stream) - 1}
    print(json.dumps({**whole, "machine": machine.describe(), "formats": figures}))
    return 0


def _table(results: Sequence[Accuracy]) -> str:
    lines = ["format    bits  kv    perplexity  to bf16      KL"]
    lines += [
        f"{r.format:8} {r.bits_per_weight:5.2f}  {r.kv:4} {r.perplexity:11.4f} "
        f"{r.perplexity_change:+7.3f}%  {r.kl:.6f}"
        for r in results
    ]
    return "\n".join(lines)


def _tokenizer(model: str) -> Any:
    return Tokenizer.from_file(str(Path(model) / "tokenizer.json"))


def _wide(view: WeightView) -> WeightView:
    return WeightView("F32", view.shape, floats(view))


def _bytes(weight: Weight) -> int:
    return int((weight.data if isinstance(weight, PackedMatrix) else weight.array).nbytes)


def _count(weight: Weight) -> int:
    if isinstance(weight, PackedMatrix):
        return weight.rows * weight.cols
    return math.prod(weight.shape)
