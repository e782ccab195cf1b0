"""A net that repeats: the task, the pairs that differ in what induction needs, and that the methods find its heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf
from gradfn.experiments import induction
from gradfn.pages.live import live_parts
from gradfn.runs.kept import read_run


def test_sequences_repeat_and_only_repeated_tokens_are_predicted():
    tokens, targets = map(np.asarray, induction.repeated(jax.random.key(0), 20))
    assert tokens.shape == targets.shape == (20, induction.LENGTH)
    for row, wanted in zip(tokens, targets):
        period = int((wanted < 0).sum())
        assert induction.SHORTEST <= period <= induction.LONGEST
        np.testing.assert_array_equal(row[period:], row[:-period])
        assert (wanted[:period] == -1).all()
        np.testing.assert_array_equal(wanted[period:-1], row[period + 1 :])


def test_a_corrupt_sequence_lacks_the_earlier_copies_of_the_last_token_alone():
    clean, corrupt, right = map(np.asarray, induction.pairs(jax.random.key(1), 20))
    for a, b, answer in zip(clean, corrupt, right):
        earlier = np.flatnonzero(a[:-1] == a[-1])
        assert len(earlier) >= 1
        np.testing.assert_array_equal(np.flatnonzero(a != b), earlier)
        assert a[-1] not in b[:-1]
        assert (a[earlier + 1] == answer).all()


def test_the_net_has_the_names_that_the_methods_take():
    net = induction.attention_only(8, 2)
    params = net.init(jax.random.key(0))
    names = gf.sites(net.apply)(params, jnp.zeros(5, jnp.int32)).names
    for name in (
        "embedded",
        "blocks/0/attention/mixed",
        "blocks/1/attention/keys",
        "blocks/1/residual",
        "logits",
    ):
        assert name in names


def test_the_outcome():
    history = [
        {"step": 30, "test_loss": loss, "induction_score": score}
        for loss, score in ((3.0, 0.1), (1.0, 0.8), (0.9, 0.9))
    ]
    scores = gf.circuits.HeadScores(
        jnp.array([[0.1, 0.9], [0, 0]]), jnp.zeros((2, 2)), jnp.array([[0, 0], [0.8, 0.2]]), ("a", "b")
    )
    agree = dict.fromkeys("abcdef", np.array([0.0, 1.0]))
    found = induction.Found(agree, np.zeros((2, 2)), np.zeros((2, 2)), {})
    assert induction.judge(induction.Config(), history, scores, found).state == "reached"
    split = agree | dict.fromkeys("ab", np.array([1.0, 0.0]))
    found = found._replace(methods=split)
    assert induction.judge(induction.Config(), history, scores, found).state == "missed"


@pytest.mark.slow
def test_the_methods_agree_on_a_trained_net(tmp_path):
    result = induction.run(induction.Config(steps=400, batch=32, folder=str(tmp_path / "run")))
    best = {
        int(of.argmax()) for name, of in result.methods.items() if name != "key composition of the weights"
    }
    assert len(best) == 1
    assert {"bump.png", "heads.png", "attention.png"} <= {file.name for file in result.folder.iterdir()}
    parts, left_out = live_parts(read_run(result.folder), 4_000_000)
    assert ([part.kind for part in parts], left_out) == (["gpt"], [])
