"""The tiny models that tests of every kind load; made once a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.engine.checkpoint import load_weights
from services.engine.model import ModelConfig
from tests.support.models import TINY_MODELS, save_tiny_model
from tests.support.oracle import Loaded


@pytest.fixture(scope="session")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {name: save_tiny_model(name, root / name) for name in TINY_MODELS}


@pytest.fixture
def loaded(directories: dict[str, Path], name: str) -> Loaded:
    config = ModelConfig.load(directories[name])
    return config, load_weights(directories[name], config)


@pytest.fixture
def name() -> str:
    """The model of a test that does not go through all: it has grouped heads and a window."""
    return "mistral-window"
