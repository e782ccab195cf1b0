"""Run every benchmark, one after another, and draw one picture of all ratios with their aims.

    python -m benchmarks.all                            # under 20 minutes on two cores
    python -m benchmarks.all --only gpt_step per_example
    python -m benchmarks.all --json FILE --data FOLDER  # MNIST's folder, for fit_mnist

Each benchmark runs in its own process: PyTorch's threads, XLA's simulated devices and the settings of malloc would
disturb the others. All of them run on the CPU except `accelerator`, which runs only where there is one. A benchmark
that needs a package which is not installed is skipped; one that fails is reported, its finished tables are kept, and
the others run all the same. The file holds the CPU, the versions and every table. It is written again after every
benchmark; the picture, next to it and with the same name, at the end.

`python -m benchmarks.readme FILE` makes the tables of benchmarks/README.md from it.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import harness, picture

ROOT = Path(__file__).parents[1]


class Run(NamedTuple):
    """One benchmark, as `all` runs it."""

    module: str
    options: str
    minutes: float  # expected on two cores
    accelerator: bool = False


# Rounds and cases are chosen so that the sum stays below 20 minutes on two cores.
RUNS = {
    "fit_mnist": Run("benchmarks.fit_mnist", "--rounds 15", 0.9),
    "gpt_step": Run("benchmarks.gpt_step", "--rounds 9", 1.2),
    "gpt_step_kept": Run("benchmarks.gpt_step", "--rounds 9 --malloc kept", 1.2),
    "inspect_overhead": Run(
        "benchmarks.inspect_overhead",
        "--rounds 7 --only gf.gpt 'GPT, layers scanned' MLP 'fit MLP' 'fit 784-16-10'",
        4.4,
    ),
    "capture_overhead": Run("benchmarks.capture_overhead", "--rounds 15", 0.5),
    "per_example": Run("benchmarks.per_example", "--rounds 9", 2.0),
    "per_example_kept": Run("benchmarks.per_example", "--rounds 9 --malloc kept --only GPT-12 LSTM", 0.4),
    "curvature": Run("benchmarks.curvature", "--rounds 9", 1.0),
    "kfac": Run("benchmarks.kfac", "--rounds 3", 0.8),
    "circuits": Run("benchmarks.circuits", "--rounds 2", 1.2),
    "compile_time": Run("benchmarks.compile_time", "", 3.0),
    "commands": Run("benchmarks.commands", "", 0.3),
    "experiments": Run("benchmarks.experiments", "--only digits moons rnn", 0.7),
    "attention": Run("benchmarks.attention", "--rounds 3 --lengths 512 1024 2048", 0.5),
    "loading": Run("benchmarks.loading", "", 0.4),
    "prefetch": Run("benchmarks.prefetch", "--rounds 1 --steps 64", 0.4),
    "saving": Run("benchmarks.saving", "--gigabytes 0.2", 0.2),
    "scaling": Run("benchmarks.scaling", "--devices 1 8 --rules FSDP", 0.5),
    "page": Run("benchmarks.page", "", 0.3),
    "accelerator": Run("benchmarks.accelerator", "", 8.0, accelerator=True),
}
# Compiled programs that a run could load instead of compiling them would make its first calls too fast.
CACHE = "JAX_COMPILATION_CACHE_DIR"


def run_all(names: list[str], extra: Mapping[str, list[str]], file: Path) -> dict[str, Any]:
    """Run benchmarks in turn, and write what they report to a file after each of them.

    Args:
        names: of `RUNS`.
        extra: more arguments for some of them.
        file: the file to write.

    Returns:
        What the file holds: `cpus`, `date`, `minutes`, and by name the `runs`. A run has its `command`, its
        `seconds`, what its process reported (`environment` and `tables`), and `failed` or `skipped` with a reason.
    """
    began, runs = time.monotonic(), {}
    content: dict[str, Any] = {}
    possible = [name for name in names if not RUNS[name].accelerator or has_accelerator()]
    for number, name in enumerate(names, 1):
        if name in possible:
            minutes = sum(RUNS[each].minutes for each in names[number - 1 :] if each in possible)
            say(
                f"[{number}/{len(names)}] {name}: about {RUNS[name].minutes:g} min, to the end {minutes:.1f} min"
            )
            runs[name] = run_one(RUNS[name], extra.get(name, []))
        else:
            runs[name] = {"skipped": "there is no accelerator", "tables": []}
        for problem in runs[name].keys() & {"failed", "skipped"}:
            say(f"{name}: {problem}, {runs[name][problem]}")
        content = {
            "cpus": harness.cpus(),
            "date": date.today().isoformat(),
            "minutes": round((time.monotonic() - began) / 60, 1),
            "runs": runs,
        }
        file.write_text(json.dumps(content, indent=1) + "\n")
    return content


def run_one(run: Run, extra: list[str]) -> dict[str, Any]:
    """Run one benchmark in its own process, which prints its tables; return what it wrote, and why it ended early."""
    arguments = ["-m", run.module, *shlex.split(run.options), *extra]
    environment = {name: value for name, value in os.environ.items() if name != CACHE}
    if not run.accelerator:
        environment["JAX_PLATFORMS"] = "cpu"
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
        file = Path(folder) / "out.json"
        command = [sys.executable, *arguments, "--json", str(file)]
        code = subprocess.run(command, cwd=ROOT, env=environment, stderr=errors).returncode
        errors.seek(0)
        trace = errors.read()
        written = json.loads(file.read_text()) if file.exists() else {"tables": []}
    if "rows" in written:
        written = of_accelerator(written["rows"])
    about = {"command": f"python {shlex.join(arguments)}", "seconds": round(time.monotonic() - began)}
    return about | written | (problem_of(trace, code) if code else {})


def of_accelerator(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the rows of `benchmarks.accelerator` as tables, one per section, with its aims for ratios."""
    environment, tables = {}, {}
    for row in rows:
        if row["section"] == "about":
            environment = {name: str(value) for name, value in row.items() if name not in ("section", "name")}
            continue
        table = tables.setdefault(
            row["section"], {"title": row["section"], "baseline": None, "figures": [], "skipped": {}}
        )
        if "skipped" in row:
            table["skipped"][row["name"]] = row["skipped"]
        if "ms" in row:
            aim = float(row["aim"].removeprefix("<= ")) if row.get("aim", "").startswith("<= ") else None
            figure = {"column": "ms", "value": row["ms"], "time": row.get("over_gradient"), "aim": aim}
            table["figures"].append({"name": row["name"], **figure})
    return {"environment": environment, "tables": [table for table in tables.values() if table["figures"]]}


