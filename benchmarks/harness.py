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
import re
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
    found["CPUs"] = cpus()
    if hasattr(os, "getloadavg"):
        found["load"] = f"{os.getloadavg()[0]:.2f}"
    return found | {name: os.environ[name] for name in ("XLA_FLAGS", "OMP_NUM_THREADS") if name in os.environ}


def cpus() -> str:
    """Return the number and the name of the CPUs, such as "2 x AMD EPYC"."""
    return f"{os.cpu_count()} x {_cpu_name()}"


def report(
    title: str,
    timings: Mapping[str, Timing],
    baseline: str,
    unit: str,
    *,
    aims: Mapping[str, float] | None = None,
    skipped: Mapping[str, str] | None = None,
    packages: Iterable[str] = PACKAGES,
    json_file: str | Path | None = None,
) -> list[Summary]:
    """Print a table of the timings, and add it to a JSON file if one is given.

    Args:
        title: of the table.
        timings: from `race`.
        baseline: the contender with ratio 1.
        unit: the unit of work, in the plural: "examples", "steps".
        aims: for some contenders, how many times the time of the baseline a unit of work may take: 1.1 for at most 10 %
            more. With aims the table has a column `time`, the inverse of the ratio, and a column `aim`. Where an aim is
            relative to another contender, report its timings once more with that one as the baseline.
        skipped: the reason why others did not take part, by name.
        packages: the packages whose versions are reported.
        json_file: the file of this run. The first table that a process writes to a file replaces what was there, the
            others are appended: see `write`.

    Raises:
        ValueError: an aim for a contender that neither took part nor was skipped.
    """
    lines, skipped, aims = summarize(timings, baseline), skipped or {}, aims or {}
    check_aims(aims, (*timings, *skipped))
    rounds = len(timings[baseline].wall)
    columns = [f"{unit}/s", "ratio", "quartiles", "cpu ratio", "cpu/wall"]
    rows = {
        line.name: [
            f"{line.rate:,.0f}",
            f"{line.ratio:.3f}",
            f"{line.low:.3f} {line.high:.3f}",
            f"{line.cpu_ratio:.3f}",
            f"{line.cpu_per_wall:.2f}",
        ]
        for line in lines
    }
    if aims:
        columns += ["time", "aim"]
        for line in lines:
            rows[line.name] += [f"{1 / line.ratio:.3f}", verdict(1 / line.ratio, aims.get(line.name))]
    print_table(f"{title}\nmedians of {rounds} interleaved rounds; 1 is {baseline}", columns, rows)
    about = print_about(skipped, packages)
    if json_file is not None:
        _, wall_of_baseline, cpu_of_baseline = timings[baseline]
        table = {
            "title": title,
            "unit": unit,
            "baseline": baseline,
            "rounds": rounds,
            "summary": [line._asdict() for line in lines],
            "aims": dict(aims),
            "skipped": dict(skipped),
            # One number per round: how many times the baseline's rate.
            "ratios": {
                name: {
                    "wall": rounded(divided(wall_of_baseline, wall)),
                    "cpu": rounded(divided(cpu_of_baseline, cpu)),
                }
                for name, (_, wall, cpu) in timings.items()
            },
        }
        write(json_file, about, table)
    return lines


