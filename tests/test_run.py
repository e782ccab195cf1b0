"""Run folders: where a run takes place, what it holds, and what --resume goes on with."""

import json
import os
import re
from dataclasses import dataclass

import pytest

from gradfn import run as runs
from gradfn.files import FileError
from gradfn.report.kept import find_run, read_run
from gradfn.report.page import page


@dataclass(frozen=True)
class Config:
    hidden: int = 16
    sizes: tuple[int, ...] = (1, 2)
    rate: float = 0.1
    seed: int = 0
    resume: bool = False
    folder: str | None = None


@pytest.fixture(autouse=True)
def _stand_in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def start(config):
    config = runs.settle("toy", config)
    return runs.begin("toy", config)


def test_a_run_has_a_folder_with_its_options_and_versions():
    folder = start(Config(hidden=30))
    assert folder.parts[:2] == ("runs", "toy")
    content = json.loads((folder / "config.json").read_text())
    assert content == {
        "experiment": "toy",
        "options": {"hidden": 30, "sizes": [1, 2], "rate": 0.1, "seed": 0},
    }
    versions = json.loads((folder / "versions.json").read_text())
    assert versions["seed"] == 0
    assert {"python", "gradfn", "jax", "jaxlib", "optax", "numpy", "platform"} <= set(versions)
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "versions.json"]


def test_runs_started_together_have_folders_of_their_own():
    assert len({start(Config()) for _ in range(5)}) == 5


def test_settling_a_settled_config_changes_nothing():
    config = runs.settle("toy", Config())
    assert runs.settle("toy", config) == config
    runs.begin("toy", config)
    resumed = runs.settle("toy", Config(resume=True))
    assert resumed == Config(resume=True, folder=config.folder)
    assert runs.settle("toy", resumed) == resumed


def test_resume_goes_on_with_the_latest_that_has_begun(capsys):
    start(Config(hidden=1))
    latest = start(Config(hidden=2, rate=0.30000000000000004, sizes=(3,)))
    (runs.RUNS / "toy" / "99991231T000000.000000Z").mkdir()  # killed before it had written its config
    config = runs.settle("toy", Config(resume=True))
    assert config == Config(2, (3,), 0.30000000000000004, resume=True, folder=str(latest))
    capsys.readouterr()
    runs.begin("toy", config)
    assert capsys.readouterr().out == f"going on in {latest}\n"
    runs.finish(latest, {"accuracy": 1.0})
    runs.begin("toy", config)
    assert "finished before" in capsys.readouterr().out


def test_resume_in_a_folder_that_was_killed_before_its_config_starts_anew(tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / ".config.json.part").write_text('{"experi')
    config = runs.settle("toy", Config(hidden=5, resume=True, folder="here"))
    assert config == Config(hidden=5, resume=False, folder="here")
    runs.begin("toy", config)
    assert runs.settle("toy", Config(resume=True, folder="here")).hidden == 5


def test_options_other_than_the_stored_ones_are_refused():
    folder = start(Config(hidden=30))
    asked = Config(hidden=20, resume=True, folder=str(folder))
    with pytest.raises(runs.RunError, match=r"hidden 20: the run in .* has hidden 30. Drop the option"):
        runs.settle("toy", asked)


def test_a_folder_that_holds_a_run_is_not_written_over():
    folder = start(Config(folder="here"))
    with pytest.raises(runs.RunError, match=r"here holds a run: go on with it \(--resume\)"):
        start(Config(folder="here"))
    with pytest.raises(runs.RunError, match="holds a run of toy, not of other"):
        runs.settle("other", Config(folder=str(folder), resume=True))


@pytest.mark.parametrize("name", ["curves.png", "result.json", "versions.json"])
def test_no_file_of_somebody_else_is_written_over(tmp_path, name):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / name).write_text("{}")
    with pytest.raises(runs.RunError, match=f"here: contains {name}, which is not of a run"):
        start(Config(folder="here"))
    assert [(file.name, file.read_text()) for file in (tmp_path / "here").iterdir()] == [(name, "{}")]


def test_a_run_that_died_before_its_config_begins_again_in_its_folder(tmp_path):
    (start(Config(folder="here")) / "config.json").unlink()
    (tmp_path / "here" / ".DS_Store").touch()
    assert sorted(file.name for file in start(Config(folder="here")).iterdir())[1:] == [
        "config.json",
        "versions.json",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "Input data was truncated"),
        ("[]", "Expected `object`, got `array`"),
        ('{"experiment": "toy"}', "Object missing required field `options`"),
        ('{"experiment": "toy", "options": {"depth": 3}}', "not what toy takes now"),
    ],
)
def test_a_config_that_cannot_be_used_is_named(content, message):
    folder = start(Config())
    (folder / "config.json").write_text(content)
    with pytest.raises(FileError, match=rf"config.json: {message}"):
        runs.settle("toy", Config(resume=True))


def test_the_latest_run_is_the_one_that_began_last_whatever_its_name():
    named = start(Config(folder="runs/toy/zz-baseline"))
    later = start(Config())
    assert runs.latest("toy") == find_run("toy") == later
    assert runs.settle("toy", Config(resume=True)).folder == str(later)
    # What happens in a folder later does not make its run begin later.
    (named / "versions.json").touch()
    runs.finish(named, {})
    assert runs.latest("toy") == later
    # Runs of an earlier version have not kept it: when their options were written counts.
    for folder, time in ((named, 2e9), (later, 1e9)):
        versions = json.loads((folder / "versions.json").read_text())
        del versions["begun"]
        (folder / "versions.json").write_text(json.dumps(versions))
        os.utime(folder / "config.json", (time, time))
    assert find_run("toy") == named
    (later / "versions.json").write_text("{")
    assert find_run("toy") == named
    assert runs.latest("other") is None


def test_the_page_tells_when_a_run_began_as_a_time_and_not_as_a_version():
    folder = start(Config())
    (folder / "versions.json").write_text('{"gradfn": "0.1.0", "begun": "2026-03-01T12:34:56+02:00"}')
    html = page([read_run(folder)])
    assert "1 March 2026, 10:34 UTC" in html
    assert re.findall(r'<th scope="row">([^<]*)</th>', html.partition('id="versions"')[2]) == ["gradfn"]
