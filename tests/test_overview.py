"""`gradfn runs`: each run in a line, whatever became of it; and an experiment that `gradfn new` wrote."""

import json
import subprocess
import sys

import pytest

from gradfn import runs
from gradfn.cli import main
from gradfn.files import owned
from gradfn.runs.overview import overview, table

CODE = '''"""End as requested."""
from dataclasses import dataclass
from pathlib import Path
from gradfn import runs

EXPECTED = (runs.Expectation("depth", at_least=3, unit="m"),)

@dataclass(frozen=True)
class Config:
    """Options."""

    what: str = "finish"
    resume: bool = False
    folder: str | None = None

def run(config):
    config = runs.settle("deeds", config)
    folder = runs.start("deeds", config)
    if config.what == "stop":
        raise KeyboardInterrupt
    if config.what == "fail":
        raise FloatingPointError("the loss became nan\\n at step 3")
    if config.what == "bug":
        raise RuntimeError("a bug")
    runs.finish(folder, runs.judge(EXPECTED, {"depth": 2}))
'''


@pytest.fixture
def deeds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deeds.py").write_text(CODE)


def do(what, *options):
    return main(["run", "deeds.py", "--what", what, "--folder", f"runs/deeds/{what}", *options])


def states():
    return {line.folder.name: (line.state, line.result) for line in overview()}


@pytest.mark.usefixtures("deeds")
def test_every_end_of_a_run_is_told(capsys):
    assert [do("finish"), do("stop"), do("fail")] == [0, 130, 1]
    with pytest.raises(RuntimeError, match="a bug"):
        do("bug")
    expected = {
        "finish": ("finished", "NOT as expected: depth 2 m"),
        "stop": ("interrupted", ""),
        "fail": ("failed", "the loss became nan at step 3"),
        "bug": ("failed", "RuntimeError: a bug"),
    }
    assert states() == expected
    assert all(0 <= line.seconds < 60 for line in overview())
    assert [line.folder.name for line in overview()] == ["bug", "fail", "stop", "finish"]
    capsys.readouterr()
    assert main(["runs", "--json", "deeds"]) == 0
    (first, *_) = json.loads(capsys.readouterr().out)
    assert (first["experiment"], first["state"], first["folder"]) == ("deeds", "failed", "runs/deeds/bug")
    # A run that is resumed is what became of it last, and its time is that of both processes.
    before = runs.folder.read_ended(runs.RUNS / "deeds" / "stop")
    assert do("stop", "--resume") == 130
    assert runs.folder.read_ended(runs.RUNS / "deeds" / "stop")["seconds"] > before["seconds"]
    assert main(["runs", "others"]) == 0
    assert "no runs of others in runs/" in capsys.readouterr().err


@pytest.mark.usefixtures("deeds")
def test_a_run_that_was_killed_is_interrupted_and_one_in_progress_is_running():
    do("stop")
    folder = runs.RUNS / "deeds" / "stop"
    (folder / runs.folder.ENDED).unlink()
    assert states() == {"stop": ("interrupted", "")}
    code = "import sys; from pathlib import Path; from gradfn.files import owned\n"
    code += "with owned(Path(sys.argv[1])): print(flush=True); input()"
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    other.stdout.readline()
    assert states() == {"stop": ("running", "")}
    other.communicate(b"\n")
    with owned(folder):  # the list has left nothing behind
        pass
    # The time of the process that was killed is not known, and neither is that of the whole run.
    do("stop", "--resume")
    assert [line.seconds for line in overview()] == [None]


@pytest.mark.usefixtures("deeds")
def test_damaged_runs_are_listed_and_control_nothing(capsys):
    do("fail")
    folder = runs.RUNS / "deeds" / "fail"
    ended = json.loads((folder / "ended.json").read_text()) | {"error": "a\x1b[2Jb"}
    (folder / "ended.json").write_text(json.dumps(ended))
    assert states()["fail"] == ("failed", "a?[2Jb")
    (folder / "config.json").write_text("{")
    ((state, error),) = states().values()
    assert (state, "config.json" in error) == ("damaged", True)
    capsys.readouterr()
    assert main(["runs"]) == 0
    assert "damaged" in capsys.readouterr().out


@pytest.mark.usefixtures("deeds")
def test_the_table_fits_the_terminal():
    for what in ("finish", "fail"):
        do(what)
    for width in (60, 80, 120):
        rows = table(overview(), width)
        assert max(map(len, rows)) <= width
        assert ("STARTED" in rows[0]) == (width == 120)
        assert rows[0].split()[0] == "RUN"


@pytest.mark.parametrize(
    ("settings", "colored"),
    [({}, False), ({"FORCE_COLOR": "1"}, True), ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False)],
)
@pytest.mark.usefixtures("deeds")
def test_colors_are_only_where_they_are_wanted(monkeypatch, capsys, settings, colored):
    for name in ("FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    do("fail")
    capsys.readouterr()
    main(["runs"])
    main(["list"])
    assert ("\x1b" in capsys.readouterr().out) == colored


@pytest.mark.slow
def test_a_new_experiment_runs_and_has_a_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["new", "spirals"]) == 0
    assert "gradfn run spirals.py --help" in capsys.readouterr().out
    assert main(["new", "spirals.py"]) == 2
    assert "spirals.py exists already, and is left as it is" in capsys.readouterr().err
    done = subprocess.run([sys.executable, "spirals.py", "--steps", "x"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "python spirals.py: --steps: expected an integer, got x\n")
    assert main(["run", "spirals.py"]) == 0
    assert "Expected test accuracy at least 95 %: reached" in capsys.readouterr().out
    (line,) = overview()
    assert (line.experiment, line.state) == ("spirals", "finished")
    assert (line.folder / "boundary.png").exists()
    assert main(["report", "spirals"]) == 0
    page = (line.folder / "report.html").read_text()
    assert "boundary" in page
    assert "test accuracy" in page


def test_a_file_that_is_not_an_experiment_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.py").write_text("x = 1\n")
    assert main(["run", "other.py"]) == 2
    assert "other.py is not an experiment: expected a dataclass Config of options" in capsys.readouterr().err
