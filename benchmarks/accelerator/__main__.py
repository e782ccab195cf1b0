"""The command: runs the sections one after another, each in its own process (see `benchmarks.accelerator`)."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import accelerator, harness
from benchmarks.accelerator.checks import correctness
from benchmarks.accelerator.common import FULL, REDUCED, Row, device_kind
from benchmarks.accelerator.gpt import fit, gpt, largest
from benchmarks.accelerator.overhead import attention, beyond, overhead
from benchmarks.accelerator.pytorch import pytorch
from benchmarks.accelerator.small import small

MINUTES = 7.75
# The most important first.
SECTIONS = {
    "gpt": gpt,
    "pytorch": pytorch,
    "overhead": overhead,
    "correctness": correctness,
    "fit": fit,
    "attention": attention,
    "small": small,
    "largest": largest,
    "beyond": beyond,
}


def about() -> Row:
    """Return what the results depend on."""
    packages = (*harness.PACKAGES, "torch", "jax-cuda13-plugin", "jax-cuda12-plugin")
    kind = {"device": device_kind(), "platform": jax.default_backend(), "devices": jax.device_count()}
    return kind | harness.environment(packages)


def run_section(name: str, reduced: bool) -> None:
    """Run one section in this process, and print each row as a line of JSON."""
    shapes = REDUCED if reduced else FULL

    def emit(row: str, **figures: Any) -> None:
        print("ROW " + json.dumps({"section": name, "name": row} | figures), flush=True)

    if name == "about":
        emit("about", **about())
    else:
        SECTIONS[name](shapes, emit)


def rows_of(name: str, reduced: bool, seconds: float) -> Iterator[Row]:
    """Run one section in its own process; yield its rows as they arrive, and a last one if it ended early."""
    command = [sys.executable, "-m", "benchmarks.accelerator", "--section", name] + ["--reduced"] * reduced
    # PyTorch's process uses JAX for the initial parameters only, so JAX must not reserve device memory.
    environment = os.environ | ({"JAX_PLATFORMS": "cpu"} if name == "pytorch" else {})
    environment |= {
        "XLA_PYTHON_CLIENT_MEM_FRACTION": environment.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    }
    expired = threading.Event()
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        ) as process,
    ):

        def stop() -> None:
            expired.set()
            process.kill()

        timer = threading.Timer(max(seconds, 0.1), stop)
        timer.start()
        assert process.stdout
        for line in process.stdout:
            if line.startswith("ROW "):
                yield json.loads(line[4:])
        code = process.wait()
        timer.cancel()
        errors.seek(0)
        fault = harness.fault_in(errors.read())
    if expired.is_set():
        yield {"section": name, "name": name, "skipped": "out of time"}
    elif code:
        yield {"section": name, "name": name, "skipped": f"failed: {fault}"}


def cells(row: Row) -> list[str]:
    """Return the cells of a table row."""
    if "skipped" in row:
        return [row["section"], row["name"], f"skipped: {row['skipped']}"]
    forms = {
        "ok": lambda ok: "right" if ok else "WRONG",
        "difference": "differs by {:.1e}".format,
        "bound": "at most {:.0e}".format,
        "batch": "batch {}".format,
        "ms": "{:.1f} ms".format,
        "over_gradient": "{:.3f} of the gradient's time".format,
        "quartiles": lambda pair: "[{:.3f} {:.3f}]".format(*pair),
        "aim": "aim {}".format,
        "tokens_per_s": "{:,.0f} tokens/s".format,
        "examples_per_s": "{:,.0f} examples/s".format,
        "mfu": "MFU {:.1%}".format,
        "peak_gb": lambda gb: f"peak {gb:.2f} GB" if gb >= 0.1 else f"peak {1e3 * gb:.2f} MB",
        "first_call_s": "first call {:.0f} s".format,
        "loss": "loss {:.3f}".format,
    }
    figures = [form(row[name]) for name, form in forms.items() if row.get(name) is not None]
    return [row["section"], row["name"], ", ".join(figures)]


def main(arguments: list[str] | None = None) -> int:
    """Run the sections in order; return the number of failed correctness checks."""
    parser = argparse.ArgumentParser(description=accelerator.__doc__.partition("\n")[0])
    parser.add_argument(
        "--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="only these sections"
    )
    parser.add_argument("--minutes", type=float, default=MINUTES, help="time limit in minutes (%(default)s)")
    parser.add_argument("--reduced", action="store_true", help="small shapes, to try the script on a CPU")
    parser.add_argument(
        "--json", metavar="FILE", default="accelerator.json", help="the file to write (%(default)s)"
    )
    parser.add_argument("--section", choices=["about", *SECTIONS], help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.section:
        run_section(options.section, options.reduced)
        return 0
    end, rows = time.monotonic() + 60 * options.minutes, []
    console = Console(width=160)
    for name in ("about", *options.only):
        for row in rows_of(name, options.reduced, end - time.monotonic()):
            rows.append(row)
            Path(options.json).write_text(
                json.dumps({"reduced": options.reduced, "rows": rows}, indent=1) + "\n"
            )
            if name != "about":
                console.print("  ".join(cells(row)), highlight=False, markup=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    for column in ("section", "", "figures"):
        table.add_column(column, overflow="fold")
    for row in rows:
        if row["section"] != "about":
            table.add_row(*cells(row))
    console.print(table)
    known = {k: v for k, v in rows[0].items() if k not in ("section", "name")} if rows else {}
    console.print(
        ", ".join(f"{name} {value}" for name, value in known.items()), highlight=False, markup=False
    )
    return sum(row.get("ok") is False for row in rows)


if __name__ == "__main__":
    sys.exit(main())
