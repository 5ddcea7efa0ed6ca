"""What a worker imports decides how soon it is there."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.processes

LATER = ("torch", "cryptography", "structlog", "tokenizers", "grpc_health.v1")


def imported_by(module: str) -> set[str]:
    """Modules that a process has which imported `module` and nothing else."""
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("module", ["services.decode.__main__", "services.prefill.__main__"])
def test_a_worker_imports_only_what_every_worker_needs(module: str) -> None:
    """Keys, logs, servers and accelerators come with whoever has them."""
    assert not imported_by(module).intersection(LATER)
