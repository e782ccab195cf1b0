"""Run folders: where a run is stored, what it contains, and which run --resume continues."""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from gradfn import runs
from gradfn.files import FileError
from gradfn.pages.figures import curves, save
from gradfn.pages.page import page, write_report
from gradfn.runs.kept import find_run, read_run

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}


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
    return runs.start("toy", config)


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
    found = [file.name for file in folder.iterdir() if not file.name.startswith(".")]
    assert sorted(found) == ["config.json", "versions.json"]


def test_runs_started_together_have_folders_of_their_own():
    assert len({start(Config()) for _ in range(5)}) == 5


def test_settling_a_settled_config_changes_nothing():
    config = runs.settle("toy", Config())
    assert runs.settle("toy", config) == config
    runs.start("toy", config)
    resumed = runs.settle("toy", Config(resume=True))
    assert resumed == Config(resume=True, folder=config.folder)
    assert runs.settle("toy", resumed) == resumed


def test_resume_continues_the_latest_run_that_started(capsys):
    start(Config(hidden=1))
    latest = start(Config(hidden=2, rate=0.30000000000000004, sizes=(3,)))
    (runs.RUNS / "toy" / "99991231T000000.000000Z").mkdir()  # killed before it had written its config
    config = runs.settle("toy", Config(resume=True))
    assert config == Config(2, (3,), 0.30000000000000004, resume=True, folder=str(latest))
    capsys.readouterr()
    runs.start("toy", config)
    assert capsys.readouterr().out == f"resuming in {latest}\n"
    runs.finish(latest, runs.Outcome({"accuracy": 1.0}))
    runs.start("toy", config)
    assert "has finished: computing" in capsys.readouterr().out


def test_resume_after_a_kill_before_the_config_starts_a_new_run(tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / ".config.json.part").write_text('{"experi')
    config = runs.settle("toy", Config(hidden=5, resume=True, folder="here"))
    assert config == Config(hidden=5, resume=False, folder="here")
    runs.start("toy", config)
    assert runs.settle("toy", Config(resume=True, folder="here")).hidden == 5


def test_options_other_than_the_stored_ones_are_refused():
    folder = start(Config(hidden=30))
    asked = Config(hidden=20, resume=True, folder=str(folder))
    with pytest.raises(runs.RunError, match=r"hidden 20: the run in .* has hidden 30. Drop the option"):
        runs.settle("toy", asked)


def test_a_folder_that_contains_a_run_is_not_overwritten():
    folder = start(Config(folder="here"))
    with pytest.raises(runs.RunError, match=r"here already contains a run: resume it \(--resume\)"):
        start(Config(folder="here"))
    with pytest.raises(runs.RunError, match="contains a run of toy, not of other"):
        runs.settle("other", Config(folder=str(folder), resume=True))


@pytest.mark.parametrize("name", ["curves.png", "result.json", "versions.json"])
def test_files_of_other_programs_are_not_overwritten(tmp_path, name):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / name).write_text("{}")
    with pytest.raises(runs.RunError, match=f"here: contains {name}, which does not belong to a run"):
        start(Config(folder="here"))
    assert [(file.name, file.read_text()) for file in (tmp_path / "here").iterdir()] == [(name, "{}")]


def test_a_run_that_died_before_its_config_starts_again_in_its_folder(tmp_path):
    (start(Config(folder="here")) / "config.json").unlink()
    (tmp_path / "here" / ".DS_Store").touch()
    assert sorted(file.name for file in start(Config(folder="here")).iterdir())[-2:] == [
        "config.json",
        "versions.json",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "Input data was truncated"),
        ("[]", "Expected `object`, got `array`"),
        ('{"experiment": "toy"}', "Object missing required field `options`"),
        ('{"experiment": "toy", "options": {"depth": 3}}', "its options do not fit the current toy"),
    ],
)
def test_a_config_that_cannot_be_used_is_named(content, message):
    folder = start(Config())
    (folder / "config.json").write_text(content)
    with pytest.raises(FileError, match=rf"config.json: {message}"):
        runs.settle("toy", Config(resume=True))


