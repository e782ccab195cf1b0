"""Race several ways to do the same work in one process, and report ratios that hold on a busy machine.

Timings of one program vary from minute to minute by more than the differences of interest, because other
programs come and go and the clock rate changes. So contenders take turns, in an order that changes each round,
every round gives each of them one ratio to the baseline, and what counts is the median of those ratios.

    timings = race({"ours": ours, "plain": plain}, rounds=31)
    report("what was raced", timings, baseline="plain", unit="examples")

A contender is a function that does some work, waits for its results (`jax.block_until_ready`) and returns how
many units of work it did.

Where cpu/wall is well below 1, others had the processor part of the time and the ratio's spread is wide. The ratio of
processor times suffers less from that; but it counts against a contender what it does at the same time on another
processor.
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

Contender = Callable[[], float]  # does work, waits for it, returns how many units it was
PACKAGES = ("gradfn", "jax", "jaxlib", "numpy", "optax")


class Timing(NamedTuple):
    """What was measured of one contender."""

    first: float  # seconds of the first call, which compiles
    wall: list[float]  # seconds a unit of work, for each round
    cpu: list[float]  # seconds of processor time a unit of work, of all threads, for each round


class Summary(NamedTuple):
    """One line of the table."""

    name: str
    rate: float  # units a second, median over rounds
    ratio: float  # of rates, to the baseline's in the same round: median
    low: float  # lower quartile of that ratio
    high: float  # upper quartile
    cpu_ratio: float  # the same ratio of units a second of processor time: median
    cpu_per_wall: float  # how many processors were busy: median
    first: float  # seconds of the first call


def race(contenders: Mapping[str, Contender], rounds: int, warmup: int = 2) -> dict[str, Timing]:
    """Run every contender once a round, and return what each call took.

    Args:
        contenders: by name.
        rounds: how many calls of each are measured.
        warmup: calls of each before that; the first, which compiles, is reported on its own.

    Raises:
        ValueError: no contenders, or fewer than one round or warm-up call.
    """
    if not contenders or rounds < 1 or warmup < 1:
        raise ValueError("race: needs a contender, a round and a warm-up call at least")
    timings = {}
    for name, run in contenders.items():
        first, _, _ = _timed(run)
        timings[name] = Timing(first, [], [])
        for _ in range(warmup - 1):
            run()
    gc.collect()
    gc.disable()  # no contender shall pay for another's garbage; a collection also slows whoever comes after it
    try:
        for number in range(rounds):
            for name in turns(list(contenders), number):
                wall, cpu, units = _timed(contenders[name])
                timings[name].wall.append(wall / units)
                timings[name].cpu.append(cpu / units)
    finally:
        gc.enable()
    return timings


def turns(names: list[str], number: int) -> list[str]:
    """Return who comes when in a round: another one begins each time; when all have begun, the circle turns round.

    With rotation alone each contender would always follow the same one, and inherit its caches.
    """
    circle, start = divmod(number, len(names))
    order = names[start:] + names[:start]
    return order[::-1] if circle % 2 else order


def summarize(timings: Mapping[str, Timing], baseline: str) -> list[Summary]:
    """Return a line for each contender, the one with the highest ratio first."""
    _, wall_of_baseline, cpu_of_baseline = timings[baseline]
    lines = []
    for name, (first, wall, cpu) in timings.items():
        low, ratio, high = quartiles(divided(wall_of_baseline, wall))
        cpu_ratio = statistics.median(divided(cpu_of_baseline, cpu))
        busy = statistics.median(divided(cpu, wall))
        lines.append(Summary(name, 1 / statistics.median(wall), ratio, low, high, cpu_ratio, busy, first))
    return sorted(lines, key=lambda line: -line.ratio)


def divided(above: list[float], below: list[float]) -> list[float]:
    """Divide one by one."""
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


def circumstances(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Return what the figures depend on: versions, processors, how busy they were, settings."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["processors"] = f"{os.cpu_count()} x {_processor()}"
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
    """Print a table of a race, and write it with every single timing to a file if one is named.

    Args:
        title: what was raced.
        timings: from `race`.
        baseline: whose rate is 1.
        unit: what the contenders counted, in the plural: "examples", "steps".
        skipped: why others did not take part, by name.
        packages: whose versions to report.
        json_file: where to write it all.
    """
    lines, about, skipped = summarize(timings, baseline), circumstances(packages), skipped or {}
    rounds = len(timings[baseline].wall)
    title_text = f"{title}\nmedians of {rounds} rounds, in turns; 1 is {baseline}"
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
            "circumstances": about,
            "summary": [line._asdict() for line in lines],
            "skipped": dict(skipped),
            "seconds_per_unit": {name: timing._asdict() for name, timing in timings.items()},
        }
        Path(json_file).write_text(json.dumps(content, indent=1) + "\n")
    return lines


def arguments(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """Return a parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=rounds, help="measured calls of each (%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write every timing there, too")
    return parser


def available(make: Callable[[str], Any], names: Iterable[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return what is made for each name, and why it is not for others: what is not installed."""
    ready, skipped = {}, {}
    for name in names:
        try:
            ready[name] = make(name)
        except ImportError as error:
            skipped[name] = f"{error.name} is not installed"
    return ready, skipped


def _timed(run: Contender) -> tuple[float, float, float]:
    """Return seconds passed, seconds of processor time used, and units of work done."""
    wall, cpu = time.perf_counter(), time.process_time()
    units = run()
    return time.perf_counter() - wall, time.process_time() - cpu, units


def _processor() -> str:
    """Return the processor's name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
