"""The devices of these tests: the default accelerator, and the CPU that it is compared with.

`pytest -m accelerator` on a machine with an accelerator. `GRADFN_ACCELERATOR=cpu` runs the same tests with a second
simulated CPU device instead of one, to try the tests themselves.
"""

import os

import jax
import pytest

from benchmarks.accelerator.checks import Devices

HOW = (
    "run pytest -m accelerator where jax finds one, or set GRADFN_ACCELERATOR=cpu to try the tests themselves"
)


@pytest.fixture(scope="module")
def devices() -> Devices:
    """Return the device that is checked, and the CPU; skip the test if there is no accelerator."""
    if os.environ.get("GRADFN_ACCELERATOR") == "cpu":
        cpu, other = jax.devices("cpu")[:2]
        return Devices(other, cpu)
    device = jax.devices()[0]
    if device.platform == "cpu":
        pytest.skip(f"needs an accelerator: {HOW}")
    return Devices(device, jax.devices("cpu")[0])
