"""The page of a run: its content, that it is self-contained, and the errors for folders that do not contain a run."""

import base64
import io
import json
import os
import re
from html import unescape

import jax
import numpy as np
import optax
import pytest

import gradfn as gf
from gradfn import cli
from gradfn.data.dataset import Dataset
from gradfn.pages import page as report
from gradfn.pages.page import command, page, write_report
from gradfn.pages.pictures import _scaled, _still, read_picture
from gradfn.runs import Expectation, RunError, finish, judge, write_json
from gradfn.runs.about import About
from gradfn.runs.digit_net import keep_digit_net, load_digit_net
from gradfn.runs.kept import find_run, read_run
from gradfn.train import checkpoint

ABOUT = {"toy": About("Train a toy.", (), {"hidden": ("nodes <inside>", 16), "seed": ("of the first", 0)})}


def write_run(folder, hidden=4, accuracy=0.5, seed=0, name="accuracy"):
    """Write the files of a run of a digit network."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    shapes = {"W1": (hidden, 784), "b1": (hidden,), "W2": (10, hidden), "b2": (10,)}
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    write_json(folder / "config.json", {"experiment": "toy", "options": {"hidden": hidden, "seed": seed}})
    write_json(folder / "versions.json", {"gradfn": "0.1.0", "seed": seed})
    rows = [{"step": s, "loss": 2.0 / s, "validation_accuracy": 0.5, "seconds": 1.0} for s in (10, 20)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stats = {name: {"rms": 0.01 * (1 + i)} for i, name in enumerate(sorted(shapes))}
    look = {"sites": {"z1": {}}, "site_grads": {"z1": {"rms": [0.1, 0.2]}}, "grads": stats}
    looks = [look | {"step": 0, "flags": {}}, look | {"step": 10, "flags": {"a1": ["saturated"]}}]
    (folder / "inspections.jsonl").write_text("".join(json.dumps(row) + "\n" for row in looks))
    checkpoint.save(folder / "checkpoint.safetensors", {"params": params, "step": np.array(20)}, {})
    (folder / "weights.png").write_bytes(picture(rng, 8))
    (folder / "curves.png").write_bytes(picture(rng, 8))
    if accuracy is not None:
        finish(folder, judge([Expectation(name, at_least=0.4, unit="%")], {name: accuracy}))
    return folder


def picture(rng, side):
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, [side, side, 3], np.uint8)).save(out, "png")
    return out.getvalue()


def text_of(html):
    """Return the words of a page, without its style and its script."""
    body = re.sub(r"<(style|script).*?</\1>", " ", html, flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", body)).split())


def pictures_of(html):
    return [base64.b64decode(data) for data in re.findall(r'"data:image/png;base64,([^"]*)"', html)]


def test_the_page_shows_the_run(tmp_path):
    folder = write_run(tmp_path / "run", hidden=30)
    html = write_report([folder], about=ABOUT).read_text()
    text = text_of(html)
    for expected in (
        "Accuracy 50 %",
        "Reached what was expected: accuracy at least 40 %",
        "Train a toy.",
        "hidden 30 nodes <inside>",
        "gradfn run toy --hidden 30",
        "W1 [30, 784] 23,520",
        "23,820 weights + 40 biases 23,860",
        "training loss 0.1",
        "validation accuracy 50 %",
        "saturated a1, in 1 of 2 inspections",
        "gradfn 0.1.0",
    ):
        assert expected in text
    # The curves are drawn in the page itself.
    assert pictures_of(html) == [(folder / "weights.png").read_bytes()]
    rows = [row.partition("<")[0] for row in html.split('class="rows"')[1].split("<span>")[1:]]
    assert rows[:4] == ["W1", "b1", "W2", "b2"]  # by layer, not by the alphabet


def test_the_page_does_not_load_anything(tmp_path):
    html = write_report([write_run(tmp_path / "run")]).read_text()
    assert "default-src 'none'" in html
    addresses = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert {address.partition(":")[0][:5] for address in addresses if not address.startswith("#")} == {"data"}
    assert "http" not in re.sub(r"http://www.w3.org/\d+/svg", "", html.replace("http-equiv", ""))


def test_two_runs_side_by_side(tmp_path):
    a = write_run(tmp_path / "a", hidden=4)
    b = write_run(tmp_path / "b", hidden=5, accuracy=0.3)
    file = write_report([a, b], about=ABOUT)
    assert file == a / "against-toy-b.html"
    html = file.read_text()
    text = text_of(html)
    for expected in (
        "A toy Accuracy 50 %",
        "B toy Accuracy 30 %",
        "✗ Not reached",
        "The runs differ in hidden",
    ):
        assert expected in text
    assert re.search(r'<tr class="differ"><th scope="row">hidden</th><td>4</td><td>5</td>', html)
    assert re.search(r'<tr><th scope="row">seed</th><td>0</td><td>0</td>', html)
    assert "A, training loss" in text
    assert "B, training loss" in text
    assert len(pictures_of(html)) == 2


def test_an_interrupted_run_shows_as_far_as_it_got(tmp_path):
    folder = write_run(tmp_path / "run", accuracy=None)
    (folder / "inspections.jsonl").unlink()
    (folder / "checkpoint.safetensors").unlink()
    with (folder / "metrics.jsonl").open("a") as out:
        out.write('{"step": 30, "lo')
    assert "No result yet" in text_of(page([read_run(folder)]))
    for file in ("metrics.jsonl", "versions.json"):
        (folder / file).unlink()
    assert "No result yet" in text_of(page([read_run(folder)]))


def test_a_loss_that_was_not_finite_does_not_hide_the_rest(tmp_path):
    folder = write_run(tmp_path / "run")
    look = {"sites": {}, "site_grads": {}, "grads": {"W1": {"rms": None}, "b1": {"rms": 0.0}}}
    (folder / "inspections.jsonl").write_text(json.dumps(look | {"step": 0}) + "\n")
    with (folder / "metrics.jsonl").open("a") as out:
        out.write('{"step": 30, "loss": null}\n')
    html = page([read_run(folder)])
    assert 'class="bad" title="W1, step 0: nan"' in html
    assert 'class="none" title="b1, step 0: 0.00e+00"' in html
    assert "nan" not in "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))


def test_the_parts_of_a_run_are_drawn_together(tmp_path):
    folder = write_run(tmp_path / "run")
    for part in ("seed-0", "seed-1"):
        (folder / part).mkdir()
        (folder / "metrics.jsonl").rename(folder / part / "metrics.jsonl") if part == "seed-0" else (
            folder / part / "metrics.jsonl"
        ).write_text('{"step": 10, "loss": 1.0}\n')
    html = page([read_run(folder)])
    assert "seed-0, training loss" in html
    assert "seed-1, training loss" in html


def test_a_page_is_smaller_than_its_limit_whatever_the_pictures(tmp_path, monkeypatch):
    assert report.LIMIT == 5_000_000
    monkeypatch.setattr(report, "LIMIT", 400_000)
    folder = write_run(tmp_path / "run")
    for name in "ab":
        (folder / f"{name}.png").write_bytes(picture(np.random.default_rng(0), 300))  # 360 kB each, as base64
    file = write_report([folder])
    assert 100_000 < file.stat().st_size < 400_000
    assert len(pictures_of(file.read_text())) == 3


def test_the_command_contains_what_differs_from_the_defaults(tmp_path):
    run = read_run(write_run(tmp_path / "run"))
    options = {"hidden": 16, "sizes": [1, 2], "b_1": 0.5, "lines": True, "data": None, "name": "a b"}
    assert command(run._replace(options=options), ABOUT["toy"]) == (
        "gradfn run toy --sizes 1 2 --b-1 0.5 --lines --name 'a b'"
    )


def test_the_digit_net_is_read_back_unchanged(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.random([30, 784], dtype=np.float32)
    labels = np.arange(30, dtype=np.int32) % 10
    probabilities = np.eye(10)[labels]
    probabilities[[1, 21, 17]] = np.eye(10)[0] * [[0.5], [0.7], [0.9]]
    data = Dataset((images, labels), (images, labels), (images, labels), "noise", (28, 28))
    params = {"W1": rng.random([3, 784]), "b1": np.zeros(3), "W2": np.ones([10, 3]), "b2": np.zeros(10)}
    keep_digit_net(tmp_path, params, data, probabilities, "relu", "sigmoid", "quadratic", enlarged_from=8)
    net = load_digit_net(tmp_path / "digit_net.safetensors")
    assert net.about == {"activation": "relu", "output": "sigmoid", "loss": "quadratic", "data": "noise"}
    np.testing.assert_array_equal(net.params["W1"], params["W1"].astype(np.float32))
    # The first correct one of each label (for 1 that at 11), then the most confident mistakes.
    assert net.labels.tolist() == [*range(10), 7, 1]
    np.testing.assert_array_equal(net.samples, images[[0, 11, *range(2, 10), 17, 21]])
    assert net.spline.shape == (28, 8)
    with pytest.raises(ValueError, match=r"expected one of sigmoid, .*, identity, got 'softmax'"):
        keep_digit_net(tmp_path, params, data, probabilities, "softmax")
    with pytest.raises(ValueError, match=r"images of 28x28 pixels, got \[8, 8\]"):
        keep_digit_net(tmp_path, params, data._replace(shape=(8, 8)), probabilities)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "expected a run's folder, or an experiment's name"),
        ("a b c", "got a b c"),
        ("nowhere", "nowhere: neither a run's folder nor an experiment with a run in runs/nowhere"),
        ("empty", "empty: not the folder of a run (it has no config.json)"),
        ("run/part", "run/part: only a part of a run; name the folder of the run, run"),
        ("run --ot x", "no option '--ot' (did you mean --out?)"),
        ("run --out", "--out needs the name of a file"),
        ("run --out=", "--out needs the name of a file"),
        ("run --out nowhere/x.html", "nowhere/x.html: cannot be written (No such file or directory)"),
        ("broken", "broken/config.json: Input data was truncated"),
        ("torn", "torn/metrics.jsonl: line 1: Expected `object`, got `int`"),
        ("net", "net/digit_net.safetensors: not a readable safetensors file"),
    ],
)
def test_a_mistake_gets_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run")
    (tmp_path / "run" / "part").mkdir()
    (tmp_path / "empty").mkdir()
    (write_run(tmp_path / "broken") / "config.json").write_text("{")
    (write_run(tmp_path / "torn") / "metrics.jsonl").write_text("3\n{}\n")
    (write_run(tmp_path / "net") / "digit_net.safetensors").write_text("nothing")
    assert cli.main(["report", *words.split()]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert (captured.out, captured.err.count("\n")) == ("", 1)


def test_the_command_line_writes_the_page_of_the_latest_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs" / "toy" / "2026a")
    latest = write_run(tmp_path / "runs" / "toy" / "2026b")
    assert cli.main(["report", "toy"]) == 0
    assert re.fullmatch(r"wrote runs/toy/2026b/report.html \(0.\d MB\): .*\n", capsys.readouterr().out)
    assert (latest / "report.html").exists()
    assert find_run("toy") == latest.relative_to(tmp_path)
    assert cli.main(["report", "toy", "runs/toy/2026a", "--out=x.html"]) == 0
    assert (tmp_path / "x.html").exists()
    with pytest.raises(RunError, match="nowhere"):
        find_run("nowhere")


def test_files_of_other_programs_are_not_overwritten(tmp_path):
    folder, mine = write_run(tmp_path / "run"), tmp_path / "thesis.html"
    mine.write_text("<html>mine</html>")
    with pytest.raises(RunError, match=r"thesis\.html: already exists and is not a page that gradfn wrote"):
        write_report([folder], mine)
    assert mine.read_text() == "<html>mine</html>"
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(mine)
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("pipe", "link", "dangling", "run"):  # as root, /dev/null could be replaced
        with pytest.raises(RunError, match=f"{name}: already exists"):
            write_report([folder], tmp_path / name)
    file = write_report([folder], tmp_path / "new.html")
    assert write_report([folder], file) == file


def test_an_item_of_a_dict_is_never_its_method(tmp_path):
    """`part.values`, `.items`, `.keys`, `.copy`, `.count` in a template are items of the dict, or an error."""
    import jinja2

    environment = report._environment()
    names = ("values", "items", "keys", "copy", "get", "pop", "count")
    text = " ".join(f"{{{{ part.{name} }}}}" for name in names)
    assert environment.from_string(text).render(part={name: f"<{name}>" for name in names}) == " ".join(
        f"&lt;{name}&gt;" for name in names
    )
    for name in names:
        with pytest.raises(jinja2.UndefinedError, match=name):
            environment.from_string(f"{{{{ part.{name} }}}}").render(part={})
    folder = write_run(tmp_path / "run")
    for html in (page([read_run(folder)]), page([read_run(folder)] * 2)):
        assert "method" not in html.replace('<form method="dialog">', "")
        assert 'title="z1, step 0: 1.58e-01"' in html  # the values inside the network


def test_rows_of_heat_maps_are_in_the_order_of_use(tmp_path):
    folder = write_run(tmp_path / "run")
    names = ["blocks/1/b/W", "blocks/10/a/W", "blocks/1/a/W", "embed/W"]
    sites = {"embedded": {}, "blocks/1/a": {}, "blocks/1/b": {}, "blocks/10/a": {}}
    look = {"step": 0, "sites": sites, "site_grads": {}, "grads": {name: {"rms": 1.0} for name in names}}

    def rows(look):
        (folder / "inspections.jsonl").write_text(json.dumps(look) + "\n")
        html = report.flows([read_run(folder)])[0][0]["params"]
        return re.findall(r"<span>([^<]+)</span>", html)

    # First a current run, where a parameter that the loss does not use is last. Then a run of an earlier version.
    order = ["embed/W", "blocks/10/a/W", "blocks/1/b/W"]
    assert rows(look | {"param_order": order}) == [*order, "blocks/1/a/W"]
    assert rows(look) == ["embed/W", "blocks/1/a/W", "blocks/1/b/W", "blocks/10/a/W"]


def test_a_run_without_rows_shows_its_picture_of_the_curves_and_its_film(tmp_path):
    from PIL import Image

    folder = write_run(tmp_path / "run")
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "blue")]
    frames[0].save(folder / "film.gif", save_all=True, append_images=frames[1:])
    assert "data:image/gif;base64," in page([read_run(folder)])
    assert len(pictures_of(page([read_run(folder)]))) == 1
    (folder / "metrics.jsonl").unlink()
    assert len(pictures_of(page([read_run(folder)]))) == 2  # weights, curves
    last = _scaled(_still(read_picture((folder / "film.gif").read_bytes()), 1000), 1.0)
    with Image.open(io.BytesIO(last.data)) as image:
        assert image.convert("RGB").getpixel((0, 0))[2] > 200  # the end of a film that does not fit


def test_a_metric_that_was_measured_again_at_the_end_is_labeled(tmp_path):
    folder = write_run(tmp_path / "run")
    write_json(folder / "result.json", {"verdict": "done", "validation_accuracy": 0.53})
    assert "validation accuracy during training 50 %" in text_of(page([read_run(folder)]))
    write_json(folder / "result.json", {"verdict": "done", "validation_accuracy": 0.5})
    assert "during training" not in text_of(report.charts([read_run(folder)])[1])


def test_a_folder_of_fit_gets_a_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    net = gf.mlp([3, 2, 2])
    x, y = np.random.default_rng(0).normal(size=[64, 3]).astype(np.float32), np.arange(64) % 2
    start = net.init(jax.random.key(0))
    options = {"batch_size": 16, "seed": 5, "inspect_every": 4, "noise_every": 2, "progress": False}
    loss = gf.batch_mean(gf.classification_loss(net))
    gf.fit(loss, start, (x, y), optax.sgd(0.1), 12, folder="digits", **options)
    assert cli.main(["report", "digits"]) == 0  # a folder takes precedence over an experiment of that name
    assert capsys.readouterr().out.startswith("wrote digits/report.html")
    html = (tmp_path / "digits" / "report.html").read_text()
    text = text_of(html)
    for expected in (
        *(
            "training loss 0.",
            "steps 12",
            "Options digits Training loss",
            "Noise scale of the gradient (examples)",
        ),
        *("batch_size 16", "seed 5", "W1 [2, 3] 6", "10 weights + 4 biases 14", f"jax {jax.__version__}"),
    ):
        assert expected in text
    assert "To run it again" not in text
    rows = re.findall(r"<span>([^<]+)</span>", html.split('class="rows"')[1])
    assert rows == ["W1", "b1", "W2", "b2"]
    assert cli.main(["report", "digits", "digits"]) == 0
    assert (tmp_path / "digits" / "against-digits.html").exists()
    # A run without a checkpoint yet.
    os.remove("digits/checkpoint.safetensors")
    assert "No result yet" in text_of(page([read_run("digits")]))