def report_figures(
    title: str,
    figures: Mapping[str, Mapping[str, float]],
    baseline: str | None = None,
    *,
    aims: Mapping[str, Mapping[str, float]] | None = None,
    skipped: Mapping[str, str] | None = None,
    packages: Iterable[str] = PACKAGES,
    json_file: str | Path | None = None,
) -> None:
    """Print a table of figures of which less is better (seconds to compile, bytes), and add it to a JSON file.

    For what cannot be repeated often, or is not a time; every figure is followed by its ratio to the baseline's in the
    same column. To compare compile times, take for each phase the median of a few interleaved repetitions:

        report_figures(
            "24 layers, unrolled",
            {
                "value_and_grad": {"trace, s": 0.31, "compile, s": 2.10},
                "inspect": {"trace, s": 0.40, "compile, s": 2.90},
            },
            baseline="value_and_grad",
            aims={"inspect": {"compile, s": 1.5}},
        )

    Args:
        title: of the table.
        figures: by row and column; the columns' names include the unit. A row may lack some columns.
        baseline: the row that the others are compared with, or None if the figures stand for themselves.
        aims: by row and column, how many times the baseline's figure it may be.
        skipped: the reason why other rows are missing, by name.
        packages: the packages whose versions are reported.
        json_file: the file of this run: see `write`.

    Raises:
        ValueError: an aim for a row that is neither there nor skipped, or for a figure that is not there.
    """
    skipped, aims = skipped or {}, aims or {}
    columns = list(dict.fromkeys(column for row in figures.values() for column in row))
    check_aims(aims, (*figures, *skipped))
    for row in aims.keys() & figures.keys():
        check_aims(aims[row], figures[row])
    reference = figures[baseline] if baseline is not None else {}
    summary, rows = [], {}
    for row, found in figures.items():
        rows[row] = []
        for column in columns:
            value, one = found.get(column), reference.get(column)
            time, aim = (value / one if value is not None and one else None), aims.get(row, {}).get(column)
            cell = "-" if value is None else f"{value:,.3g}" if value < 100 else f"{value:,.0f}"
            if time is not None and row != baseline:
                cell += f"  {time:.2f}" + (f" of {verdict(time, aim)}" if aim is not None else "")
            rows[row].append(cell)
            if value is not None:
                summary.append({"name": row, "column": column, "value": value, "time": time, "aim": aim})
    print_table(title + (f"\nafter each figure: times {baseline}" if baseline else ""), columns, rows)
    about = print_about(skipped, packages)
    if json_file is not None:
        write(
            json_file,
            about,
            {"title": title, "baseline": baseline, "figures": summary, "skipped": dict(skipped)},
        )


def check_aims(aims: Iterable[str], names: Iterable[str]) -> None:
    """Raise a ValueError for an aim without a row: a row that was renamed must not lose its aim silently."""
    unknown = sorted(set(aims) - set(names))
    if unknown:
        raise ValueError(f"aims for {unknown}, but the table has {sorted(names)}")


def verdict(time: float, aim: float | None) -> str:
    """Return an aim and whether it was reached.

    >>> verdict(1.08, 1.1), verdict(1.104, 1.1), verdict(1.104, None)
    ('1.1 reached', '1.1 missed', '')
    """
    return "" if aim is None else f"{aim:.4g} {'reached' if time <= aim else 'missed'}"


def print_table(title: str, columns: Iterable[str], rows: Mapping[str, Iterable[str]]) -> None:
    """Print a table with named rows."""
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for name, cells in rows.items():
        table.add_row(name, *cells)
    # Wide enough for every row, even where the output is not a terminal.
    Console(width=max(Console().width, 240)).print(table)


def print_about(skipped: Mapping[str, str], packages: Iterable[str]) -> dict[str, str]:
    """Print who was skipped and what the results depend on; return the latter."""
    about, console = environment(packages), Console()
    for name, reason in skipped.items():
        console.print(f"{name}: skipped, {reason}", highlight=False, markup=False, soft_wrap=True)
    text = ", ".join(f"{name} {value}" for name, value in about.items())
    console.print(text, highlight=False, markup=False, soft_wrap=True)
    return about


# The tables that this process has written, by file.
_written: dict[Path, list[dict[str, Any]]] = {}


def write(file: str | Path, about: Mapping[str, str], table: dict[str, Any]) -> None:
    """Add a table to the file of this run, as `{"environment": {...}, "tables": [...]}`.

    A benchmark with several tables writes one file, again after every table: the tables that were finished are there
    if a later one fails. Tables that an earlier process wrote are not kept.
    """
    path = Path(file).absolute()
    tables = _written.setdefault(path, [])
    tables.append(table)
    path.write_text(json.dumps({"environment": dict(about), "tables": tables}, indent=1) + "\n")


def rounded(values: Iterable[float]) -> list[float]:
    """Round to four significant digits: more would be noise, and the files are kept."""
    return [float(f"{value:.4g}") for value in values]


def arguments(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=rounds, help="measured calls of each (%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="also write all tables to this file")
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


def fault_in(errors: str) -> str:
    """Return the line of a traceback that names the error.

    >>> fault_in("Traceback (most recent call last):\\n  ...\\nValueError: no rounds\\n")
    'ValueError: no rounds'
    """
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Exit)\b", line)]
    return (named or lines or ["no message"])[-1][:300]


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
