"""Damaged and hostile files of a run: reading them ends in one line, which names the file."""

import base64
import json
import os
import re
import struct

import jax
import numpy as np
import pytest
from safetensors.numpy import save

import gradfn as gf
from gradfn import cli
from gradfn.files import FileError
from gradfn.runs import sample, write_json
from gradfn.runs.kept import read_run
from gradfn.train import checkpoint
from tests.report.test_page import write_run
from tests.test_cli import EXPERIMENT

DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
NUL, LATIN = b"\0" * 40, '{"verdict": "é"}'.encode("latin-1")

# Damage to any JSON file, then to each file.
ANY_JSON = (b"", b"{", b"[]", b"3", b"null", b'"text"', b"{]", DEEP, NUL, LATIN, b"{} {}", b'{"a": NaN}')
ROWS = (b"3\n", b"[]\n", b"{}\n", b"\n", b"{\n", DEEP + b"\n", NUL + b"\n", LATIN + b"\n", b'{"a": 1}\n')


def as_rows(*rows):
    return [json.dumps(row).encode() + b"\n" for row in rows]


LOOK = {"step": 0, "sites": {}, "site_grads": {}, "grads": {"W1": {"rms": 1.0}}}
NOTES = {"settings": {"seed": 0}, "versions": {}, "finished": True}
ABOUT = {"activation": "relu", "output": None, "loss": "quadratic", "data": "noise"}
ARRAYS = {
    "W1": np.ones([10, 784], np.float32),
    "b1": np.ones(10, np.float32),
    "samples": np.ones([2, 784], np.float32),
    "labels": np.array([0, 9], np.int32),
}
HIDDEN = {"W1": np.ones([3, 784], np.float32), "b1": np.ones(3, np.float32)}


def net(about=ABOUT, **changed):
    """Return the file of a digit network with some arrays replaced, or left out where they are None."""
    arrays = {name: array for name, array in (ARRAYS | changed).items() if array is not None}
    text = about if isinstance(about, str) else json.dumps(about)
    return save(arrays, metadata={"about": text})


CNN_ABOUT = {"activation": "relu", "image": [4, 6, 2], "data": "noise"}
CNN_ARRAYS = {
    "conv1/W": np.ones([3, 2, 3, 3], np.float32),
    "conv1/b": np.ones(3, np.float32),
    "dense1/W": np.ones([5, 18], np.float32),
    "dense1/b": np.ones(5, np.float32),
    "samples": np.ones([2, 48], np.float32),
    "labels": np.array([0, 4], np.int32),
}


def cnn(about=CNN_ABOUT, **changed):
    """Return the file of a convolutional network, as `net` does; `conv1_W` is the array `conv1/W`."""
    changed = {name.replace("_", "/"): array for name, array in changed.items()}
    arrays = {name: array for name, array in (CNN_ARRAYS | changed).items() if array is not None}
    return save(arrays, metadata={"about": about if isinstance(about, str) else json.dumps(about)})


