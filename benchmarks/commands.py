"""The time of commands that compute nothing, relative to a Python process that imports jax.

    python -m benchmarks.commands

`gradfn list`, `gradfn table` and `gradfn --help` import neither jax nor numpy. Each call starts a new process; its time
includes the start of Python, which the first row shows alone.
"""

import statistics
import subprocess
import sys
import time

from benchmarks import harness

IMPORT = "import jax"
COMMANDS = {
    "python": ["-c", "pass"],
    IMPORT: ["-c", "import jax"],
    "gradfn --help": ["-m", "gradfn", "--help"],
    "gradfn list": ["-m", "gradfn", "list"],
    "gradfn table": ["-m", "gradfn", "table", "784", "16", "10"],
    "gradfn run digits --help": ["-m", "gradfn", "run", "digits", "--help"],
}
# The promise is 0.3 s, where importing jax takes 0.5 s.
AIM = 0.6


def seconds_of(rounds: int) -> dict[str, float]:
    """Return the median time of each command, run in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for number in range(-1, rounds):  # the first round fills the caches of files
        for name in harness.order_of_round(list(COMMANDS), max(number, 0)):
            began = time.perf_counter()
            subprocess.run([sys.executable, *COMMANDS[name]], check=True, capture_output=True)
            if number >= 0:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main(arguments: list[str] | None = None) -> None:
    options = harness.arguments((__doc__ or "").partition("\n")[0], rounds=11).parse_args(arguments)
    figures = {name: {"seconds": value} for name, value in seconds_of(options.rounds).items()}
    aims = {name: {"seconds": AIM} for name in COMMANDS if name.startswith("gradfn")}
    harness.report_figures("Commands", figures, IMPORT, aims=aims, json_file=options.json)


if __name__ == "__main__":
    main()
