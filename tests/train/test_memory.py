import os
import platform
import subprocess
import sys

import pytest

from gradfn.train import keep_freed_memory, memory

# Allocates, fills and frees a block of 50 MB ten times, and prints how many pages the system provided.
PAGES = """
import ctypes, resource
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    block = libc.malloc(50_000_000)
    ctypes.memset(block, 1, 50_000_000)
    libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
KEEP = "from gradfn.train import keep_freed_memory\nassert keep_freed_memory()\n"


STEP = "import gradfn as gf, optax\ngf.train_step(lambda params, batch: batch, optax.sgd(0.1))\n"


def pages(code, **environment):
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, **environment}
    )
    return int(done.stdout)


@pytest.mark.slow
def test_freed_memory_is_reused():
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("keep_freed_memory needs glibc")
    returned = pages(PAGES)
    assert pages(KEEP + PAGES) < returned / 5
    assert pages(STEP + PAGES) < returned / 5
    assert pages(STEP + PAGES, MALLOC_TRIM_THRESHOLD_="131072") > returned / 2


def test_limits_are_only_raised(monkeypatch):
    calls = []
    monkeypatch.setattr(memory, "_kept", 0)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(
        memory.ctypes, "CDLL", lambda _: type("libc", (), {"mallopt": lambda *a: calls.append(a) or 1})
    )
    for name in memory.CHOSEN_BY_USERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=1")
    memory.keep_blocks_of_steps()
    assert not calls
    monkeypatch.delenv("GLIBC_TUNABLES")
    memory.keep_blocks_of_steps()
    assert calls == [(-1, 2**27), (-3, 2**26)]
    assert keep_freed_memory()
    assert calls[2:] == [(-1, 2**31 - 1), (-3, 2**31 - 1), (-8, 1)]
    memory.keep_blocks_of_steps()
    assert len(calls) == 5


def test_another_system_is_left_alone(monkeypatch):
    monkeypatch.setattr(memory, "_kept", 0)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_memory()