def tensors(**header):
    """Return a safetensors file of 8 bytes of data, with any header."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"\0" * 8


BAD_TENSORS = (
    b"",
    b"x",
    b"nothing",
    struct.pack("<Q", 2**62) + b"{}",
    struct.pack("<Q", 2) + b"{]",
    struct.pack("<Q", len(DEEP)) + DEEP,
    tensors(params={"dtype": "F32", "shape": [2**40], "data_offsets": [0, 8]}),
    tensors(params={"dtype": "F9", "shape": [2], "data_offsets": [0, 8]}),
    tensors(params={"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}),
    tensors(params={"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}),
)
OUTCOMES = [
    b'{"outcome": %s}' % content
    for content in (
        b"3",
        b'{"measured": 3}',
        b'{"measured": {"a": "b"}}',
        b'{"measured": {"a": 1e999}}',
        b'{"expected": [3]}',
        b'{"expected": [{"name": 3}]}',
        b'{"expected": [{"name": "a", "at_least": "b"}]}',
        b'{"promised": "yes"}',
    )
]
DAMAGED = {
    "config.json": [
        *ANY_JSON,
        b'{"experiment": "toy"}',
        b'{"options": {}}',
        b'{"experiment": 3, "options": {}}',
        b'{"experiment": "", "options": {}}',
        b'{"experiment": "/../../outside", "options": {}}',
        b'{"experiment": "a\\u0000b", "options": {}}',
        b'{"experiment": "%s", "options": {}}' % (b"x" * 5000),
        b'{"experiment": "toy", "options": []}',
        b'{"experiment": "toy", "options": {"a": {"b": 1}}}',
        b'{"experiment": "toy", "options": {"a": [[1]]}}',
        b'{"experiment": "toy", "options": {"a": %s}}' % (b"9" * 5000),
        b'{"experiment": "toy", "options": {"a": 1e999}}',
    ],
    "versions.json": [*ANY_JSON, b'{"seed": []}', b'{"seed": {}}', b'{"seed": %s}' % (b"9" * 5000)],
    "result.json": [
        *ANY_JSON,
        b'{"verdict": 3}',
        b'{"verdict": null}',
        b'{"verdict": ["reached"]}',
        *OUTCOMES,
    ],
    "metrics.jsonl": [
        *ROWS,
        *as_rows(
            *({"step": step, "loss": 1.0} for step in (-1, 1.5, None, "1", True, [1], 2**60, 10**30)),
            *({"step": 1, "loss": loss} for loss in ("1", True, [1.0], {}, 10**310, -1e305)),
        ),
    ],
    "inspections.jsonl": [
        *ROWS,
        *as_rows(
            *({name: value for name, value in LOOK.items() if name != left_out} for left_out in LOOK),
            *(LOOK | {"step": step} for step in (-1, 1.5, None, "1", 2**60)),
            *(
                LOOK | {kind: value}
                for kind in ("sites", "grads", "site_grads")
                for value in ([], 3, {"a": 3})
            ),
            *(
                LOOK | {"grads": {"W1": {"rms": rms}}}
                for rms in ("1", True, [], [[]], ["1"], [True], [{}], {}, 10**310, [10**310], [1e305])
            ),
            *(LOOK | {"flags": flags} for flags in (3, [], {"a": 3}, {"a": [3]}, {"a": "bad"})),
            *(LOOK | {"param_order": order} for order in (3, "W1", [3], {"W1": 0})),
        ),
    ],
    "noise.jsonl": [
        *ROWS,
        *as_rows(
            {"step": 1},
            *({"step": step, "running_scale": 1.0} for step in (-1, 1.5, None, "1", 2**60)),
            *({"step": 1, "running_scale": scale} for scale in ("1", True, [1.0], 1e305)),
        ),
    ],
    "spikes.jsonl": [
        *ROWS,
        *as_rows(
            {"step": 1},
            *({"step": step, "text": "a spike"} for step in (-1, 1.5, None, "1", 2**60)),
            *({"step": 1, "text": text} for text in (None, 3, ["a spike"], {})),
        ),
    ],
    "digit_net.safetensors": [
        *BAD_TENSORS,
        save(ARRAYS),
        *(net(about=text) for text in ("{", "[]", "3", "{}", DEEP.decode())),
        *(
            net(ABOUT | {name: value})
            for name in ABOUT
            for value in (3, [], "swish" * (name != "data") or None)
        ),
        *(net(**{name: None}) for name in ARRAYS),
        net(extra=np.ones(2, np.float32)),
        net(**HIDDEN),
        net(**HIDDEN, W2=np.ones([10, 4], np.float32), b2=ARRAYS["b1"]),
        net(W1=np.ones([9, 784], np.float32), b1=np.ones(9, np.float32)),
        net(W1=np.ones([10, 8], np.float32)),
        net(W1=np.ones([10, 784], np.float64)),
        net(W1=np.ones([10, 784, 1], np.float32)),
        net(W1=np.full([10, 784], np.nan, np.float32)),
        net(b1=np.ones([], np.float32)),
        net(samples=np.ones([], np.float32)),
        net(samples=np.ones([0, 784], np.float32), labels=np.ones(0, np.int32)),
        net(samples=np.full([2, 784], np.inf, np.float32)),
        net(labels=np.array([0, 1, 2], np.int32)),
        net(labels=np.array([0, 10], np.int32)),
        net(labels=np.array([-1, 1], np.int32)),
        net(labels=np.array([0.0, 1.0], np.float32)),
        net(spline=np.ones([28], np.float32)),
        net(spline=np.ones([27, 8], np.float32)),
        net(spline=np.ones([28, 0], np.float32)),
    ],
    "cnn_net.safetensors": [
        *BAD_TENSORS,
        save(CNN_ARRAYS),
        *(cnn(about=text) for text in ("{", "[]", "3", "{}", DEEP.decode())),
        *(cnn(CNN_ABOUT | {name: value}) for name in CNN_ABOUT for value in (3, [], None, ["a"], {})),
        *(cnn(CNN_ABOUT | {"activation": name}) for name in ("softmax", "none", "Relu", "__proto__")),
        *(
            cnn(CNN_ABOUT | {"image": image})
            for image in (
                *([4, 6], [4, 6, 2, 1], [0, 6, 2], [-4, -6, 2], [1, 6, 2], [6, 4, 4], [4.5, 6, 2]),
                *([True, 6, 2], ["4", 6, 2], [2**40, 2**40, 2], [10**30, 6, 2], [2, 2, 2]),
            )
        ),
        *(cnn(**{name.replace("/", "_"): None}) for name in CNN_ARRAYS),
        cnn(extra=np.ones(2, np.float32)),
        cnn(conv2_W=np.ones([3, 3, 3, 3], np.float32), conv2_b=np.ones(3, np.float32)),
        cnn(conv3_W=np.ones([3, 3, 3, 3], np.float32), conv3_b=np.ones(3, np.float32)),
        cnn(dense2_W=np.ones([5, 4], np.float32), dense2_b=np.ones(5, np.float32)),
        *(
            cnn(conv1_W=np.ones(shape, np.float32))
            for shape in ([3, 2, 3, 4], [3, 1, 3, 3], [4, 2, 3, 3], [3, 2, 0, 0], [3, 2, 3], [], [0, 2, 3, 3])
        ),
        cnn(conv1_W=np.ones([3, 2, 3, 3], np.float64)),
        cnn(conv1_W=np.full([3, 2, 3, 3], np.nan, np.float32)),
        cnn(conv1_b=np.ones([], np.float32)),
        cnn(dense1_W=np.ones([5, 48], np.float32)),
        cnn(dense1_b=np.full(5, np.inf, np.float32)),
        cnn(samples=np.ones([], np.float32)),
        cnn(samples=np.ones([2, 24], np.float32)),
        cnn(samples=np.ones([0, 48], np.float32)),
        cnn(samples=np.full([2, 48], np.inf, np.float32)),
        cnn(labels=np.array([0, 1, 2], np.int32)),
        cnn(labels=np.array([0, 5], np.int32)),
        cnn(labels=np.array([-1, 1], np.int32)),
        cnn(labels=np.array([0.0, 1.0], np.float32)),
        cnn(spline=np.ones([28, 8], np.float32)),  # for images of another size
    ],
    "checkpoint.safetensors": [
        *BAD_TENSORS,
        save({"params/W" + "1" * 5000: np.ones(2, np.float32)}),
    ],
}
CASES = [(name, i) for name, contents in DAMAGED.items() for i in range(len(contents))]


def one_line(capsys, words, name):
    """Assert that a command exits with code 2 and prints one line that names a file."""
    capsys.readouterr()
    assert cli.main(words) == 2
    err = capsys.readouterr().err
    assert err.endswith("\n")
    assert_short(err[:-1], name)


def refused(read, name):
    """Assert that a function raises an error that the command line prints as one line."""
    with pytest.raises(FileError) as error:
        read()
    assert_short(" ".join(str(error.value).split()), name)


def assert_short(line, name):
    assert line.isprintable()
    assert name in line
    assert len(line) < 1000


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Change to the parent of an undamaged run, and return the run's folder."""
    monkeypatch.chdir(tmp_path)
    folder = write_run(tmp_path / "run")
    (folder / "noise.jsonl").write_text('{"step": 1, "running_scale": null}\n', encoding="utf-8")
    (folder / "spikes.jsonl").write_text('{"step": 1, "text": "step 1: spike"}\n', encoding="utf-8")
    (folder / "digit_net.safetensors").write_bytes(net())
    (folder / "cnn_net.safetensors").write_bytes(cnn())
    assert cli.main(["report", "run"]) == 0
    return folder


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_gets_one_line(folder, capsys, name):
    for content in DAMAGED[name]:
        (folder / name).write_bytes(content)
        refused(lambda: read_run("run"), name)
    one_line(capsys, ["report", "run"], name)


