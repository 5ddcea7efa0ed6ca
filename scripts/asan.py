"""Builds the native code with AddressSanitizer and runs the engine's shape tests over it.

The sanitised module lies in build/asan, beside the one that is installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SITE = Path("build/asan").resolve()
TESTS = ["tests/contract/test_packed.py"]


def build() -> None:
    """Installs a second copy of the package into `SITE`."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
    command += ["-c", "constraints.txt", "--target", str(SITE), "."]
    settings = [  # in the long form: Debian's pip has no -C
        "cmake.define.BATON_ADDRESS_SANITIZER=ON",
        "build-dir=build/asan-objects",
        "install.strip=false",
    ]
    options = [f"--config-settings={setting}" for setting in settings]
    subprocess.run([*command, *options], check=True)


def library(name: str) -> str:
    """Where the compiler keeps one of its libraries."""
    command = ["g++", f"-print-file-name={name}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def environment() -> dict[str, str]:
    """The sanitiser has to be there before Python allocates, and finds no exceptions without the
    library that throws them. Python itself leaks by design."""
    preload = f"{library('libasan.so')} {library('libstdc++.so')}"
    return {**os.environ, "LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1"}


def run_tests() -> int:
    """Runs in the child: the copy in `SITE` goes before the editable install."""
    sys.meta_path[:] = [
        finder for finder in sys.meta_path if "ScikitBuild" not in type(finder).__name__
    ]
    sys.path.insert(0, str(SITE))
    import pytest

    from services import _native

    assert Path(_native.__file__).is_relative_to(SITE), _native.__file__
    return int(pytest.main(["-q", "--capture=no", "--timeout=600", *TESTS]))


def main() -> int:
    if "--child" in sys.argv:
        return run_tests()
    build()
    return subprocess.run([sys.executable, __file__, "--child"], env=environment()).returncode


if __name__ == "__main__":
    sys.exit(main())
