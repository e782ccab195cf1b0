"""The time of each phase, and the programs that the command line keeps on the disk."""

import os
import re
import subprocess
import sys
import threading
import time
import warnings

import jax
import jax.numpy as jnp
import msgspec
import pytest

from gradfn import compiled, timings
from gradfn.runs import judge
from gradfn.runs.outcome import finish, read_result
from gradfn.timings import PHASES, Timings, measured, phase, process_started


class Clock:
    """Time that passes only where a test says so."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(timings.time, "time", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_inner_phases_and_compilations_are_not_counted_twice(clock):
    found = Timings(started=98.0)
    clock.now = 101.0
    found.enter("training")
    clock.now = 110.0
    # The last one contains the first two, as the trace of a function contains those of the functions that it calls.
    found.compiled(103.0, 104.0)
    found.compiled(104.5, 105.0)
    found.compiled(102.0, 106.0)
    found.compiled(106.0, 107.0)
    found.enter("pictures")
    clock.now = 112.0
    found.leave()
    clock.now = 113.0
    found.leave()
    clock.now = 117.0
    found.count()
    assert found.seconds == {
        "import": 2.0,
        "data": 0.0,
        "compile": 5.0,
        "training": 5.0,
        "pictures": 2.0,
        "the rest": 5.0,
    }
    assert sum(found.seconds.values()) == clock.now - 98.0
    text = str(found.table())
    assert re.search(r"compile +5\.00 +26%", text)
    assert re.search(r"total +19\.00", text)


def test_a_phase_ends_with_an_error_and_counts_only_in_the_main_thread():
    with measured(time.time()) as found:
        with pytest.raises(KeyError):
            phase("data")(lambda: time.sleep(0.02) or {}["missing"])()
        thread = threading.Thread(target=phase("pictures")(lambda: time.sleep(0.01)))
        thread.start()
        thread.join()
    assert found.seconds["data"] >= 0.02
    assert found.seconds["pictures"] == 0


def test_what_jax_compiles_is_counted_within_the_block_only():
    with measured(time.time()) as found:
        jax.block_until_ready(jax.jit(lambda x: jnp.sin(x) * 0.123)(jnp.ones(7)))
        programs = found.programs
        assert programs >= 1
        assert found.seconds["compile"] > 0
    jax.block_until_ready(jax.jit(lambda x: jnp.sin(x) * 0.456)(jnp.ones(7)))
    assert found.programs == programs


def test_the_result_of_a_run_contains_the_seconds_where_they_are_measured(tmp_path):
    with measured(time.time()):
        finish(tmp_path, judge((), {"depth": 2}))
    assert list(read_result(tmp_path)["seconds"]) == list(PHASES)
    finish(tmp_path, judge((), {"depth": 2}))
    assert "seconds" not in read_result(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not say when a process started")
def test_the_start_of_the_process_is_that_of_the_system():
    code = "import time; time.sleep(0.3); from gradfn.timings import process_started as p; print(time.time() - p())"
    age = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)
    assert age >= 0.29
    assert process_started() <= time.time()


# An experiment with few programs, started as a script.
EXPERIMENT = '''"""Compute a sine."""
from dataclasses import dataclass
import jax
import jax.numpy as jnp
from gradfn import runs
from gradfn.cli import script

@dataclass(frozen=True)
class Config:
    resume: bool = False
    folder: str | None = None
    timings: bool = False

def run(config):
    folder = runs.start("sine", config)
    x = jnp.arange(9.0)
    sine = jax.jit(lambda x: jnp.sin(x) @ x)(x)
    runs.finish(folder, runs.judge((), {"sine": sine, "sum": jnp.sum(x)}))

if __name__ == "__main__":
    script(__file__)
'''


def started(folder, *words, **environment):
    """Run Python in a process of its own, with the user's cache in `folder`; return what it printed."""
    hidden = ("JAX_ENABLE_COMPILATION_CACHE", "JAX_COMPILATION_CACHE_DIR")
    inherited = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(
        [sys.executable, *words, "--timings"],
        cwd=folder,
        env=inherited | {"XDG_CACHE_HOME": str(folder / "cache")} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.fixture
def sine(tmp_path):
    """Return a function that runs an experiment and returns how many programs it compiled and loaded."""
    (tmp_path / "sine.py").write_text(EXPERIMENT)
    return lambda **environment: programs(started(tmp_path, "sine.py", **environment))


def programs(output):
    return tuple(map(int, re.search(r"(\d+) programs compiled, (\d+) loaded", output).groups()))


def test_a_second_run_compiles_nothing_and_has_the_same_result(tmp_path):
    # All that moons compiles, but few steps.
    words = ("-m", "gradfn", "run", "moons", "--hidden", "3", "--steps", "4", "--points", "20", "--folder")
    n, loaded = programs(started(tmp_path, *words, "first"))
    assert n > 10
    assert loaded == 0
    assert programs(started(tmp_path, *words, "second")) == (0, n)
    first, second = (
        msgspec.json.decode((tmp_path / name / "result.json").read_bytes()) for name in ("first", "second")
    )
    assert first.pop("seconds").keys() == second.pop("seconds").keys()
    assert first == second
    assert (tmp_path / "first/metrics.jsonl").read_bytes() == (tmp_path / "second/metrics.jsonl").read_bytes()


def test_damaged_programs_are_replaced_without_a_word(tmp_path, sine):
    n, loaded = sine()
    assert loaded == 0
    files = sorted((tmp_path / "cache" / "gradfn" / "compiled").rglob("*-cache"))
    assert len(files) == n >= 3
    assert not files[0].parent.stat().st_mode & 0o077
    files[0].write_bytes(b"")
    files[1].write_bytes(files[1].read_bytes()[:100])
    files[2].write_bytes(b"no program")
    assert sine() == (3, n - 3)
    assert sine() == (0, n)


@pytest.mark.parametrize("why", ["off", "a file", "others may write"])
def test_a_run_does_without_the_cache(tmp_path, sine, why):
    place, environment = tmp_path / "cache" / "gradfn" / "compiled", {}
    place.parent.mkdir(parents=True)
    if why == "off":
        environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    elif why == "a file":
        place.write_text("")
    else:
        place.mkdir()
        place.chmod(0o777)
    n, loaded = sine(**environment)
    assert n >= 3
    assert loaded == 0
    assert not list(tmp_path.rglob("*-cache"))


def test_the_folder_of_the_user_precedes(tmp_path, sine):
    mine = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "mine"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    n, _ = sine(**mine)
    assert sine(**mine) == (0, n)
    assert list((tmp_path / "mine").glob("*-cache"))
    assert not (tmp_path / "cache" / "gradfn" / "compiled").exists()


def test_commands_called_from_python_leave_the_settings_of_jax_alone(monkeypatch, tmp_path, capsys):
    from gradfn.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compiled, "keep_programs", lambda: pytest.fail("called"))
    assert main(["run", "neuron", "--timings"]) == 0
    assert "total" in capsys.readouterr().out


def test_the_programs_that_were_not_used_for_longest_are_removed(tmp_path):
    for age, name in enumerate(["new", "used/recently", "old", "oldest"]):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(bytes(100))
        written = 1e9 - 1000 * age
        os.utime(file, (1e9 if "used" in name else written, written))
    compiled.remove_oldest(tmp_path, limit=299)
    assert {file.name for file in tmp_path.rglob("*") if file.is_file()} == {"new", "recently"}
    compiled.remove_oldest(tmp_path / "nowhere", limit=0)


def test_other_warnings_are_shown(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *about: shown.append(str(message)))
    show = compiled._replacing_damaged(tmp_path, warnings.showwarning)
    (tmp_path / "jit_f-12-cache").write_text("")
    (tmp_path / "jit_f2-12-cache").write_text("")
    for message in (
        "Error reading persistent compilation cache entry for 'jit_f': error",
        "Error writing persistent compilation cache entry for 'jit_f2': No space left on device",
        "Error reading it",
    ):
        show(message, UserWarning, "compiler.py", 1)
    assert shown == ["Error reading it"]
    assert [file.name for file in tmp_path.iterdir()] == ["jit_f2-12-cache"]
