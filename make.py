"""Set up gradfn with only Python and git, and run its main commands.

    python3 make.py digits    create .venv and train the digit network; options are passed to `gradfn run digits`
    python3 make.py test      create .venv-test and run all checks: ruff, mypy, all tests, all examples
    python3 make.py quick     use the same environment and run only the fast tests
    python3 make.py matrix    run the tests with the oldest packages that pyproject.toml allows on Python 3.11, with the
                              newest ones on 3.12 and 3.13 (as far as they are on the PATH), and once more with jax's
                              next `jax.checkpoint`; --quick runs only the fast tests of what depends on jax
    python3 make.py package   build the sdist and the wheel into dist/, and use the wheel in an environment of its own
    python3 make.py gallery   create .venv, train the networks of docs/gallery and write their pages
    python3 make.py docs      create .venv-docs and build the documentation site into site/; names of examples of the
                              gallery are trained before, by default those that take half a minute
    python3 make.py remat     run the fast tests of traced programs with the latter, on Python 3.12 or newer

It needs no packages; each command creates its environment at first use.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile

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
# Live pages of the site that take seconds to train; those that `make.py gallery` has written are on it too.
QUICK_PAGES = ["digits", "moons"]
# A later jax will use other primitives for jax.checkpoint and checkpoint_name; jax 0.12 has them behind this flag.
NEXT_REMAT = {"JAX_REMAT3": "1"}
FAST = "not slow and not optimized and not accelerator and not attack"
TRACED_PROGRAMS = ["tests/jaxpr", "tests/flatten", "tests/nets/test_gpt.py"]
TRACED_PROGRAMS += [f"tests/inspection/test_{name}.py" for name in ("inspect", "backprop", "origin", "patch")]
# What depends on jax and on other packages, and takes minutes.
QUICK_TESTS = [
    "tests/core",
    "tests/layers",
    "tests/data",
    "tests/inspection",
    "tests/train",
    "tests/test_cli.py",
]
# What `make.py package` does with the installed wheel, with its declared dependencies only.
USE = """
import pathlib, sys, jax, gradfn as gf
net = gf.mlp([3, 4, 2])
loss = gf.batch_mean(gf.classification_loss(net))
x = jax.random.normal(jax.random.key(0), [8, 3])
print(gf.inspect(loss)(net.init(jax.random.key(1)), (x, (x[:, 0] > 0).astype(int))))
assert pathlib.Path(gf.__file__).is_relative_to(sys.prefix), gf.__file__
"""
INSTALLED = """
gradfn is installed in .venv. To use its command:

  {activate}
  gradfn list
