"""Where the wall time of `gradfn run` goes, in a first run, which compiles, and in a second one, which loads programs.

    python -m benchmarks.experiments                    # six experiments
    python -m benchmarks.experiments --only gpt vit     # others
    python -m benchmarks.experiments --only all

Every experiment starts with an empty cache of its own. It takes few steps, so that what precedes and follows the
training is seen. The phases are those of `gradfn run --timings`.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import harness
from benchmarks.rows import TOTAL

# Few steps of each.
OPTIONS = {
    "backprop": "",
    "cnn": "--epochs 1",
    "curvature": "--steps 100",
    "digits": "--epochs 2",
    "gpt": "--steps 40",
    "grok": "--steps 100",
    "induction": "--steps 50 --width 16 --heads 2",
    "influence": "--steps 40 --subsets 4 --nets 1",
    "lens": "--steps 40",
    "mnist": "--recipe tutorial --epochs 1",
    "moons": "--steps 100",
    "neuron": "",
    "noise": "--epochs 1",
    "rates": "--steps 20",
    "reconstruct": "--steps 40 --climb 16",
    "regions": "--epochs 1",
    "regress": "--steps 100",
    "reverse": "--steps 40",
    "rnn": "--steps 40",
    "saliency": "--steps 40",
    "saturate": "--steps 10",
    "spike": "--steps 200",
    "vit": "--epochs 1",
    "width": "--epochs 1 --widths 4 16 --depths 1 --seeds 1",
}
DEFAULT = ("digits", "moons", "regress", "cnn", "rnn", "gpt")
FIRST, SECOND, COMPILED = "first run", "second run", "programs compiled"
# A second run compiles nothing.
AIMS = {SECOND: {COMPILED: 0.0}}


def measured(name: str, options: str, folder: Path, run: str) -> dict[str, float]:
    """Run an experiment in a process of its own, with a cache in `folder`; return the seconds of its phases."""
    words = [sys.executable, "-m", "gradfn", "run", name, *shlex.split(options), "--timings"]
    words += ["--folder", str(folder / run)]
    # In the folder of gradfn's own choice, programs of earlier runs would be found.
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_ENABLE_COMPILATION_CACHE": "true",
    }
    environment = os.environ | cache
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    compiled = re.search(r"^(\d+) programs compiled", done.stdout, re.MULTILINE)
    if done.returncode or compiled is None:
        raise RuntimeError(f"{shlex.join(words)}: exit code {done.returncode}: {done.stderr[-1000:]}")
    seconds: dict[str, float] = json.loads((folder / run / "result.json").read_text())["seconds"]
    phases = {f"{phase}, s": value for phase, value in seconds.items()}
    return {TOTAL: sum(seconds.values())} | phases | {COMPILED: float(compiled[1])}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=[*OPTIONS, "all"], default=DEFAULT, metavar="NAME")
    parser.add_argument("--json", metavar="FILE", help="also write all tables to this file")
    options = parser.parse_args(arguments)
    for name in OPTIONS if "all" in options.only else options.only:
        with tempfile.TemporaryDirectory() as folder:
            figures = {run: measured(name, OPTIONS[name], Path(folder), run) for run in (FIRST, SECOND)}
        title = f"gradfn run {name} {OPTIONS[name]}".strip()
        harness.report_figures(title, figures, FIRST, aims=AIMS, json_file=options.json)


if __name__ == "__main__":
    main()
