"""Quantised weights stay near bf16's perplexity on text the shipped model has never seen."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from baton.accuracy import Accuracy, measure

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))  # as when scripts/train_pico.py is run
from pico import END_OF_TEXT_ID  # noqa: E402
from pico.corpus import source_documents  # noqa: E402

PICO = str(ROOT / "models" / "pico")
WINDOWS, WINDOW = 5, 2048  # spread evenly over the text: fewer, and luck decides about 0.1 %


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Accuracy]:
    tokenizer = Tokenizer.from_file(f"{PICO}/tokenizer.json")
    tokens = [END_OF_TEXT_ID]
    for document in source_documents(Path(sysconfig.get_path("stdlib"))):
        if document.held_out:
            tokens += [*tokenizer.encode(document.text).ids, END_OF_TEXT_ID]
    starts = np.linspace(0, len(tokens) - WINDOW, WINDOWS).astype(int)
    stream = np.concatenate([tokens[start : start + WINDOW] for start in starts])
    cache = str(tmp_path_factory.mktemp("cache"))
    return {found.format: found for found in measure(PICO, stream, ["int8", "int4"], cache)}


def test_the_text_is_what_the_model_knows(figures: dict[str, Accuracy]) -> None:
    """A perplexity far from the card's would mean that something else was measured."""
    assert 8 < figures["float32"].perplexity < 25


def test_bf16_serves_what_float32_says(figures: dict[str, Accuracy]) -> None:
    """Its weights are the checkpoint's; only activations and KV are rounded."""
    assert figures["float32"].kl == 0
    assert abs(figures["float32"].perplexity_change) < 0.05
    assert 0 < figures["bf16"].kl < 1e-4


def test_int8_is_within_a_thousandth(figures: dict[str, Accuracy]) -> None:
    """0.1 % of bf16's perplexity, and a divergence that leaves no room for luck."""
    assert abs(figures["int8"].perplexity_change) < 0.1
    assert 1e-5 < figures["int8"].kl < 6e-4
    assert figures["int8"].bits_per_weight < 8.4


def test_int4_is_within_a_fiftieth(figures: dict[str, Accuracy]) -> None:
    """2 % of bf16's perplexity; plain rounding diverges by more than 0.018 nats."""
    assert abs(figures["int4"].perplexity_change) < 2
    assert 1e-3 < figures["int4"].kl < 0.016
    assert figures["int4"].bits_per_weight < 5.2  # the tied head of this small model is a seventh
