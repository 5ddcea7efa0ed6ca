"""A store does not give memory back to the kernel between two messages."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Sixteen messages of 1 MiB at a time, as they lie in a receiver's window, on a thread of their own.
RECEIVE = """
import ctypes, resource, threading
{before}
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p

def window():
    messages = [libc.malloc(1 << 20) for _ in range(16)]
    for message in messages:
        ctypes.memset(message, 1, 1 << 20)
    for message in reversed(messages):
        libc.free(ctypes.c_void_p(message))

def receive():
    for _ in range(3):
        window()
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    for _ in range(10):
        window()
    print(resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before)

thread = threading.Thread(target=receive)
thread.start()
thread.join()
"""
KEEP = "from services.ops import lifecycle; lifecycle.keep_freed_memory()"


def faults(before: str) -> int:
    """Page faults of ten windows, once they have been filled before."""
    program = RECEIVE.format(before=before)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_freed_memory_is_kept() -> None:
    """The same pages serve the next window; without the setting they are mapped anew."""
    assert faults(KEEP) < 20
    assert faults("") > 100
