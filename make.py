"""Set gradfn up from nothing but Python and git, and do the main things with it.

    python3 make.py digits    an environment in .venv, then the digit network; options go on to `gradfn run digits`
    python3 make.py test      an environment in .venv-test, then every check: ruff, mypy, all tests, all examples
    python3 make.py quick     the same environment, then the tests that take no time
    python3 make.py matrix    the tests under each of Python 3.11, 3.12 and 3.13 that is on the PATH, each with the
                              newest jax that it gets, and once more with jax's next `jax.checkpoint`
    python3 make.py remat     the quick tests of what looks into programs, with that, on Python 3.12 or newer

It needs no package; each command makes its environment when it is not there yet.
"""

import os
import shutil
import subprocess
import sys

PYTHONS = ("python3.11", "python3.12", "python3.13")
HERE = os.path.dirname(os.path.abspath(__file__))
PYTEST = ["-m", "pytest", "-q", "-n", "2"]
CHECKS = {
    "test": [
        ["-m", "ruff", "check", "."],
        ["-m", "ruff", "format", "--check", "."],
        ["-m", "mypy"],
        [*PYTEST, "-m", "not optimised and not attack"],
        [*PYTEST, "-m", "optimised", "tests"],
    ],
    "quick": [
        [*PYTEST, "-m", "not slow and not optimised"],
        [*PYTEST, "-m", "optimised and not slow", "tests"],
    ],
}
# jax.checkpoint and checkpoint_name become other primitives in a jax to come; jax 0.12 has them on request.
NEXT_REMAT = {"JAX_REMAT3": "1"}
LOOKS_INTO_PROGRAMS = ["tests/jaxpr", "tests/flatten", "tests/nets/test_gpt.py"]
LOOKS_INTO_PROGRAMS += [
    f"tests/inspection/test_{name}.py" for name in ("inspect", "backprop", "origin", "patch")
]


def main():
    """Do what the command line asks for; return the exit code."""
    command, options = (sys.argv[1:2] or ["help"])[0], sys.argv[2:]
    if command == "digits":
        python = environment(".venv", "run")
        return run([python, "-m", "gradfn", "run", "digits", *options])
    if command in CHECKS:
        python = environment(".venv-test", "test,frameworks")
        failed = [check for check in CHECKS[command] if run([python, *check])]
        for check in failed:
            print("FAILED: " + " ".join(check[1:]))
        return len(failed)
    if command == "matrix":
        return matrix()
    if command == "remat":
        return remat()
    print(__doc__.strip())
    return 0 if command in ("help", "-h", "--help") else 2


def matrix():
    """Run the tests under each Python; return how many failed."""
    outcome, newest = {}, None
    for name in PYTHONS:
        found = works(name)
        if found:
            python = environment(".venv-" + name, "test,frameworks", found)
            outcome[name] = "FAILED" if run([python, *PYTEST]) else "passed"
            newest = name, python
        else:
            outcome[name] = "not on the PATH"
    if newest:
        name, python = newest
        outcome[f"{name} with the next remat"] = "FAILED" if run([python, *PYTEST], NEXT_REMAT) else "passed"
    for name, text in outcome.items():
        print(f"{name}: {text}")
    return list(outcome.values()).count("FAILED")


def remat():
    """Run the quick tests of what looks into programs with jax's next remat; return the exit code."""
    found = {name: works(name) for name in PYTHONS[1:]}
    name = next((name for name in reversed(PYTHONS) if found.get(name)), None)
    if name is None:
        print("no Python 3.12 or newer here: the tests with jax's next remat are skipped")
        return 0
    python = environment(".venv-" + name, "test,frameworks", found[name])
    return run([python, *PYTEST, "-m", "not slow and not optimised", *LOOKS_INTO_PROGRAMS], NEXT_REMAT)


def works(name):
    """Return a Python's path where there is one that starts (some version managers leave stubs that do not)."""
    found = shutil.which(name)
    return found if found and subprocess.call([found, "-c", ""], stderr=subprocess.DEVNULL) == 0 else None


def environment(name, extras, base=sys.executable):
    """Make the environment, where there is none of this state of pyproject.toml; return its Python."""
    folder = os.path.join(HERE, name)
    python = os.path.join(folder, "Scripts" if os.name == "nt" else "bin", "python")
    with open(os.path.join(HERE, "pyproject.toml"), encoding="utf-8") as file:
        wanted = file.read()
    stamp = os.path.join(folder, "made-from.toml")
    if os.path.exists(stamp):
        with open(stamp, encoding="utf-8") as file:
            if file.read() == wanted:
                return python
    print(f"Setting up {name} (a minute or more: it installs jax and what else is needed) ...", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    if run([base, "-m", "venv", folder]):
        sys.exit("make.py: no environment could be made. On Debian and Ubuntu: apt install python3-venv")
    if run([python, "-m", "pip", "install", "--quiet", "--editable", HERE + "[" + extras + "]"]):
        sys.exit("make.py: the installation failed; what pip says is above")
    with open(stamp, "w", encoding="utf-8") as file:
        file.write(wanted)
    return python


def run(command, settings=None):
    """Run a command here, with further environment variables; return its exit code."""
    return subprocess.call(command, cwd=HERE, env={**os.environ, **(settings or {})})


def newer_python():
    """Go on under a Python that is new enough, where this one is too old."""
    if sys.version_info >= (3, 11):  # noqa: UP036
        return
    for name in reversed(PYTHONS):
        found = works(name)
        if found:
            sys.exit(subprocess.call([found, *sys.argv]))
    sys.exit(f"make.py: gradfn needs Python 3.11 or newer, this is {sys.version.split()[0]}")


if __name__ == "__main__":
    newer_python()
    sys.exit(main())
