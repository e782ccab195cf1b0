"""The wheel: an experiment runs from an installed gradfn as from a checkout."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def call(*command, **options):
    """Run a command, and return its exit code and all that it printed."""
    done = subprocess.run(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        **options,
    )
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Return the `gradfn` of an environment with the wheel, and with the packages of this one that it needs."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT]
    code, out = call(*build)
    if code:
        pytest.skip(f"the wheel cannot be built here, which needs pip and hatchling: {out.strip()[-300:]}")
    (wheel,) = folder.glob("gradfn-*.whl")
    venv.create(folder / "env", with_pip=False)
    paths = {"base": str(folder / "env"), "platbase": str(folder / "env")}
    packages = Path(sysconfig.get_path("purelib", vars=paths))
    # The packages of this environment come after those of the new one.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    scripts = Path(sysconfig.get_path("scripts", vars=paths))
    code, out = call(
        *(sys.executable, "-m", "pip", "--python", scripts / "python"),
        *("install", "--quiet", "--no-deps", "--ignore-installed", wheel),
    )
    assert code == 0, out
    return scripts / "gradfn"


@pytest.mark.slow
def test_an_experiment_runs_from_the_wheel(installed, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    code, out = call(
        installed, "run", "digits", "--hidden", "2", "--epochs", "1", cwd=tmp_path, env=environment
    )
    assert code == 0, out
    assert "test accuracy" in out
    (result,) = tmp_path.glob("runs/digits/*/result.json")
    assert {"weights.png", "curves.png"} <= {file.name for file in result.parent.iterdir()}
    code, out = call(installed, "list", cwd=tmp_path, env=environment)
    assert code == 0
    assert "digits" in out
    where = "import gradfn, gradfn.experiments.digits as d; print(gradfn.__file__, d.__file__)"
    code, out = call(installed.with_name("python"), "-c", where, cwd=tmp_path, env=environment)
    assert code == 0, out
    assert all(Path(file).is_relative_to(installed.parents[1]) for file in out.split())


@pytest.mark.slow
def test_an_experiment_runs_from_a_checkout_where_gradfn_is_not_installed(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, ROOT / "experiments" / "digits.py", "--hidden", "2", "--epochs", "1"]
    code, out = call(*command, cwd=tmp_path, env=environment)
    assert code == 0, out
    assert (tmp_path / "runs" / "digits").is_dir()
