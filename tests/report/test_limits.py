"""The page of any run is made, in bounded memory, and has at most `LIMIT` bytes."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gradfn.pages import page as report
from gradfn.pages.page import LIMIT, flows, page
from gradfn.runs import Expectation, judge
from gradfn.runs import kept as keeping
from gradfn.runs.curve import Curve
from gradfn.runs.digit_net import DigitNet
from gradfn.runs.kept import Kept, Part, read_run
from gradfn.runs.rows import HEAT_ROWS, MAX_FLAGS, MAX_METRICS, Spikes, inspections, metrics
from tests.report.test_page import picture, text_of, write_run

LETTERS = "\"<&'x\x00\u20ac\U0001f600"  # of one byte to six in a page
SIZES = st.sampled_from([0, 1, 3, 40, 300])
PICTURES, HIDDEN, ROWS = st.sampled_from([0, 1, 30]), st.sampled_from([0, 10, 700]), st.sampled_from([1, 30])
LENGTHS = st.sampled_from([1, 30, 1000, 10_000])


def texts(letters, n):
    """Return `n` different texts of about `letters` letters, all of which have to be escaped."""
    return [(f"{i}" + LETTERS * (letters // len(LETTERS) + 1))[:letters] + str(i) for i in range(n)]


def part(n_metrics, n_params, n_rows, letters):
    names = texts(letters, n_metrics)
    history = metrics([[{"step": i} | dict.fromkeys(names, float(i % 3)) for i in range(n_rows)]])
    params = texts(letters, n_params)
    stats = {name: {"rms": 0.5 + i} for i, name in enumerate(params)}
    look = {"sites": stats, "site_grads": stats, "grads": stats, "flags": {name: [name] for name in params}}
    shapes = dict.fromkeys(params, (3, 5))
    looks = inspections([look | {"step": i} for i in range(n_rows)], shapes)
    return Part(history, looks, shapes, Curve(), Spikes())


def run(folder, n_parts, n_metrics, n_params, n_options, n_pictures, letters, hidden, n_rows):
    trained = part(n_metrics, n_params, n_rows, letters)
    values = texts(letters, n_options)
    arrays = {"W1": np.zeros([hidden, 784], np.float32), "b1": np.zeros([hidden], np.float32)}
    arrays |= {"W2": np.zeros([10, hidden], np.float32), "b2": np.zeros(10, np.float32)}
    about = {"activation": "relu", "output": None, "loss": "quadratic", "data": values[0] if values else ""}
    net = DigitNet(arrays, np.zeros([12, 784], np.float32), np.zeros(12, np.int32), None, about)
    images = {name: picture(np.random.default_rng(0), 100) for name in texts(letters, n_pictures)}
    return Kept(
        folder=folder,
        experiment="toy",
        options={name: [name] * 3 for name in values},
        versions=dict(zip(values, values)),
        result={"outcome": judge([Expectation(values[0], at_least=1)], {values[-1]: 2.0})}
        if values
        else None,
        parts=dict.fromkeys(texts(letters, n_parts), trained),
        pictures=images,
        net=net if hidden else None,
        parts_left_out=10**9,
        pictures_left_out=dict(zip(values, values)),
    )


@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize(
    "sizes", [(0, 0, 0, 0, 0, 1, 0, 1), (8, 12, 120, 300, 6, 1000, 700, 3), (1, 1, 3, 3, 1, 100_000, 10, 1)]
)
def test_a_page_has_at_most_limit_bytes(tmp_path, sizes, two):
    made = run(tmp_path, *sizes)
    html = page([made, made] if two else [made])
    assert len(html.encode(errors="replace")) <= LIMIT
    whole(html)


@pytest.mark.slow
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.tuples(SIZES, SIZES, SIZES, SIZES, PICTURES, LENGTHS, HIDDEN, ROWS), st.booleans())
@example((40, 40, 300, 300, 30, 1000, 700, 30), False)
@example((40, 40, 300, 300, 30, 1000, 700, 30), True)
def test_the_page_of_any_run_is_complete_and_has_at_most_limit_bytes(tmp_path, sizes, two):
    test_a_page_has_at_most_limit_bytes(tmp_path, sizes, two)


def whole(html):
    """Assert that a page is complete and that no text of a run in it is markup."""
    assert html.rstrip().endswith("</html>")
    markup = re.sub(r"<(style|script).*?</\1>", "", html, flags=re.DOTALL)
    assert LETTERS[:3] not in markup


def test_what_is_left_out_is_reported(tmp_path, monkeypatch):
    made = run(tmp_path, 2, MAX_METRICS + 5, HEAT_ROWS + 7, 3000, 3, 60, 0, 3)
    monkeypatch.setattr(report, "SHAPES_ROOM", 20_000)
    text = text_of(page([made]))
    for expected in (
        "The page shows the first 2 of 1,000,000,002 trainings.",
        "and 7 parameters more, closer to the loss",
        "options more.",
        "versions more.",
        "arrays more.",
        "Pictures that are not shown:",
        "is too long to be shown",
    ):
        assert expected in text, expected
    assert re.search(r"and [\d,]+ more Options", text)
    monkeypatch.setattr(report, "CHARTS_ROOM", 30_000)
    assert re.search(r"and \d+ charts more, for which there is no room", text_of(page([made])))
    assert len(made.parts["00"].inspections.flags if "00" in made.parts else ()) <= MAX_FLAGS


def test_maps_have_fewer_columns_where_there_is_little_room_and_go_last(tmp_path):
    made = run(tmp_path, 3, 1, 20, 0, 0, 10, 0, 300)

    def columns(flow):
        rows = flow["params"].split('class="cells"')[1:]
        return rows[0].count("<i ") if rows else 0

    found = [
        [columns(flow) for flow in flows([made], room)[0]] for room in (10**7, 500_000, 250_000, 100_000, 0)
    ]
    assert found[0] == [100, 100, 100]
    assert 0 < found[1][0] < 100
    assert found[2][-1] < found[1][-1]
    assert found[3] == [15, 0, 0]
    assert found[4] == [0, 0, 0]
    text = text_of(page([made]))
    assert "Left out" not in text


def test_trainings_beyond_the_limit_are_counted_and_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(keeping, "MAX_PARTS", 2)
    folder = write_run(tmp_path / "run")
    for i in range(3):
        (folder / f"seed-{i}").mkdir()
        (folder / f"seed-{i}" / "metrics.jsonl").write_text(
            '{"step": 1, "loss": 2}\n' if i < 1 else "damaged"
        )
    run = read_run(folder)
    assert (list(run.parts), run.parts_left_out) == (["", "seed-0"], 2)
    assert "The page shows the first 2 of 4 trainings." in text_of(page([run]))


def test_the_page_does_not_grow_with_the_rows():
    sizes = []
    for n in (10_000, 100_000):
        history = Curve()
        for start in range(0, n, 5_000):
            steps = np.arange(start, start + 5_000)
            history.extend(steps, 1 + np.sin(steps))
        made = part(0, 3, 1, 5)._replace(history=metrics([[{"step": 1, "loss": 1.0}]]))
        made.history.curves["loss"] = history
        run = Kept(Path("."), "", {}, {}, None, {"": made}, {}, None)
        sizes.append(len(page([run])))
    assert abs(sizes[0] - sizes[1]) < 0.1 * min(sizes)


def test_a_name_that_is_not_utf_8_does_not_prevent_the_page(tmp_path):
    folder = write_run(tmp_path / "run")
    part = os.fsdecode(b"seed-\xff")
    (folder / part).mkdir()
    (folder / part / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n')
    assert "seed-?, training loss 2" in text_of(report.write_report([folder]).read_text(encoding="utf-8"))


MEASURED = """
import resource, sys
from gradfn.cli import main
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
code = main(["report", *sys.argv[1:]])
print(code, before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak(*words):
    """Return the memory that a report needs beyond its imports, in MB."""
    command = [sys.executable, "-c", MEASURED, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    code, before, after = map(int, done.stdout.splitlines()[-1].split())
    assert code == 0
    return (after - before) / 1e3


@pytest.mark.slow
def test_a_million_rows_take_little_memory(tmp_path):
    folder = tmp_path / "fit"
    folder.mkdir()
    with (folder / "metrics.jsonl").open("w") as out:
        for i in range(1_000_000):
            loss = "null" if 500_000 <= i < 520_000 else 9.0 if i == 300_000 else 0.5
            out.write(
                f'{{"step": {i}, "epoch": {i / 7}, "loss": {loss}, "test_accuracy": 0.9, "seconds": {i}.5}}\n'
            )
    assert peak(folder) < 60
    html = (folder / "report.html").read_text()
    assert len(html) < 200_000
    assert "the mean of up to 4,096 rows, the band their range" in html
    [points] = re.findall('data-points="([^"]*)"><i class="key c0"></i>training loss', html)
    points = json.loads(points)
    assert points[0] == [0, 0.5]
    assert points[-1] == [999_999, 0.5]
    gaps = [b - a for (a, _), (b, _) in itertools.pairwise(points)]
    assert 16_000 <= max(gaps) < 30_000
    assert peak(folder, folder) < 60


@pytest.mark.slow
def test_very_many_inspections_take_little_memory(tmp_path):
    folder = tmp_path / "fit"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    stats = {"rms": 0.5, "mean": 0.1, "max": 3.0}
    look = {"sites": {"a": stats}, "site_grads": {"a": stats}, "grads": {"W": stats, "b": stats}}
    body = json.dumps(look)[1:]
    dead, alive = (json.dumps({"flags": flags})[1:-1] for flags in ({"a": ["dead"]}, {}))
    with (folder / "inspections.jsonl").open("w") as out:
        out.writelines(f'{{"step": {i}, {alive if i % 4 else dead}, {body}\n' for i in range(200_000))
    assert peak(folder) < 60
    html = (folder / "report.html").read_text()
    assert len(html) < 200_000
    assert "<b>dead</b> a, in 50,000 of 200,000 inspections" in html
    assert "each column is the largest of up to" in html


def test_a_digit_network_that_is_too_large_is_not_read(tmp_path):
    folder = write_run(tmp_path / "run")
    with (folder / "digit_net.safetensors").open("wb") as out:
        out.truncate(1 << 30)  # a sparse file
    assert "The network is too large to run in the page." in text_of(page([read_run(folder)]))