def test_rows_of_one_kind_may_be_absent_or_null(folder):
    rows = as_rows(
        *(LOOK | {"step": step, "grads": {"W1": {"rms": rms}}} for step, rms in ((1, None), (2, [None, 1])))
    )
    (folder / "inspections.jsonl").write_bytes(b"".join(rows))
    (folder / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": null}\n{"step": 2.0, "other": 3}\n')
    assert cli.main(["report", "run"]) == 0
    for name in ("metrics.jsonl", "inspections.jsonl", "noise.jsonl", "spikes.jsonl"):
        (folder / name).write_bytes(b"")
    assert cli.main(["report", "run"]) == 0


@pytest.mark.parametrize("name", DAMAGED)
def test_a_non_file_gets_one_line(folder, name):
    """A folder, a pipe without a writer, a link to a device and one out of the run are refused, not followed."""
    for _ in no_files(folder / name):
        refused(lambda: read_run("run"), name)
    as_a_link(folder / name)
    assert cli.main(["report", "run"]) == 0


def test_a_picture_that_is_not_a_file_is_named_in_the_page_and_not_followed(folder):
    data = (folder / "weights.png").read_bytes()
    whys = (
        "is not a regular file",
        "is not a regular file",
        *["is a link that leads out of run"] * 2,
        "cannot be",
    )
    for why, _ in zip(whys, no_files(folder / "weights.png"), strict=True):
        assert cli.main(["report", "run"]) == 0
        html = (folder / "report.html").read_text(encoding="utf-8")
        assert re.search(f"<li>weights.png: {why}", html)
        assert base64.b64encode(data[:300]).decode() not in html
    as_a_link(folder / "weights.png")
    assert cli.main(["report", "run"]) == 0
    assert base64.b64encode(data[:300]).decode() in (folder / "report.html").read_text(encoding="utf-8")


def no_files(file):
    """Replace a file with one kind of non-file after another, and then restore it."""
    outside = file.parent.parent / "outside"
    file.rename(outside)
    makers = [
        lambda file: file.mkdir(),
        os.mkfifo,
        lambda file: file.symlink_to("/dev/zero"),
        lambda file: file.symlink_to(outside),
        lambda file: file.symlink_to(file),
    ]
    for make in makers:
        make(file)
        yield
        file.rmdir() if file.is_dir() else file.unlink()
    outside.rename(file)


def as_a_link(file):
    """Replace a file by a link within the run, which is followed."""
    (file.parent / "real").mkdir()
    file.rename(file.parent / "real" / "file")
    file.symlink_to("real/file")


def test_notes_of_a_checkpoint_get_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fit").mkdir()
    (tmp_path / "fit" / "metrics.jsonl").write_text('{"step": 1, "loss": null}\n', encoding="utf-8")
    arrays = {"params/w": np.ones(2, np.float32)}
    file = tmp_path / "fit" / "checkpoint.safetensors"

    def write(notes):
        file.write_bytes(save(arrays, metadata={"notes": notes}))

    write(json.dumps(NOTES))
    assert cli.main(["report", "fit"]) == 0
    assert "Training loss nan" in (tmp_path / "fit" / "report.html").read_text(encoding="utf-8")
    bad = [NOTES | {name: value} for name in NOTES for value in (3, "no", [], {"a": []})]
    for notes in ("", "{", "[]", "3", DEEP.decode(), *map(json.dumps, bad)):
        write(notes)
        refused(lambda: read_run("fit"), file.name)
    for content in (*BAD_TENSORS, save(arrays)):
        file.write_bytes(content)
        refused(lambda: read_run("fit"), file.name)
    one_line(capsys, ["report", "fit"], file.name)


def test_folders_in_a_run_lead_nowhere_else(folder, capsys):
    """Parts are found at any depth, and never through links."""
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "metrics.jsonl").write_text("no rows\n", encoding="utf-8")
    (folder / "linked").symlink_to(outside)
    (folder / "itself").symlink_to(folder)
    deep = folder
    for _ in range(300):
        deep = deep / "a"
    deep.mkdir(parents=True)
    (deep / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n', encoding="utf-8")
    assert cli.main(["report", "run"]) == 0
    (deep / "metrics.jsonl").write_text("no rows\n", encoding="utf-8")
    one_line(capsys, ["report", "run"], "metrics.jsonl")


def test_untrusted_names_are_only_text(folder):
    """Names of parts and pictures may have any length, contain HTML, and not be UTF-8."""
    names = [
        b"\xff\xfe",
        b"<script>alert(1)",
        b"a\nb\x1b[2J",
        b"%s" % (b"x" * 240),
        "é中".encode(),
    ]
    for name in names:
        part = os.path.join(os.fsencode(folder), name)
        os.mkdir(part)
        with open(os.path.join(part, b"metrics.jsonl"), "w", encoding="utf-8") as out:
            out.write('{"step": 1, "loss": 1.0}\n')
        os.link(folder / "weights.png", part + b".png")
    assert cli.main(["report", "run"]) == 0
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert "é中" in html
    assert "<script>alert" not in html


SETTINGS = {"vocab": 4, "width": 3, "cell": "gru"}
GPT = {"vocab": 4, "context": 5, "n_layers": 2, "n_heads": 1, "width": 4}
MODEL = {
    "net": "rnn",
    "settings": SETTINGS,
    "tokenizer": {"name": "characters", "symbols": "\nabc"},
    "lines": False,
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Return the checkpoints of an rnn and a gpt, as bytes."""
    folder, found = tmp_path_factory.mktemp("weights"), {}
    for name, model in (("rnn", gf.rnn(**SETTINGS)), ("gpt", gf.gpt(gf.GPTConfig(**GPT)))):
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        params = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)
        checkpoint.save(folder / name, {"params": params}, {})
        found[name] = (folder / name).read_bytes()
    return found


@pytest.fixture
def model(tmp_path, monkeypatch, weights):
    """Change to the parent of a language model's folder; return a function that writes its `model.json`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lm").mkdir()

    def write(content, net="rnn"):
        (tmp_path / "lm" / "checkpoint.safetensors").write_bytes(weights[net])
        if isinstance(content, bytes):
            (tmp_path / "lm" / "model.json").write_bytes(content)
        else:
            write_json(tmp_path / "lm" / "model.json", content)

    return write


@pytest.mark.slow
@pytest.mark.parametrize(("net", "settings"), [("rnn", SETTINGS), ("gpt", GPT)])
def test_a_whole_model_is_loaded(model, net, settings):
    model(MODEL | {"net": net, "settings": settings}, net)
    assert len(list(sample.write(sample.load_model("lm"), sample.Config(n=3)))) == 3


LARGE = (0, -1, 1.5, "4", None, True, [4], 10**6, 10**9, 10**12, 10**18)
BAD_MODELS = [
    *({key: value for key, value in MODEL.items() if key != left_out} for left_out in MODEL),
    *(MODEL | {key: value} for key in MODEL for value in (3, "lstm", [], None)),
    *(MODEL | {"tokenizer": {"name": name}} for name in ("characters", "words", "")),
    *(MODEL | {"tokenizer": {"name": "characters", "symbols": text}} for text in ("", "cba\n", "aabc", "abcde", 3)),
    MODEL | {"tokenizer": {"name": "bytes"}},
    *(MODEL | {"settings": SETTINGS | {name: size}} for name in ("vocab", "width", "n_layers") for size in LARGE),
    *(MODEL | {"settings": SETTINGS | extra} for extra in ({"cell": "x"}, {"cell": 3}, {"depth": 3}, {"width": 2})),
    *(MODEL | {"settings": {name: 4}} for name in ("vocab", "width")),
]  # fmt: skip
BAD_GPTS = [
    *(
        {name: size}
        for name in ("vocab", "context", "n_layers", "n_heads", "width", "n_kv_heads", "head_size", "hidden")
        for size in LARGE
        if size is not None or name in ("vocab", "width")
    ),
    {"scan": True, "n_layers": 10**9},
    *({"positions": value} for value in (3, "none", "rope")),
    *({"feed": value} for value in (3, "none", None)),
    *({"compute": value} for value in (3, "float", "int8", "S4")),
    *({"dropout": value} for value in ("0", 1.5, -1)),
    *({"tied": value} for value in (3, False, None)),
    {"rope_base": "large"},
    {"unknown": 1},
    {"__class__": 1},
]


def test_a_damaged_model_gets_one_line(model, capsys):
    for content in (*ANY_JSON, *BAD_MODELS):
        model(content)
        refused(lambda: sample.load_model("lm"), "lm")
    one_line(capsys, ["sample", "lm"], "lm")
    model(MODEL | {"tokenizer": {"name": "tiktoken:../../x"}})
    one_line(capsys, ["sample", "lm"], "tiktoken")  # which may not be installed


def test_settings_that_do_not_fit_the_checkpoint_get_one_line(model):
    for settings in BAD_GPTS:
        model(MODEL | {"net": "gpt", "settings": GPT | settings}, "gpt")
        refused(lambda: sample.load_model("lm"), "lm")


def test_a_damaged_checkpoint_of_a_model_gets_one_line(model, capsys, tmp_path):
    model(MODEL)
    file = tmp_path / "lm" / "checkpoint.safetensors"
    for content in BAD_TENSORS:
        file.write_bytes(content)
        refused(lambda: sample.load_model("lm"), file.name)
    file.unlink()
    refused(lambda: sample.load_model("lm"), file.name)
    os.mkfifo(file)
    one_line(capsys, ["sample", "lm"], file.name)


@pytest.mark.parametrize(
    "options",
    [
        {"hidden": [16]},
        {"hidden": "16"},
        {"hidden": 1.5},
        {"hidden": True},
        {"hidden": None},
        {"hidden": 0},
        {"rate": "fast"},
        {"rate": [0.1]},
        {"data": "cifar"},
        {"data": 3},
        {"resume": "yes"},
        {"depth": 3},
    ],
)
def test_options_of_another_type_get_one_line(tmp_path, monkeypatch, capsys, options):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "echo.py").write_text(EXPERIMENT, encoding="utf-8")
    monkeypatch.setattr(cli, "experiments", lambda: {"echo": tmp_path / "echo.py"})
    assert cli.main(["run", "echo", "--folder", "here"]) == 0
    file = tmp_path / "here" / "config.json"
    whole = {"hidden": 16, "rate": None, "data": "digits"}
    assert json.loads(file.read_text(encoding="utf-8"))["options"] == whole
    write_json(file, {"experiment": "echo", "options": whole | options})
    one_line(capsys, ["run", "echo", "--resume", "--folder", "here"], "config.json")


def test_a_damaged_config_is_not_resumed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "echo.py").write_text(EXPERIMENT, encoding="utf-8")
    monkeypatch.setattr(cli, "experiments", lambda: {"echo": tmp_path / "echo.py"})
    (tmp_path / "here").mkdir()
    for content in DAMAGED["config.json"]:
        (tmp_path / "here" / "config.json").write_bytes(content)
        one_line(capsys, ["run", "echo", "--resume", "--folder", "here"], "here")
    assert [file.name for file in (tmp_path / "here").iterdir()] == ["config.json"]