"""


def main():
    """Run the command given on the command line; return the exit code."""
    command, options = (sys.argv[1:2] or ["help"])[0], sys.argv[2:]
    if command == "digits":
        python = environment(".venv", "run")
        failed = run([python, "-m", "gradfn", "run", "digits", *options])
        if not failed:
            print(INSTALLED.format(activate=activation(python)))
        return failed
    if command == "gallery":
        python = environment(".venv", "run")
        return run([python, os.path.join("docs", "gallery", "build.py"), *options])
    if command == "docs":
        return docs(options)
    if command in CHECKS:
        python = environment(".venv-test", "test,frameworks")
        failed = [check for check in CHECKS[command] if run([python, *check])]
        for check in failed:
            print("FAILED: " + " ".join(check[1:]))
        return len(failed)
    if command == "matrix":
        return matrix(options)
    if command == "remat":
        return remat()
    if command == "package":
        return package()
    print(__doc__.strip())
    return 0 if command in ("help", "-h", "--help") else 2


def docs(examples):
    """Build the documentation site; return the exit code. A broken link or a missing reference is an error."""
    python = environment(".venv-docs", "docs")
    if run([python, os.path.join("docs", "gallery", "build.py"), *(examples or QUICK_PAGES)]):
        return 1
    if run([python, "-m", "mkdocs", "build", "--strict", "--quiet"], {"NO_MKDOCS_2_WARNING": "1"}):
        return 1
    print("Open in a browser: " + os.path.join(HERE, "site", "index.html"))
    return 0


def matrix(options):
    """Run the tests with each Python; return the number of failures."""
    unknown = [option for option in options if option != "--quick"]
    if unknown:
        sys.exit(f"make.py: matrix: expected --quick or nothing, got {unknown[0]}")
    tests = [*PYTEST, "-m", FAST, *QUICK_TESTS] if options else PYTEST
    outcome, newest = {}, None
    for name, packages in zip(PYTHONS, ("oldest", "newest", "newest"), strict=True):
        kind = f"{name}, {packages} packages"
        found = usable(name)
        if found:
            oldest = packages == "oldest"
            folder = f".venv-{name}-oldest" if oldest else f".venv-{name}"
            python = environment(folder, "test,frameworks", found, oldest)
            outcome[kind] = "FAILED" if run([python, *tests]) else "passed"
            newest = None if oldest else (name, python)
        else:
            outcome[kind] = "not on the PATH"
    if newest:
        name, python = newest
        outcome[f"{name} with the next remat"] = "FAILED" if run([python, *tests], NEXT_REMAT) else "passed"
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
    return run([python, *PYTEST, "-m", FAST, *TRACED_PROGRAMS], NEXT_REMAT)


def package():
    """Build the sdist, and the wheel from it, as users get them; use the wheel; return the exit code."""
    dist = os.path.join(HERE, "dist")
    shutil.rmtree(dist, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        python, gradfn = new_environment(os.path.join(folder, "env"))
        pip = [python, "-m", "pip"]
        build = [python, "-m", "hatchling", "build", "-t", "sdist", "-d", dist]
        if run([*pip, "install", "--quiet", "hatchling"]) or run(build):
            return 1
        (sdist,) = os.listdir(dist)
        if run([*pip, "wheel", "--quiet", "--no-deps", "-w", dist, os.path.join(dist, sdist)]):
            return 1
        (wheel,) = (name for name in os.listdir(dist) if name.endswith(".whl"))
        if run([*pip, "uninstall", "--quiet", "--yes", "hatchling"]):
            return 1
        steps = [[*pip, "install", "--quiet", os.path.join(dist, wheel)], [*pip, "check"]]
        steps += [[gradfn, "--version"], [gradfn, "list"], [gradfn, "table", "784", "16", "10"]]
        steps += [[gradfn, "run", "digits", "--help"], [python, "-c", USE]]
        # Not in this folder, where Python would find the checkout.
        for step in steps:
            if run(step, folder=folder):
                print("FAILED: " + " ".join(step))
                return 1
    print(f"dist/{sdist}, dist/{wheel}: built and used")
    return 0


def lower_bounds(project):
    """Return the oldest version of each package that a pyproject.toml allows, as constraints for pip."""
    return sorted(set(re.findall(r'^ *"([A-Za-z0-9_.-]+)(?:\[.*\])?>=([0-9.]+)', project, re.MULTILINE)))


def usable(name):
    """Return the path of a Python that starts, or None (some version managers install stubs that fail)."""
    found = shutil.which(name)
    return found if found and subprocess.call([found, "-c", ""], stderr=subprocess.DEVNULL) == 0 else None


def activation(python):
    """Return the command that activates the environment of a Python."""
    folder = os.path.relpath(os.path.dirname(python))
    return (
        os.path.join(folder, "activate") if os.name == "nt" else "source " + os.path.join(folder, "activate")
    )


def environment(name, extras, base=sys.executable, oldest=False):
    """Create an environment, unless it exists for the current pyproject.toml; return its Python.

    Args:
        name: of its folder.
        extras: of gradfn, separated by commas.
        base: the Python that creates it.
        oldest: whether to install the oldest packages that pyproject.toml allows.
    """
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
    python, _ = new_environment(folder, base)
    bounds = []
    if oldest:
        file = os.path.join(folder, "oldest.txt")
        with open(file, "w", encoding="utf-8") as stream:
            stream.writelines(f"{package}=={version}\n" for package, version in lower_bounds(current))
        bounds = ["--constraint", file]
    if run([python, "-m", "pip", "install", "--quiet", *bounds, "--editable", HERE + "[" + extras + "]"]):
        sys.exit("make.py: the installation failed; see pip's messages above")
    with open(stamp, "w", encoding="utf-8") as file:
        file.write(current)
    return python


def new_environment(folder, base=sys.executable):
    """Create an environment; return its Python and the path of its `gradfn`, which is not installed yet."""
    if run([base, "-m", "venv", folder]):
        sys.exit("make.py: could not create an environment. On Debian and Ubuntu: apt install python3-venv")
    scripts = os.path.join(folder, "Scripts" if os.name == "nt" else "bin")
    return os.path.join(scripts, "python"), os.path.join(scripts, "gradfn")


def run(command, settings=None, folder=HERE):
    """Run a command in a folder, with extra environment variables; return its exit code."""
    return subprocess.call(command, cwd=folder, env={**os.environ, **(settings or {})})


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
