"""A spare imports and reads ahead, claims nothing, and becomes the process it was kept for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from services.ops.spare import wake_line

pytestmark = pytest.mark.processes

WORKER = """
import os, sys
from pathlib import Path
def prepare(): Path(sys.argv[1]).write_text("prepared")
def main():
    Path(sys.argv[1]).write_text(f"at work as {os.environ['BATON_NAME']}")
    print("trouble", file=sys.stderr)
    return 7
"""


@pytest.fixture
def spare(tmp_path: Path) -> subprocess.Popen[bytes]:
    """A spare of a worker that writes what it does into the file it is told."""
    package = tmp_path / "worker"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(WORKER)
    command = [sys.executable, "-m", "services.ops.spare", "worker", str(tmp_path / "done")]
    return subprocess.Popen(command, stdin=subprocess.PIPE, cwd=tmp_path)


def test_a_line_makes_it_the_process(spare: subprocess.Popen[bytes], tmp_path: Path) -> None:
    """It runs the module's main as the process that the line describes, and ends with its status."""
    other, errors = tmp_path / "other", tmp_path / "errors"
    spare.communicate(wake_line([str(other)], {"BATON_NAME": "b"}, errors), timeout=60)
    assert spare.returncode == 7
    assert (tmp_path / "done").read_text() == "prepared"
    assert other.read_text() == "at work as b"
    assert errors.read_text() == "trouble\n"


def test_it_ends_with_whoever_kept_it(spare: subprocess.Popen[bytes], tmp_path: Path) -> None:
    """Prepared, but never at work."""
    spare.communicate(timeout=60)
    assert spare.returncode == 0
    assert (tmp_path / "done").read_text() == "prepared"
