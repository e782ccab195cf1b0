"""What gradfn computes on an accelerator, compared with the CPU."""

import jax
import pytest

from benchmarks.accelerator import checks

pytestmark = pytest.mark.accelerator


@pytest.fixture(scope="module", params=checks.examples())
def differences(request, devices):
    """Return the difference of each result of one net; all are computed by one program."""
    return checks.differences(request.param, devices)


@pytest.mark.parametrize("result", checks.RESULTS)
def test_results_equal_those_of_the_cpu(differences, result):
    assert differences[result] <= checks.BOUND


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", checks.ATTENTION)
def test_attention_over_long_sequences_is_that_of_the_plain_form(devices, name, causal):
    """On a GPU cuDNN's kernel in half precision, on a TPU Pallas'; elsewhere, and in float32, in blocks."""
    *_, bound = checks.ATTENTION[name]
    assert checks.attention(name, causal, devices) <= bound


def test_root_mean_squares_are_right_for_all_magnitudes(devices):
    assert checks.magnitudes(devices) <= checks.BOUND


def test_the_origin_of_a_nan_is_the_same_equation(devices):
    found, expected = checks.nan_origins(devices)
    assert checks.names_the_logarithm(found)
    assert found == expected


def test_the_guard_names_the_operation(devices):
    assert checks.guarded(devices.device) == [None, "log"]


def test_a_resumed_run_has_the_same_bits(devices):
    assert checks.resumed(devices.device) == 0.0


def test_results_lie_on_the_device(devices):
    """Otherwise the other tests would compare the CPU with itself."""
    found = checks.on(devices.device, lambda x: x + 1, 1.0)
    assert found.devices() == {devices.device}
    assert devices.device != devices.cpu
    assert jax.devices("cpu")[0] == devices.cpu
