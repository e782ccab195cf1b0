"""Hostile settings for every test: strict promotion of dtypes and ranks. Examples run as users have it."""

import os
from pathlib import Path

# Eight devices on one processor, for the sharding tests; read once, when jax starts.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config):
    """Compile without XLA's costly optimisations where all tests chosen can do without: most programs run once.

    The others, marked `optimised`, are of what XLA makes of our code. The two do not mix in one process, whose
    compiled operations are kept from test to test.
    """
    if "not optimised" in config.option.markexpr:
        jax.config.update("jax_disable_most_optimizations", True)


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
