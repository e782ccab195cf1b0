"""`model.json` in the folder of a run of `gf.fit`: what its network was made with."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradfn as gf
from gradfn.cli import main
from gradfn.data import tokenizer_from
from gradfn.runs.sample import load_model, save_model

X = np.random.default_rng(0).normal(size=[8, 3]).astype(np.float32)
LABELS = np.arange(8) % 2
TOKENS = np.arange(32).reshape(8, 4) % 5
SMALL = {"vocab": 5, "context": 4, "n_layers": 1, "n_heads": 1, "width": 4}


def train(folder, loss, net, data, **options):
    options = {"batch_size": 4, "progress": False} | options
    return gf.fit(
        gf.batch_mean(loss), net.init(jax.random.key(0)), data, optax.sgd(0.1), 2, folder=folder, **options
    )


def described(folder):
    return json.loads((folder / "model.json").read_text())


def test_our_losses_of_our_nets_are_described(tmp_path):
    net = gf.mlp([3, 4, 2], jnp.tanh, output="sigmoid")
    train(tmp_path / "run", gf.quadratic_loss(net), net, (X, LABELS))
    assert described(tmp_path / "run") == {
        "net": "mlp",
        "settings": {"sizes": [3, 4, 2], "activation": "tanh", "output": "sigmoid"},
        "loss": "quadratic_loss",
        "tokenizer": None,
        "lines": False,
    }
    # Another run in the same folder describes its own network, or none.
    net = gf.mlp([3, 1])
    train(tmp_path / "run", gf.regression_loss(net), net, (X, X[:, 0]))
    assert described(tmp_path / "run")["settings"]["sizes"] == [3, 1]
    assert described(tmp_path / "run")["loss"] == "regression_loss"
    train(
        tmp_path / "run", lambda params, example: gf.regression_loss(net)(params, example), net, (X, X[:, 0])
    )
    assert not (tmp_path / "run/model.json").exists()


def test_a_net_with_a_function_without_a_name_has_no_description(tmp_path):
    net = gf.mlp([3, 4, 2], lambda z: jnp.sin(z))
    assert net.description is None
    train(tmp_path, gf.classification_loss(net), net, (X, LABELS))
    assert not (tmp_path / "model.json").exists()
    assert gf.serial(a=gf.mlp([3, 2])).description is None


def test_a_model_with_a_tokenizer_stays_and_must_be_the_same(tmp_path, capsys):
    net = gf.gpt(gf.GPTConfig(**SMALL))
    data = (TOKENS, (TOKENS + 1) % 5)
    train(tmp_path / "own", gf.next_token_loss(net), net, data)
    settings = json.loads(json.dumps(vars(gf.GPTConfig(**SMALL))))
    assert described(tmp_path / "own")["settings"] == settings
    assert main(["sample", str(tmp_path / "own")]) == 2
    assert "no tokenizer is known" in capsys.readouterr().err

    tokenizer = tokenizer_from({"name": "characters", "symbols": "\nabcd"})
    save_model(tmp_path / "own", "gpt", described(tmp_path / "own")["settings"], tokenizer, lines=True)
    assert load_model(tmp_path / "own").lines
    (tmp_path / "ours").mkdir()
    save_model(tmp_path / "ours", "gpt", SMALL, tokenizer, lines=True)
    before = (tmp_path / "ours/model.json").read_bytes()
    train(tmp_path / "ours", gf.next_token_loss(net), net, data)
    assert (tmp_path / "ours/model.json").read_bytes() == before
    other = gf.gpt(gf.GPTConfig(**SMALL | {"n_layers": 2}))
    with pytest.raises(ValueError, match="belongs to another model or text"):
        train(tmp_path / "ours", gf.next_token_loss(other), other, data)


def test_sampling_from_another_network_gets_one_line(tmp_path, capsys):
    net = gf.mlp([3, 2])
    train(tmp_path, gf.classification_loss(net), net, (X, LABELS))
    assert main(["sample", str(tmp_path)]) == 2
    assert "its model.json describes another network" in capsys.readouterr().err
