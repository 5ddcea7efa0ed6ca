"""The links that the tests of the KV stream run over."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.media import Link, Setting, link
from tests.support.streams import BuildLink


@pytest.fixture
def build(tmp_path: Path) -> Iterator[BuildLink]:
    """Builds worlds that are closed in the end."""
    with ExitStack() as stack:

        def make(setting: Setting, **change: object) -> Link:
            changed = replace(setting, **change)  # type: ignore[arg-type]
            directory = tmp_path / str(len(list(tmp_path.iterdir())))
            directory.mkdir()
            return stack.enter_context(link(directory, changed))

        yield make
