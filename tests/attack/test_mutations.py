"""Damaged files of runs, of folders of weights and of data sets: one line names the file and the fault."""

import gzip
import itertools
import json
import struct
from pathlib import Path

import numpy as np
import pytest

from tests.attack import mutations
from tests.attack.children import at_once, in_child, train
from tests.attack.mutations import work

# By folder (see `make`): its files, the format of each, and the functions that read it. The attempts are divided among
# several readers, and among several files of one kind.
FILES = {
    "run": [
        ("config.json", "json", "report"),
        ("config.json", "json", "stored"),
        ("versions.json", "json", "report"),
        ("result.json", "json", "report"),
        ("metrics.jsonl", "rows", "report"),
        ("inspections.jsonl", "rows", "report"),
        ("noise.jsonl", "rows", "report"),
        ("digit_net.safetensors", "tensors", "report"),
        ("training_set.safetensors", "tensors", "report"),
        ("cnn_net.safetensors", "tensors", "report"),
        ("checkpoint.safetensors", "tensors", "report"),
        ("picture.png", "bytes", "report"),
    ],
    "fit": [
        ("checkpoint.safetensors", "tensors", "resume"),
        ("metrics.jsonl", "rows", "resume"),
        ("inspections.jsonl", "rows", "resume"),
        ("noise.jsonl", "rows", "resume"),
        ("kept/0000000080.safetensors", "tensors", "kept"),
    ],
    "writer": [
        ("model.json", "json", "sample"),
        ("checkpoint.safetensors", "tensors", "sample"),
    ],
    "gpt2": [
        ("config.json", "json", "load_pretrained"),
        ("model.safetensors.index.json", "json", "load_pretrained"),
        ("model-00001-of-00002.safetensors", "tensors", "load_pretrained"),
    ],
    "llama": [
        ("config.json", "json", "load_pretrained"),
        ("model.safetensors", "tensors", "load_pretrained"),
    ],
    "tokens": [
        ("tokens.npy", "bytes", "tokens"),
        ("tokens.npy.tokenizer.json", "json", "tokens"),
    ],
    "idx": [
        ("train-images-idx3-ubyte.gz", "bytes", "idx"),
        ("t10k-labels-idx1-ubyte", "bytes", "idx"),
    ],
    "text": [("a.txt", "bytes", "text")],
}


def make(kind, folder):
    """Create a folder to damage, with the functions that normally write it."""
    import jax
    from PIL import Image
    from safetensors.numpy import load_file, save_file

    import gradfn as gf
    from gradfn import runs
    from gradfn.experiments import digits
    from gradfn.runs import sample
    from gradfn.runs.cnn_net import keep_cnn_net
    from gradfn.runs.digit_net import keep_digit_net
    from gradfn.runs.training_set import TrainingSet, keep_training_set

    folder.mkdir()
    config = gf.GPTConfig(vocab=65, context=8, n_layers=2, n_heads=2, width=4)
    if kind == "fit":
        train(str(folder), hash_file=folder / "fingerprint")
    elif kind == "run":
        runs.start("digits", runs.settle("digits", digits.Config(folder=str(folder))))
        train(str(folder))
        net = gf.mlp([784, 4, 10])
        data = gf.data.digits()
        unsure = np.full([len(data.test[1]), 10], 0.1)
        keep_digit_net(folder, net.init(jax.random.key(0)), data, unsure)
        convolutional = gf.cnn((28, 28, 1), (2,), (), 10)
        keep_cnn_net(folder, convolutional.init(jax.random.key(0)), data, unsure, enlarged_from=8)
        points = np.zeros([3, 2], np.float32), np.array([0, 1, 1])
        about = {
            "inputs": "plane",
            "data": "points",
            "activation": "tanh",
            "rate": 0.1,
            "batch": 0,
            "steps": 9,
        }
        about |= {"seed": 0, "examples": 3, "levels": 1}
        start = gf.mlp([2, 3, 2]).init(jax.random.key(0))
        keep_training_set(folder, TrainingSet(start, points, points, None, about))
        Image.new("RGB", (30, 20)).save(folder / "picture.png")
        runs.finish(folder, runs.judge(digits.EXPECTED, {"test accuracy": 0.5}), test_accuracy=0.5)
    elif kind == "writer":
        net = gf.rnn(3, 4, "gru")
        sample.save_model(
            folder, "rnn", {"vocab": 3, "width": 4, "cell": "gru"}, gf.data.characters("ab\n"), False
        )
        runs.keep_training(folder, [{"step": 1, "loss": 1.0}], net.init(jax.random.key(0)))
    elif kind in ("gpt2", "llama"):
        options = {
            "positions": "rope",
            "norm": "rms",
            "feed": "swiglu",
            "bias": False,
            "tied": False,
            "hidden": 6,
        }
        config = config if kind == "gpt2" else gf.GPTConfig(65, 8, 2, 2, 4, n_kv_heads=1, **options)
        gf.save_pretrained(folder, config, gf.gpt(config).init(jax.random.key(0)))
    elif kind == "tokens":
        (folder / "a.txt").write_text("to be or not to be")
        gf.data.tokenize(folder / "a.txt", folder / "tokens.npy")
    elif kind == "idx":
        for part in ("train", "t10k"):
            images = struct.pack(">HBBIII", 0, 8, 3, 6, 2, 2) + bytes(range(24))
            (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
            (folder / f"{part}-labels-idx1-ubyte").write_bytes(
                struct.pack(">HBBI", 0, 8, 1, 6) + bytes(range(6))
            )
    elif kind == "text":
        (folder / "a.txt").write_text("to be or not to bé 中\n" * 10, encoding="utf-8")
    if kind == "gpt2":
        tensors = load_file(folder / "model.safetensors")
        names = sorted(tensors)
        shards = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
        for file, part in shards.items():
            save_file({name: tensors[name] for name in part}, folder / file)
        index = {"metadata": {}, "weight_map": {name: file for file, part in shards.items() for name in part}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / "model.safetensors").unlink()


def shared(kind, name):
    """Return the number of files and readers above that are of the kind of a file in a folder."""

    def what(kind, name):
        is_model = kind in ("gpt2", "llama")
        return is_model, "model.safetensors" if is_model and name.startswith("model-") else name

    return sum(
        what(*each) == what(kind, name) for each in ((k, file) for k in FILES for file, _, _ in FILES[k])
    )


def damage(folder, kind, tries, part, n_parts, results):
    """Create a folder, and damage and read each of its files; `part` selects the attempts."""
    make(kind, Path(folder))
    faults, n = [], 0
    for name, form, reader in FILES[kind]:
        seeds = range(part, -(-tries // shared(kind, name)), n_parts)
        faults += work(getattr(mutations, reader), folder, name, form, seeds)
        n += len(seeds)
    Path(results).write_text(json.dumps([faults, n]))


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.tries(all=500, sample=4)
def test_damaged_files(forks, tmp_path, tries, tally, kind):
    """Damage each kind of file `tries` times."""

    def attack(part):
        folder, results = tmp_path / f"{kind}{part}", tmp_path / f"{part}.json"
        end = in_child(forks, damage, str(folder), kind, tries, part, n_parts, str(results))
        return json.loads(results.read_text()) if results.exists() else [[str(end)], 1]

    n_parts = 2 if tries > 20 else 1
    faults, numbers = zip(*at_once(attack, range(n_parts)))
    tally(itertools.chain(*faults), sum(numbers))