def test_the_latest_run_is_the_one_that_started_last_whatever_its_name():
    named = start(Config(folder="runs/toy/zz-baseline"))
    later = start(Config())
    assert runs.latest("toy") == find_run("toy") == later
    assert runs.settle("toy", Config(resume=True)).folder == str(later)
    # Later changes in a folder do not change when its run started.
    (named / "versions.json").touch()
    runs.finish(named, runs.Outcome())
    assert runs.latest("toy") == later
    # Without the stored time, the time when the options were written counts.
    for folder, time in ((named, 2e9), (later, 1e9)):
        versions = json.loads((folder / "versions.json").read_text())
        del versions["started"]
        (folder / "versions.json").write_text(json.dumps(versions))
        os.utime(folder / "config.json", (time, time))
    assert find_run("toy") == named
    (later / "versions.json").write_text("{")
    assert find_run("toy") == named
    assert runs.latest("other") is None


def test_the_page_shows_when_a_run_started_as_a_time_and_not_as_a_version():
    folder = start(Config())
    (folder / "versions.json").write_text('{"gradfn": "0.1.0", "started": "2026-03-01T12:34:56+02:00"}')
    html = page([read_run(folder)])
    assert "1 March 2026, 10:34 UTC" in html
    assert re.findall(r'<th scope="row">([^<]*)</th>', html.partition('id="versions"')[2]) == ["gradfn"]


OWNER = """
import os, sys
from pathlib import Path
from gradfn.files import owned
with owned(Path("here")), owned(Path("fresh")):
    print("owned", flush=True)
    sys.stdin.read()
"""


def snapshot(folder):
    return {file: (file.lstat().st_mtime_ns, file.read_bytes()) for file in sorted(folder.rglob("*"))}


def test_a_folder_has_one_run_at_a_time_and_none_once_its_process_is_dead(tmp_path):
    folder = start(Config(folder="here"))
    runs.finish(folder, runs.Outcome())
    (tmp_path / "fresh").mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT
    ) as owner:
        assert owner.stdout.readline() == b"owned\n"
        before = snapshot(folder)
        with pytest.raises(FileError, match=r"^here: is in use by another run; wait until it ends, or name"):
            runs.start("toy", Config(folder="here", resume=True))
        with pytest.raises(FileError, match=r"^fresh: is in use by another run"):
            start(Config(folder="fresh"))
        assert snapshot(folder) == before
        assert [file.name for file in (tmp_path / "fresh").iterdir()] == [".lock"]
        owner.kill()
    assert runs.start("toy", Config(folder="here", resume=True)) == folder
    assert runs.start("toy", Config(folder="here", resume=True)) == folder  # once more in one process
    runs.disown("here")


def test_a_run_releases_its_folder_at_its_end():
    folder = start(Config(folder="here"))
    with pytest.raises(FileError, match="in use"), ThreadPoolExecutor() as pool:
        pool.submit(runs.start, "toy", Config(folder="here", resume=True)).result()
    runs.finish(folder, runs.Outcome())
    with ThreadPoolExecutor() as pool:
        pool.submit(lambda: runs.disown(runs.start("toy", Config(folder="here", resume=True)))).result()


def test_a_run_that_another_process_started_meanwhile_is_not_overwritten(tmp_path):
    config = runs.settle("toy", Config(folder="here"))
    runs.finish(start(Config(hidden=3, folder="here")), runs.Outcome())
    before = snapshot(tmp_path / "here")
    with pytest.raises(runs.RunError, match="here already contains a run"):
        runs.start("toy", config)
    assert snapshot(tmp_path / "here") == before


def test_a_run_does_not_start_with_options_that_cannot_be_read_back(tmp_path):
    for sizes in (({"a": 1},), (((1,),),), ("\udcff",)):
        with pytest.raises(FileError, match=r"config\.json"):
            start(Config(sizes=sizes, folder="here"))
    assert list(tmp_path.iterdir()) == []


def test_no_write_into_a_run_follows_a_link(tmp_path):
    """The names that a run writes, and those of its unfinished files, may be links that another user put there."""
    folder = start(Config(folder="here"))
    mine = tmp_path / "mine.txt"
    mine.write_text("mine", encoding="utf-8")
    names = (
        "result.json",
        "metrics.jsonl",
        "checkpoint.safetensors",
        "curves.png",
        "report.html",
        "steps.txt",
    )
    for name in names:
        (folder / name).symlink_to(mine)
        (folder / f".{name}.part").symlink_to(mine)
    runs.keep_training(folder, [{"step": 1, "loss": 1.0}], {"w": np.ones(1)})
    save(curves([{"step": 1, "loss": 1.0}]), folder / "curves.png")
    runs.finish(folder, runs.Outcome())
    write_report([folder])
    assert mine.read_text(encoding="utf-8") == "mine"
    assert not any((folder / name).is_symlink() for name in names if name != "steps.txt")
