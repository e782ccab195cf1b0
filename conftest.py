"""Strict promotion of dtypes and ranks for all tests; examples run with jax's defaults, as for users."""

import gc
import os
import signal
import tempfile
from pathlib import Path

import jax
import pytest

import gradfn

DEVICES = " --xla_force_host_platform_device_count=8"  # on one CPU, for the sharding tests
# XLA compiles twice as fast with one thread, and without the code for fused operations that later versions always use.
QUICK = " --xla_cpu_parallel_codegen_split_count=1"
if jax.__version_info__ < (0, 11):
    QUICK += " --xla_cpu_use_fusion_emitters=false"

# Import all of gradfn before pytest imports single files for their doctests, which would create second copies.
for name in gradfn.__all__:
    getattr(gradfn, name)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config):
    """Choose the platform, and reduce compile time as far as the selected tests allow.

    All tests run on the CPU, except those marked `accelerator`, which run only where they are requested.

    Most programs run once, so they are compiled without XLA's expensive optimizations. Tests marked `optimized` check
    the optimized program. Both kinds do not mix in one process, because compiled operations are kept between tests.
    Programs are cached in a temporary folder, which the processes of pytest-xdist share with the commands that tests
    start: those would write into the user's cache.
    """
    expression = config.option.markexpr
    if "accelerator" not in expression or "not accelerator" in expression:
        jax.config.update("jax_platforms", "cpu")
    if not hasattr(config, "workerinput"):
        folder = tempfile.TemporaryDirectory(prefix="gradfn-compiled-")
        config.add_cleanup(folder.cleanup)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder.name
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    optimized = "not optimized" not in expression
    jax.config.update("jax_enable_compilation_cache", not optimized)
    if not optimized:
        jax.config.update("jax_disable_most_optimizations", True)
        jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        gc.set_threshold(200_000, 20, 100)  # jax keeps many objects, in which searching for cycles is slow
    with pytest.MonkeyPatch.context() as patch:
        # Only for this process: the commands that tests start have one device, which starts in half the time.
        patch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", "") + DEVICES + ("" if optimized else QUICK))
        jax.devices()


def pytest_collection_modifyitems(items):
    """Mark doctests as slow: many of them compile whole networks."""
    for item in items:
        if isinstance(item, pytest.DoctestItem):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def usual_promotion_in_examples(request):
    """Run the examples in docstrings and pages with jax's defaults, as their readers will."""
    if isinstance(request.node, pytest.DoctestItem) or "test_docs" in request.node.nodeid:
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            yield
    else:
        yield


@pytest.fixture
def x64():
    """Run a test in float64, which finite differences need."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def hang_ups_are_not_ignored():
    """Under `nohup`, which commands respect, all processes would ignore SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder with MNIST, tiny-shakespeare and the names; skip the test if it does not exist."""
    default = Path(__file__).parents[1] / "shared" / "data"
    folder = Path(os.environ.get("GRADFN_TEST_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"needs the data folder {folder} (or GRADFN_TEST_DATA), which does not exist")
    return folder


SUMMARIES = {"attack": "attacks: withstood of attempts", "menagerie": "menagerie: held of tried"}


def pytest_terminal_summary(terminalreporter):
    """Print the number of attempts of each attack, and how many were withstood; the same of the menagerie.

    Append the names of skipped tests to the file GRADFN_SKIPPED, a line each, for another session: `pytest @FILE`.
    """
    reports = [report for each in ("passed", "failed") for report in terminalreporter.stats.get(each, ())]
    recorded = [pair for report in reports if report.when == "call" for pair in report.user_properties]
    is_worker = hasattr(terminalreporter.config, "workerinput")
    if (file := os.environ.get("GRADFN_SKIPPED")) and not is_worker:
        skipped = {report.nodeid for report in terminalreporter.stats.get("skipped", ())}
        with open(file, "a") as stream:
            stream.writelines(f"{name}\n" for name in sorted(skipped))
    for kind, title in SUMMARIES.items():
        totals = {}
        for name, tries, held in [value for key, value in recorded if key == kind]:
            before = totals.get(name, (0, 0))
            totals[name] = before[0] + tries, before[1] + held
        if totals:
            terminalreporter.section(title)
        for name, (tries, held) in totals.items():
            terminalreporter.write_line(f"{held:>7,} of {tries:>7,}  {name}")
