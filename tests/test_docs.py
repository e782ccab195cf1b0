"""The code blocks and commands of the README and the guides run as written."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# These show no Python code: one lists commands, the other one pictures.
WITHOUT_CODE = {DOCS / "gallery" / "README.md", DOCS / "gallery.md"}
PAGES = [ROOT / "README.md", ROOT / "experiments" / "README.md", *sorted(DOCS.glob("**/*.md"))]


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page not in WITHOUT_CODE],
    ids=lambda page: str(page.relative_to(ROOT)),
)
@pytest.mark.filterwarnings("ignore:.*loader strategy is deprecated:DeprecationWarning")  # of mlflow
def test_python_blocks_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = blocks(page, "python")
    assert found, f"{page.name} shows no code"
    names = {"__name__": "__docs__"}
    for block in found:
        exec(compile(block, str(page), "exec"), names)


def commands():
    """Yield every `gradfn ...` line of the shell blocks."""
    for page in PAGES:
        for block in blocks(page, "sh"):
            for line in block.splitlines():
                if line.startswith("gradfn "):
                    yield pytest.param(line, id=f"{page.relative_to(ROOT)}: {line}")


def shorten(arguments):
    """Shorten a run: one seed, one layer, one epoch or a few steps; keep all other arguments."""
    options = import_module(f"gradfn.experiments.{arguments[1]}").Config.__dataclass_fields__
    for name, least in {"epochs": "1", "steps": "2", "warmup": "0", "seeds": "1", "layers": "1"}.items():
        if f"--{name}" in arguments:
            arguments[arguments.index(f"--{name}") + 1] = least
        elif name in options:
            arguments += [f"--{name}", least]


@pytest.mark.slow
@pytest.mark.parametrize("line", list(commands()))
def test_commands_run(line, tmp_path, monkeypatch, request):
    from gradfn.cli import main

    monkeypatch.chdir(tmp_path)
    arguments = shlex.split(line, comments=True)[1:]
    if "mnist" in line:
        monkeypatch.setenv("GRADFN_MNIST", str(request.getfixturevalue("shared_data") / "mnist"))
    if arguments[0] == "run":
        shorten(arguments)
    if arguments[0] == "report":  # it needs a run of each of these experiments
        for name in arguments[1:]:
            run = ["run", name]
            shorten(run)
            assert main(run) == 0
    assert main(arguments) in (0, None)
