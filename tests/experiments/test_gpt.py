"""The language model end to end: it trains, draws, continues a text, and compares its loss with what is expected."""

import json
import re

import jax
import numpy as np
import pytest

import gradfn as gf
from gradfn import runs
from gradfn.cli import main
from gradfn.core.params import named_leaves
from gradfn.experiments import _common, gpt
from gradfn.options import read_options
from gradfn.runs import sample
from gradfn.runs.kept import read_run
from gradfn.runs.language_net import load_params

SMALL = {"steps": 8, "layers": 1, "heads": 2, "width": 8, "context": 8, "batch": 4, "warmup": 1}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    (folder / "text.txt").write_text("to be, or not to be: that is the question.\n" * 30)
    (folder / "names.txt").write_text(
        "\n".join(f"{a}{b}nn{c}" for a in "abcd" for b in "aeiou" for c in "aey")
    )
    return folder


@pytest.fixture(scope="module")
def of_text(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "text"
    return gpt.run(gpt.Config(**SMALL, data=str(texts / "text.txt"), folder=str(folder)))


@pytest.fixture(scope="module")
def of_names(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "names"
    options = SMALL | {"accumulate": 2, "dropout": 0.1}
    return gpt.run(gpt.Config(**options, data=str(texts / "names.txt"), lines=True, folder=str(folder)))


@pytest.mark.slow
def test_a_run_leaves_pictures_and_a_model(of_text, capsys):
    files = {file.name for file in of_text.folder.iterdir()}
    assert {"curves.png", "probabilities.png", "attention.png", "model.json", "result.json"} <= files
    assert [row["step"] for row in of_text.history] == list(range(1, 9))
    assert of_text.history[-1]["validation_loss"] < of_text.history[0]["validation_loss"]
    assert of_text.outcome.state == "open"
    stored = json.loads((of_text.folder / "result.json").read_text())
    assert stored["validation_loss"] == of_text.validation_loss


@pytest.mark.slow
def test_a_run_keeps_what_its_page_shows(of_text, of_names, texts):
    """Texts of its data, and the parameters along the way, from the initial ones on."""
    for result, file in ((of_text, "text.txt"), (of_names, "names.txt")):
        net = read_run(result.folder).language_net
        whole = (texts / file).read_text()
        assert net.samples
        assert all(text and text in whole for text in net.samples)
        assert net.lines == (file == "names.txt")
        steps = list(net.kept)
        assert (steps[0], steps[-1]) == (0, net.step)
        assert len(steps) > 5
        settings = json.loads((result.folder / "model.json").read_text())["settings"]
        start = gf.gpt(gf.GPTConfig(**settings)).init(jax.random.key(0))
        kept = load_params(net.kept[0], net.architecture)
        jax.tree.map(np.testing.assert_array_equal, kept, dict(named_leaves(start)))


@pytest.mark.slow
def test_the_model_of_a_run_is_the_one_that_was_trained(of_text):
    model = sample.load_model(of_text.folder)
    jax.tree.map(np.testing.assert_array_equal, model.params, of_text.params)
    assert model.tokenizer.decode(model.tokenizer.encode("to be")) == "to be"
    tokens = list(sample.write(model, sample.Config(prompt="to ", n=20, temperature=0)))
    expected = gf.generate(model.net, model.params, model.tokenizer.encode("to "), 20, temperature=0)
    np.testing.assert_array_equal(tokens, expected)


@pytest.mark.slow
def test_sampling_on_the_command_line(of_text, monkeypatch, capsys):
    folder = str(of_text.folder)
    words = ["sample", folder, "--prompt", "to be", "--n", "12", "--top-k", "3", "--seed", "4"]
    outputs = []
    for _ in range(2):
        assert main(words) == 0
        captured = capsys.readouterr()
        outputs.append(captured.out)
        assert "12 tokens, the first 2 in" in captured.err
        assert captured.err.endswith("tokens/s\n")
    assert outputs[0] == outputs[1]
    assert outputs[0].startswith("to be")
    assert len(outputs[0]) == len("to be") + 12 + 1
    assert main([*words[:-1], "5"]) == 0
    assert capsys.readouterr().out != outputs[0]
    # The name of an experiment is its latest run.
    monkeypatch.setattr(runs.folder, "RUNS", of_text.folder.parent.parent)
    assert main(["sample", of_text.folder.parent.name, *words[2:]]) == 0
    assert capsys.readouterr().out == outputs[0]


@pytest.mark.slow
def test_lines_start_with_the_prompt(of_names):
    model = sample.load_model(of_names.folder)
    assert model.lines
    tokens = list(sample.write(model, sample.Config(prompt="an", n=60, temperature=2.0)))
    lines = model.tokenizer.decode(tokens).split("\n")
    assert all(line.startswith("an") for line in lines[1:])
    assert max(map(len, lines)) <= 6
    with pytest.raises(gf.data.DataError, match="a prompt of 9 characters, where lines have 6 at most"):
        list(sample.write(model, sample.Config(prompt="a" * 9)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "gradfn sample: expected a run's folder"),
        (["nowhere"], "nowhere: neither a run's folder nor an experiment with a run in runs/nowhere"),
        (["."], "not a run of a language model"),
        (["RUN", "--prompt", "Ω"], "got 'Ω'. Leave it out"),
        (["RUN", "--top-k", "1000"], "top_k must be in"),
        (["RUN", "--n", "0"], "n must be an integer >= 1, got 0"),
        (["RUN", "--temperature", "-1"], "temperature must be a finite number >= 0, got -1.0"),
        (["RUN", "--tempature", "1"], "no option '--tempature' (did you mean --temperature?)"),
    ],
)
def test_a_mistake_gets_one_line_and_exit_code_2(of_text, words, message, capsys):
    assert main(["sample", *(str(of_text.folder) if word == "RUN" else word for word in words)]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be an integer >= 1"),
        ({"steps": 50, "warmup": 100}, "warmup must be an integer from 0 to 49, got 100"),
        ({"heads": 3}, "heads must divide the width of 128, got 3"),
        ({"rate": 0.0}, "rate must be a finite number > 0"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        gpt.Config(**options)


def test_the_outcome_is_judged_for_the_default_options_alone():
    data, bound = gf.data.text(), gpt.EXPECTED[0].at_most
    assert gpt.judge(gpt.Config(), data, bound).state == "reached"
    assert gpt.judge(gpt.Config(seed=7), data, bound + 0.01).state == "missed"
    assert gpt.judge(gpt.Config(steps=1999), data, bound).state == "open"
    assert gpt.judge(gpt.Config(), data._replace(name="", sha256=""), bound).state == "open"
    of_names = next(sha for sha, options in gpt.TEXTS.items() if options == gpt.FOR_NAMES)
    names = data._replace(name="names.txt", sha256=of_names)
    promised = gpt.Config(**gpt.NAMES_OPTIONS, data="names.txt")
    assert gpt.judge(promised, names, 1.99).state == "reached"
    assert gpt.judge(promised, names, 2.01).state == "missed"
    assert gpt.judge(gpt.Config(data="names.txt"), names, 1.99).state == "open"


def test_the_options_for_names_are_those_of_the_expectation():
    given = read_options(gpt.Config(), gpt.FOR_NAMES.split(), "gradfn run gpt", "")
    assert given == gpt.Config(**gpt.NAMES_OPTIONS, data="names.txt")


@pytest.mark.slow
def test_large_texts_stay_in_their_files(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(gpt, "ON_HOST", 100)
    file = gf.data.tokenize(texts / "text.txt", tmp_path / "text.npy")
    result = gpt.run(gpt.Config(**SMALL, data=str(file), folder=str(tmp_path / "run")))
    assert len(result.history) == 8


@pytest.mark.slow
def test_a_run_on_a_mesh_equals_one_on_a_device(texts, tmp_path, capsys):
    options = SMALL | {"data": str(texts / "text.txt"), "batch": 4}
    alone = gpt.run(gpt.Config(**options, folder=str(tmp_path / "alone")))
    split = {"mesh": "data=2,model=2", "shard": "fsdp_tensor", "folder": str(tmp_path / "mesh")}
    mesh = gpt.run(gpt.Config(**options, **split))
    assert "vocab 17 by model=2: 18 would divide" in capsys.readouterr().out
    losses = [[row["loss"] for row in result.history] for result in (alone, mesh)]
    np.testing.assert_allclose(*losses, rtol=1e-4)
    assert (tmp_path / "mesh" / "checkpoint").is_dir()  # of a state that is split
    model = sample.load_model(mesh.folder)
    jax.tree.map(np.testing.assert_array_equal, model.params, mesh.params)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mesh": "rows=2"}, "mesh: expected data=8 or data=4,model=2, got 'rows=2'"),
        ({"mesh": ""}, "mesh: expected"),
        ({"mesh": "model=2"}, "mesh: an axis data is missing. Pass data=1,model=2"),
        ({"mesh": "data=2", "shard": "tensor"}, "shard: tensor needs a mesh with an axis model"),
        ({"shard": "fsdp_tensor"}, "needs a mesh with an axis model"),
        ({"mesh": "data=64"}, "mesh: data=64 has 64 devices, but there are 8"),
        ({"mesh": "data=5"}, "batch: must be a multiple of 5, the devices along data, got 12"),
    ],
)
def test_invalid_mesh(options, message):
    with pytest.raises((ValueError, runs.RunError), match=re.escape(message)):
        _common.mesh_for(gpt.Config(**options), 12)
