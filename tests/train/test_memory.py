import platform
import subprocess
import sys

import pytest

from gradfn.train import keep_freed_memory

# Allocates, fills and frees a block ten times, and prints how many pages the system provided.
PAGES = """
import ctypes, resource
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    block = libc.malloc(2**26)
    ctypes.memset(block, 1, 2**26)
    libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
KEEP = "from gradfn.train import keep_freed_memory\nassert keep_freed_memory()\n"


def pages(code):
    return int(
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    )


@pytest.mark.slow
def test_freed_memory_is_reused():
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("keep_freed_memory needs glibc")
    assert pages(KEEP + PAGES) < pages(PAGES) / 5


def test_another_system_is_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_memory()