def problem_of(trace: str, code: int) -> dict[str, str]:
    """Return `{"skipped": reason}` for a package that is not installed, else `{"failed": the error}`.

    >>> problem_of("Traceback ...\\nModuleNotFoundError: No module named 'sklearn'", 1)
    {'skipped': 'sklearn is not installed'}
    >>> problem_of("Traceback ...\\nValueError: too few rounds", 1)
    {'failed': 'ValueError: too few rounds'}
    """
    fault = harness.fault_in(trace)
    missing = re.match(r"ModuleNotFoundError: No module named '([\w.]+)'", fault)
    if missing and missing[1].partition(".")[0] not in ("gradfn", "benchmarks"):
        return {"skipped": f"{missing[1]} is not installed"}
    print(trace, file=sys.stderr)
    return {"failed": fault if trace.strip() else f"exit status {code}"}


def has_accelerator() -> bool:
    """Return whether JAX finds one; in another process, for JAX would reserve its memory in this one."""
    code = "import jax; print(jax.default_backend())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return found.returncode == 0 and found.stdout.strip() != "cpu"


def say(text: str) -> None:
    """Print a line of progress at once, between the tables of the processes."""
    print(f"\n{text}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmarks; return 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--json", type=Path, metavar="FILE", default=Path("benchmarks.json"), help="to write (%(default)s)"
    )
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), help="only these")
    parser.add_argument("--data", metavar="FOLDER", help="the folder with MNIST (default: GRADFN_MNIST)")
    options = parser.parse_args(arguments)
    # saving measures the disk that the results are written to.
    extra = {"saving": ["--folder", str(options.json.absolute().parent)]}
    if options.data:
        extra["fit_mnist"] = ["--data", str(Path(options.data).absolute())]
    content = run_all(options.only, extra, options.json)
    image = options.json.with_suffix(".png")
    has_picture = picture.draw(content, image)
    failed = [name for name, run in content["runs"].items() if "failed" in run]
    say(f"{content['minutes']:g} min; {options.json}" + (f", {image}" if has_picture else ""))
    if failed:
        say("failed: " + ", ".join(f"{name} ({content['runs'][name]['failed']})" for name in failed))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
