"""Set up gradfn with only Python and git, and run its main commands.

    python3 make.py digits    create .venv and train the digit network; options are passed to `gradfn run digits`
    python3 make.py test      create .venv-test and run all checks: ruff, mypy, all tests, all examples
    python3 make.py quick     use the same environment and run only the fast tests
    python3 make.py matrix    run the tests with each of Python 3.11, 3.12 and 3.13 that is on the PATH, each with the
                              newest jax available for it, and once more with jax's next `jax.checkpoint`
    python3 make.py gallery   create .venv, train the networks of docs/gallery and write their pages
    python3 make.py remat     run the fast tests of traced programs with the latter, on Python 3.12 or newer

It needs no packages; each command creates its environment at first use.
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
        [*PYTEST, "-m", "not optimized and not attack and not accelerator"],
        [*PYTEST, "-m", "optimized", "tests"],
    ],
    "quick": [
        [*PYTEST, "-m", "not slow and not optimized and not accelerator"],
        [*PYTEST, "-m", "optimized and not slow", "tests"],
    ],
}
# A later jax will use other primitives for jax.checkpoint and checkpoint_name; jax 0.12 has them behind this flag.
NEXT_REMAT = {"JAX_REMAT3": "1"}
TRACED_PROGRAMS = ["tests/jaxpr", "tests/flatten", "tests/nets/test_gpt.py"]
TRACED_PROGRAMS += [f"tests/inspection/test_{name}.py" for name in ("inspect", "backprop", "origin", "patch")]


def main():
    """Run the command given on the command line; return the exit code."""
    command, options = (sys.argv[1:2] or ["help"])[0], sys.argv[2:]
    if command == "digits":
        python = environment(".venv", "run")
        return run([python, "-m", "gradfn", "run", "digits", *options])
    if command == "gallery":
        python = environment(".venv", "run")
        return run([python, os.path.join("docs", "gallery", "build.py"), *options])
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
    """Run the tests with each Python; return the number of failures."""
    outcome, newest = {}, None
    for name in PYTHONS:
        found = usable(name)
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
    """Run the fast tests of traced programs with jax's next remat; return the exit code."""
    found = {name: usable(name) for name in PYTHONS[1:]}
    name = next((name for name in reversed(PYTHONS) if found.get(name)), None)
    if name is None:
        print("Python 3.12 or newer not found: skipping the tests with jax's next remat")
        return 0
    python = environment(".venv-" + name, "test,frameworks", found[name])
    return run([python, *PYTEST, "-m", "not slow and not optimized", *TRACED_PROGRAMS], NEXT_REMAT)


def usable(name):
    """Return the path of a Python that starts, or None (some version managers install stubs that fail)."""
    found = shutil.which(name)
    return found if found and subprocess.call([found, "-c", ""], stderr=subprocess.DEVNULL) == 0 else None


def environment(name, extras, base=sys.executable):
    """Create an environment unless it exists for the current pyproject.toml; return its Python."""
    folder = os.path.join(HERE, name)
    python = os.path.join(folder, "Scripts" if os.name == "nt" else "bin", "python")
    with open(os.path.join(HERE, "pyproject.toml"), encoding="utf-8") as file:
        current = file.read()
    stamp = os.path.join(folder, "made-from.toml")
    if os.path.exists(stamp):
        with open(stamp, encoding="utf-8") as file:
            if file.read() == current:
                return python
    print(f"Setting up {name} (a minute or more: it installs jax and other packages) ...", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    if run([base, "-m", "venv", folder]):
        sys.exit("make.py: could not create an environment. On Debian and Ubuntu: apt install python3-venv")
    if run([python, "-m", "pip", "install", "--quiet", "--editable", HERE + "[" + extras + "]"]):
        sys.exit("make.py: the installation failed; see pip's messages above")
    with open(stamp, "w", encoding="utf-8") as file:
        file.write(current)
    return python


def run(command, settings=None):
    """Run a command in this folder, with extra environment variables; return its exit code."""
    return subprocess.call(command, cwd=HERE, env={**os.environ, **(settings or {})})


def newer_python():
    """Restart with a newer Python if this one is too old."""
    if sys.version_info >= (3, 11):  # noqa: UP036
        return
    for name in reversed(PYTHONS):
        found = usable(name)
        if found:
            sys.exit(subprocess.call([found, *sys.argv]))
    sys.exit(f"make.py: expected Python 3.11 or newer, got {sys.version.split()[0]}")


if __name__ == "__main__":
    newer_python()
    sys.exit(main())
