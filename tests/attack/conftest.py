"""Attacks: a hundred ways to damage, interrupt and mislead a run, each with many attempts.

An attack takes `tries`, the number of attempts. Each is two tests: `[sample]`, a few attempts that run with all other
tests, and `[all]`, which `pytest -m attack` runs. The numbers of attempts and of those withstood are printed at the
end.
"""

import multiprocessing
from multiprocessing import forkserver

import pytest

from tests.attack.children import PRELOADED


def pytest_generate_tests(metafunc):
    if "tries" in metafunc.fixturenames:
        numbers = metafunc.definition.get_closest_marker("tries").kwargs
        every = pytest.param(numbers["all"], id="all", marks=(pytest.mark.attack, pytest.mark.slow))
        metafunc.parametrize("tries", [pytest.param(numbers["sample"], id="sample"), every])


@pytest.fixture
def tally(request, record_property):
    """Return a function of `(faults, tries)` that records the attempts withstood, and fails with the first faults."""

    def record(faults, tries):
        faults = list(faults)
        record_property("attack", (request.node.name, tries, tries - len(faults)))
        assert not faults, "\n".join(map(str, faults[:5]))

    return record


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    """Return a multiprocessing context whose processes start in milliseconds, with gradfn imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    settings = {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "XLA_FLAGS": "",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        forkserver.ensure_running()
    return context
