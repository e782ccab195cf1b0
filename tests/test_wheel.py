"""The sdist and the wheel: what is in them, and an experiment that runs from an installed gradfn as from a checkout."""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import gradfn

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


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
def built(tmp_path_factory):
    """Return the sdist, and the wheel that is built from it."""
    pytest.importorskip("hatchling", reason="building a wheel needs hatchling")
    folder = tmp_path_factory.mktemp("dist")
    code, out = call(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=ROOT)
    assert code == 0, out
    (sdist,) = folder.glob("gradfn-*.tar.gz")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder]
    code, out = call(sys.executable, "-m", "pip", "wheel", *options, sdist)
    assert code == 0, out
    (wheel,) = folder.glob("gradfn-*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """Return the `gradfn` of an environment with the wheel, and with the packages of this one that it needs."""
    folder = tmp_path_factory.mktemp("wheel")
    venv.create(folder / "env", with_pip=False)
    paths = {"base": str(folder / "env"), "platbase": str(folder / "env")}
    packages = Path(sysconfig.get_path("purelib", vars=paths))
    # The packages of this environment come after those of the new one.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    scripts = Path(sysconfig.get_path("scripts", vars=paths))
    code, out = call(
        *(sys.executable, "-m", "pip", "--python", scripts / "python"),
        *("install", "--quiet", "--no-deps", "--no-index", "--ignore-installed", built[1]),
    )
    assert code == 0, out
    return scripts / "gradfn"


@pytest.fixture
def outside(tmp_path):
    """Return how to call a command where the checkout is not found."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {"cwd": tmp_path, "env": environment}


@pytest.mark.slow
def test_what_is_in_the_sdist_and_in_the_wheel(built):
    sdist, wheel = built
    with tarfile.open(sdist) as archive:
        source = {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f"gradfn-{gradfn.__version__}.dist-info/METADATA").decode()
    assert {"pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "make.py"} <= source
    assert f"\nVersion: {gradfn.__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert {name.split("/")[0] for name in names} == {"gradfn", f"gradfn-{gradfn.__version__}.dist-info"}
    # All of the package, with its stubs and the scripts and styles of its pages, and the experiments; nothing else.
    files = {name for name in names if name.startswith("gradfn/")}
    assert files == {
        re.sub("^experiments/", "gradfn/experiments/", file.relative_to(ROOT).as_posix())
        for folder in ("gradfn", "experiments")
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert {"gradfn/py.typed", "gradfn/__init__.pyi", "gradfn/experiments/_template.py"} <= files
    assert any(name.endswith(".js") for name in files)


@pytest.mark.slow
def test_the_command_of_the_wheel(installed, outside):
    assert call(installed, "--version", **outside) == (0, f"gradfn {gradfn.__version__}\n")
    code, out = call(installed, "list", **outside)
    assert code == 0
    assert "digits" in out
    assert call(installed, "new", "mine", **outside)[0] == 0
    assert "--hidden INT" in call(installed, "run", "mine.py", "--help", **outside)[1]
    code, out = call(installed.with_name("python"), "-c", "import gradfn as gf; gf.mlp([2, 1])", **outside)
    assert code == 0, out


@pytest.mark.slow
def test_an_experiment_runs_from_the_wheel(installed, outside, tmp_path):
    code, out = call(installed, "run", "digits", "--hidden", "2", "--epochs", "1", **outside)
    assert code == 0, out
    assert "test accuracy" in out
    (result,) = tmp_path.glob("runs/digits/*/result.json")
    assert {"weights.png", "curves.png"} <= {file.name for file in result.parent.iterdir()}
    # Outside of the environment's folder of commands, which is not on the PATH, the next command is named in full.
    following = re.search(r"^next: (\S+ report \S+) --open$", out, re.MULTILINE).group(1).split()
    assert call(*following, **outside)[0] == 0
    assert (result.parent / "report.html").exists()
    where = "import gradfn, gradfn.experiments.digits as d; print(gradfn.__file__, d.__file__)"
    code, out = call(installed.with_name("python"), "-c", where, **outside)
    assert code == 0, out
    assert all(Path(file).is_relative_to(installed.parents[1]) for file in out.split())


@pytest.mark.slow
def test_an_experiment_runs_from_a_checkout_where_gradfn_is_not_installed(outside, tmp_path):
    command = [sys.executable, ROOT / "experiments" / "digits.py", "--hidden", "2", "--epochs", "1"]
    code, out = call(*command, **outside)
    assert code == 0, out
    assert (tmp_path / "runs" / "digits").is_dir()


def test_the_version_is_stated_once():
    assert "version" in PROJECT["dynamic"]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (.*)$", citation, re.MULTILINE).group(1) == gradfn.__version__


def test_every_package_has_a_lower_bound():
    extras = PROJECT["optional-dependencies"].values()
    for package in [*PROJECT["dependencies"], *(each for extra in extras for each in extra)]:
        assert re.fullmatch(
            r"gradfn\[[a-z,]+\]|[A-Za-z0-9_.-]+(\[[a-z,]+\])?>=[0-9.]+(,<[0-9.]+)?", package
        ), package


KINDS = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]


def test_the_changelog_has_the_form_of_keep_a_changelog():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert text.startswith("# Changelog\n")
    versions = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert versions[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", version) for version in versions[1:])
    for section in re.split(r"^## .*$", text, flags=re.MULTILINE)[1:]:
        kinds = re.findall(r"^### (.*)$", section, re.MULTILINE)
        assert kinds == [kind for kind in KINDS if kind in kinds]
