"""Hostile settings for every test: strict promotion of dtypes and ranks. Examples run as users have it."""

import gc
import os
import tempfile
from pathlib import Path

# Eight devices on one processor, for the sharding tests; read once, when jax starts.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import pytest

import gradfn

# All of gradfn, before pytest imports single files for their examples: it would make second copies of modules.
for name in gradfn.__all__:
    getattr(gradfn, name)

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config):
    """Compile as little as the tests chosen allow.

    Most programs run once, so they are compiled without XLA's costly optimisations, and those that several tests
    build anew are read back from a folder of this run. The tests marked `optimised` are of what XLA makes of our
    code. The two do not mix in one process, whose compiled operations are kept from test to test.
    """
    if "not optimised" in config.option.markexpr:
        jax.config.update("jax_disable_most_optimizations", True)
        folder = tempfile.TemporaryDirectory(prefix="gradfn-compiled-")
        config.add_cleanup(folder.cleanup)
        jax.config.update("jax_compilation_cache_dir", folder.name)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        gc.set_threshold(200_000, 20, 100)  # what jax keeps is large, and searching it for cycles takes long


def pytest_collection_modifyitems(items):
    """Leave examples out of the quick subset: many of them compile whole networks."""
    for item in items:
        if isinstance(item, pytest.DoctestItem):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def usual_promotion_in_examples(request):
    """Run examples of docstrings and pages under jax's own defaults, as their readers will."""
    if isinstance(request.node, pytest.DoctestItem) or "test_docs" in request.node.nodeid:
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            yield
    else:
        yield


@pytest.fixture
def x64():
    """Run a test in float64 (finite differences need it)."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder with MNIST, tiny-shakespeare and the names; skip where it is absent."""
    default = Path(__file__).parents[1] / "shared" / "data"
    folder = Path(os.environ.get("GRADFN_TEST_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"needs the data folder {folder} (or GRADFN_TEST_DATA), which is not here")
    return folder


def pytest_terminal_summary(terminalreporter):
    """Print how many tries of each attack there were, and how many held."""
    reports = [report for each in ("passed", "failed") for report in terminalreporter.stats.get(each, ())]
    figures = [value for report in reports if report.when == "call" for _, value in report.user_properties]
    if figures:
        terminalreporter.section("attacks: tries, and how many held")
        for name, tries, held in figures:
            terminalreporter.write_line(f"{held:>7,} of {tries:>7,}  {name}")
