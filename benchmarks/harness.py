"""Compare several implementations of the same work in one process, by ratios that are robust on a busy machine.

Timings of one program vary over minutes by more than the differences of interest, because of other programs and
changing clock rates. Therefore the contenders run interleaved, in an order that changes each round; every round gives
each of them one ratio to the baseline, and the reported result is the median of these ratios.

    timings = race({"ours": ours, "plain": plain}, rounds=31)
    report("title", timings, baseline="plain", unit="examples")

A contender is a function that does some work, waits for its results (`jax.block_until_ready`) and returns the number of
units of work.

If cpu/wall is well below 1, other programs used the CPU at the same time, and the ratios spread widely. The ratio of
CPU times is then more reliable, but it includes the work that a contender does in parallel on other cores.
"""

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

Contender = Callable[[], float]  # does some work, waits for it, returns the number of units
PACKAGES = ("gradfn", "jax", "jaxlib", "numpy", "optax")


class Timing(NamedTuple):
    """The measurements of one contender."""

    first: float  # seconds of the first call, which compiles
    wall: list[float]  # seconds per unit of work, for each round
    cpu: list[float]  # seconds of CPU time per unit of work, of all threads, for each round


class Summary(NamedTuple):
    """One row of the table. All figures but `first` are medians or quartiles over rounds."""

    name: str
    rate: float  # units per second
    ratio: float  # of the rate to the baseline's rate in the same round
    low: float  # lower quartile of that ratio
    high: float  # upper quartile
    cpu_ratio: float  # the same ratio for units per second of CPU time
    cpu_per_wall: float  # the number of busy cores
    first: float  # seconds of the first call


def race(contenders: Mapping[str, Contender], rounds: int, warmup: int = 2) -> dict[str, Timing]:
    """Run every contender once per round, and return the times of all calls.

    Args:
        contenders: by name.
        rounds: the number of measured calls of each.
        warmup: the number of calls of each before that; the first one, which compiles, is reported separately.

    Raises:
        ValueError: no contenders, no rounds, or no warm-up calls.
    """
    if not contenders or rounds < 1 or warmup < 1:
        raise ValueError(
            "race: expected at least one contender, one round and one warm-up call, got "
            f"{len(contenders)}, {rounds} and {warmup}"
        )
    timings = {}
    for name, run in contenders.items():
        first, _, _ = _timed(run)
        timings[name] = Timing(first, [], [])
        for _ in range(warmup - 1):
            run()
    gc.collect()
    gc.disable()  # no contender should pay for another's garbage; a collection also slows the next call
    try:
        for number in range(rounds):
            for name in order_of_round(list(contenders), number):
                wall, cpu, units = _timed(contenders[name])
                timings[name].wall.append(wall / units)
                timings[name].cpu.append(cpu / units)
    finally:
        gc.enable()
    return timings


def order_of_round(names: list[str], number: int) -> list[str]:
    """Return the order of the contenders in a round: rotated by one each round, reversed in every other cycle.

    With rotation alone each contender would always follow the same one, and inherit its caches.
    """
    cycle, start = divmod(number, len(names))
    order = names[start:] + names[:start]
    return order[::-1] if cycle % 2 else order


def summarize(timings: Mapping[str, Timing], baseline: str) -> list[Summary]:
    """Return one row per contender, the one with the highest ratio first."""
    _, wall_of_baseline, cpu_of_baseline = timings[baseline]
    lines = []
    for name, (first, wall, cpu) in timings.items():
        low, ratio, high = quartiles(divided(wall_of_baseline, wall))
        cpu_ratio = statistics.median(divided(cpu_of_baseline, cpu))
        busy = statistics.median(divided(cpu, wall))
        lines.append(Summary(name, 1 / statistics.median(wall), ratio, low, high, cpu_ratio, busy, first))
    return sorted(lines, key=lambda line: -line.ratio)


def divided(above: list[float], below: list[float]) -> list[float]:
    """Divide element by element."""
    return [a / b for a, b in zip(above, below, strict=True)]


def quartiles(values: Iterable[float]) -> tuple[float, float, float]:
    """Return the lower quartile, the median and the upper quartile.

    >>> quartiles([4, 1, 3, 2, 5])
    (2.0, 3.0, 4.0)
    """
    values = list(values)
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def environment(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Return what the results depend on: versions, CPUs, load and settings."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["CPUs"] = f"{os.cpu_count()} x {_cpu_name()}"
    if hasattr(os, "getloadavg"):
        found["load"] = f"{os.getloadavg()[0]:.2f}"
    return found | {name: os.environ[name] for name in ("XLA_FLAGS", "OMP_NUM_THREADS") if name in os.environ}


def report(
    title: str,
    timings: Mapping[str, Timing],
    baseline: str,
    unit: str,
    *,
    skipped: Mapping[str, str] | None = None,
    packages: Iterable[str] = PACKAGES,
    json_file: str | Path | None = None,
) -> list[Summary]:
    """Print a table of the timings, and write it with all single timings to a JSON file if one is given.

    Args:
        title: of the table.
        timings: from `race`.
        baseline: the contender with ratio 1.
        unit: the unit of work, in the plural: "examples", "steps".
        skipped: the reason why others did not take part, by name.
        packages: the packages whose versions are reported.
        json_file: the file to write.
    """
    lines, about, skipped = summarize(timings, baseline), environment(packages), skipped or {}
    rounds = len(timings[baseline].wall)
    title_text = f"{title}\nmedians of {rounds} interleaved rounds; 1 is {baseline}"
    table = Table(
        title=title_text, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )
    table.add_column("", no_wrap=True)
    for column in (f"{unit}/s", "ratio", "quartiles", "cpu ratio", "cpu/wall"):
        table.add_column(column, justify="right", no_wrap=True)
    for line in lines:
        spread = f"{line.low:.3f} {line.high:.3f}"
        cells = (
            f"{line.rate:,.0f}",
            f"{line.ratio:.3f}",
            spread,
            f"{line.cpu_ratio:.3f}",
            f"{line.cpu_per_wall:.2f}",
        )
        table.add_row(line.name, *cells)
    console = Console()
    console.print(table)
    for name, reason in skipped.items():
        console.print(f"{name}: skipped, {reason}", highlight=False)
    console.print(", ".join(f"{name} {value}" for name, value in about.items()), highlight=False)
    if json_file is not None:
        content = {
            "title": title,
            "unit": unit,
            "baseline": baseline,
            "environment": about,
            "summary": [line._asdict() for line in lines],
            "skipped": dict(skipped),
            "seconds_per_unit": {name: timing._asdict() for name, timing in timings.items()},
        }
        Path(json_file).write_text(json.dumps(content, indent=1) + "\n")
    return lines


def arguments(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=rounds, help="measured calls of each (%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="also write all timings to this file")
    return parser


def available(make: Callable[[str], Any], names: Iterable[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return what `make` returns for each name, and the reasons for names that need a missing package."""
    ready, skipped = {}, {}
    for name in names:
        try:
            ready[name] = make(name)
        except ImportError as error:
            skipped[name] = f"{error.name} is not installed"
    return ready, skipped


def _timed(run: Contender) -> tuple[float, float, float]:
    """Return wall-clock seconds, CPU seconds, and units of work."""
    wall, cpu = time.perf_counter(), time.process_time()
    units = run()
    return time.perf_counter() - wall, time.process_time() - cpu, units


def _cpu_name() -> str:
    """Return the model name of the CPU, or the architecture if it is unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
