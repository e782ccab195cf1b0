"""Digits in reverse order: the task, and that the network learns it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradfn.experiments import reverse
from gradfn.runs import sample
from gradfn.runs.kept import read_run


def test_the_targets_are_the_reversed_digits():
    tokens, targets = reverse.reversals(jax.random.key(0), 5, 4)
    assert tokens.shape == targets.shape == (5, 8)
    np.testing.assert_array_equal(targets[:, 4:], tokens[:, 3::-1])
    np.testing.assert_array_equal(tokens[:, 4], reverse.END_OF_INPUT)
    np.testing.assert_array_equal(tokens[:, 5:], targets[:, 4:-1])
    assert (targets[:, :4] == -1).all()


def test_one_mistake_makes_a_sequence_wrong():
    targets = jnp.array([[-1, 2, 3], [-1, 2, 3]])
    logits = jax.nn.one_hot(jnp.array([[9, 2, 3], [9, 2, 4]]), 11)
    assert reverse.all_right(logits, targets) == 0.5


@pytest.mark.parametrize(("accuracy", "state"), [(1.0, "reached"), (0.999, "missed")])
def test_the_outcome(accuracy, state):
    assert reverse.judge(reverse.Config(), accuracy).state == state
    assert reverse.judge(reverse.Config(steps=10), accuracy).state == "open"


@pytest.mark.slow
def test_it_learns_to_reverse(tmp_path):
    result = reverse.run(reverse.Config(digits=4, steps=200, width=32, folder=str(tmp_path / "run")))
    assert result.accuracy == 1
    assert {"attention.png", "curves.png"} <= {file.name for file in result.folder.iterdir()}

    # For the page of the run, and for `gradfn sample`.
    model = sample.load_model(result.folder)
    written = sample.write(model, sample.Config(prompt="1234=", n=4, temperature=0))
    assert model.tokenizer.decode(written) == "4321"
    net = read_run(result.folder).language_net
    assert net.quiet == {"until": reverse.END_OF_INPUT}
    assert [text[5:] for text in net.samples] == [text[3:0:-1] for text in net.samples]
    assert list(net.kept) == [0, *range(12, 200, 12), 200]
