"""Make the tables of benchmarks/README.md from the files in benchmarks/results, one per CPU.

    python -m benchmarks.readme FILE...    # first copy what `benchmarks.all` wrote, without single rounds, to results
    python -m benchmarks.readme            # only fill the tables

The text between two marks, `<!-- benchmark: NAME -->` and `<!-- end -->`, is replaced; all other text is written by
hand. NAME is that of a benchmark of `benchmarks.all`, or `cpus`. Every table has one column per CPU, with
the time relative to the baseline: the median, and the quartiles over rounds.
"""

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import picture
from benchmarks.rows import Row, rows_of

FOLDER = Path(__file__).parent
README, RESULTS = FOLDER / "README.md", FOLDER / "results"
MARKS = re.compile(r"(<!-- benchmark: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
Result = dict[str, Any]  # what `benchmarks.all` wrote on one CPU


def keep(content: Result, folder: Path) -> Path:
    """Write the summary of a run, and its picture, to files with the CPU's name; return the first."""
    runs = {
        name: run
        | {
            "tables": [
                {key: value for key, value in table.items() if key != "ratios"} for table in run["tables"]
            ]
        }
        for name, run in content["runs"].items()
    }
    file = folder / f"{slug(content)}.json"
    folder.mkdir(exist_ok=True)
    file.write_text(json.dumps(rounded(content | {"runs": runs}), indent=1) + "\n")
    picture.draw(content, file.with_suffix(".png"))
    return file


def rounded(value: Any) -> Any:
    """Return JSON data with all floats rounded to four significant digits."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list) else value


def results(folder: Path = RESULTS) -> list[Result]:
    """Return all results, the newest first."""
    found = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    return sorted(found, key=lambda result: result["date"], reverse=True)


def filled(text: str, found: list[Result]) -> str:
    """Return the text with the tables between its marks made anew.

    Args:
        text: of the README.
        found: from `results`.

    Raises:
        ValueError: a benchmark with results has no marks in the text.
    """
    have = {name for result in found for name, run in result["runs"].items() if run["tables"]}
    unmarked = have - {name for _, name, _ in MARKS.findall(text)}
    if unmarked:
        raise ValueError(f"results of {sorted(unmarked)} without marks in the README")
    return MARKS.sub(lambda match: match[1] + "\n" + section(match[2], found) + "\n" + match[3], text)


def section(name: str, found: list[Result]) -> str:
    """Return the text between the marks of a benchmark."""
    if name == "cpus":
        return cpus(found)
    columns = {
        result["cpus"]: {table["title"]: table for table in result["runs"][name]["tables"]}
        for result in found
        if name in result["runs"] and result["runs"][name]["tables"]
    }
    if not columns:
        return "No results yet.\n"
    titles = dict.fromkeys(title for tables in columns.values() for title in tables)
    return "\n".join(
        markdown(title, {who: tables[title] for who, tables in columns.items() if title in tables})
        for title in titles
    )


def cpus(found: list[Result]) -> str:
    """Return a list of the CPUs with versions, and the newest picture."""
    lines = []
    for result in found:
        environments = [run.get("environment", {}) for run in result["runs"].values()]
        others = ("CPUs", "load", "XLA_FLAGS")  # scaling sets the last one for itself
        versions = {name: each[name] for each in environments for name in each if name not in others}
        about = ", ".join(f"{name} {version}" for name, version in versions.items())
        loads = [float(each["load"]) for each in environments if "load" in each]
        # More than the number of CPUs: other programs were running.
        about += f", load up to {max(loads):.1f}" if loads else ""
        note = f" {result['note']}" if "note" in result else ""
        lines.append(f"- **{result['cpus']}**, {result['date']}: {about}.{note}\n")
        ended = {
            name: run.get("failed") or run.get("skipped")
            for name, run in result["runs"].items()
            if run.keys() & {"failed", "skipped"}
        }
        lines += [f"  {name}: {reason}\n" for name, reason in ended.items()]
    pictures = [f"{slug(result)}.png" for result in found if (RESULTS / f"{slug(result)}.png").exists()]
    if pictures:
        lines.append(f"\n![Times relative to their baselines, with the aims](results/{pictures[0]})\n")
    return "".join(lines)


def slug(result: Result) -> str:
    """Return the name of the files of a result: "2-x-amd-epyc"."""
    return re.sub(r"\W+", "-", result["cpus"].lower()).strip("-")


def markdown(title: str, tables: dict[str, dict[str, Any]]) -> str:
    """Return one table with a column per CPU.

    Args:
        title: of the table.
        tables: by CPU; below are the reasons of those that were skipped.
    """
    lines = figures_of(tables) if any("figures" in table for table in tables.values()) else times_of(tables)
    skipped = [
        f"{name}: {reason}" + (f" ({who})" if len(tables) > 1 else "")
        for who, table in tables.items()
        for name, reason in table["skipped"].items()
    ]
    note = f"\nSkipped: {'; '.join(skipped)}.\n" if skipped else ""
    return f"{title}:\n\n" + "\n".join(lines) + "\n" + note


def times_of(tables: dict[str, dict[str, Any]]) -> list[str]:
    """Return the lines of a table of timings: one row per contender, the fastest first."""
    by_name = {who: {row.name: row for row in rows_of(table)} for who, table in tables.items()}
    names = dict.fromkeys(name for rows in by_name.values() for name in rows)
    aims = {name: row.aim for rows in by_name.values() for name, row in rows.items() if row.aim is not None}
    first = next(iter(by_name.values()))
    order = sorted(names, key=lambda name: first[name].time if name in first else float("inf"))
    head = ["", *(["aim"] if aims else []), *tables]
    lines = [line(head), line(["---"] + ["---:"] * (len(head) - 1))]
    for name in order:
        aim = [f"{aims[name]:.4g}" if name in aims else ""] if aims else []
        lines.append(line([name, *aim, *(cell(rows.get(name)) for rows in by_name.values())]))
    return lines


def figures_of(tables: dict[str, dict[str, Any]]) -> list[str]:
    """Return the lines of a table of figures: their columns side by side, for one CPU after the other."""
    cells = {
        (who, figure["column"], figure["name"]): cell(row, with_aim=True)
        for who, table in tables.items()
        for figure, row in zip(table["figures"], rows_of(table), strict=True)
    }
    columns = dict.fromkeys((who, column) for who, column, _ in cells)
    names = dict.fromkeys(name for _, _, name in cells)
    head = ["", *(column + (f", {who}" if len(tables) > 1 else "") for who, column in columns)]
    lines = [line(head), line(["---"] + ["---:"] * len(columns))]
    return lines + [line([name, *(cells.get((*column, name), "") for column in columns)]) for name in names]


def cell(row: Row | None, with_aim: bool = False) -> str:
    """Return a cell: the time, its quartiles, perhaps the aim, and whether it was reached."""
    if row is None:
        return ""
    if row.is_baseline:
        return f"1 = {row.value}" if row.value else "1"
    if row.time is None:
        return row.value or ""
    text = times(row.time) + (f" ({times(row.low)}, {times(row.high)})" if row.low and row.high else "")
    if row.aim is None:
        return text
    return text + (f" of {row.aim:.4g}" if with_aim else "") + (" ✓" if row.reached else " ✗")


def times(ratio: float) -> str:
    """Return a ratio with the digits that mean something: three decimals where the difference to 1 is small."""
    return f"{ratio:.3f}" if ratio < 2 else f"{ratio:.2f}" if ratio < 10 else f"{ratio:,.1f}"


def line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help="that benchmarks.all wrote")
    options = parser.parse_args(arguments)
    for file in options.files:
        print(keep(json.loads(file.read_text()), RESULTS))
    README.write_text(filled(README.read_text(), results()))


if __name__ == "__main__":
    main()
