"""The rows of the tables that benchmarks write, in one form: the time relative to the baseline, and its aim."""

from typing import Any, NamedTuple

TOTAL = "total, s"
"""The column with the sum of a row's other seconds."""


class Row(NamedTuple):
    """One row of a table of timings, or one figure of a table of figures."""

    name: str
    time: float | None  # times the baseline's, or None without a baseline
    low: float | None = None  # lower quartile over rounds, if known
    high: float | None = None  # upper quartile
    aim: float | None = None  # the time that was aimed at
    value: str | None = None  # the figure itself, with its unit
    is_baseline: bool = False
    is_part: bool = False  # of a total in the same table

    @property
    def reached(self) -> bool:
        """Whether there is an aim, and the time is not above it."""
        return self.aim is not None and self.time is not None and self.time <= self.aim


def rows_of(table: dict[str, Any]) -> list[Row]:
    """Return the rows of a table that `harness.report` or `harness.report_figures` wrote.

    >>> rows_of(
    ...     {
    ...         "unit": "steps",
    ...         "baseline": "plain",
    ...         "summary": [{"name": "ours", "rate": 2.0, "ratio": 0.8, "low": 0.5, "high": 1.0}],
    ...         "aims": {"ours": 1.5},
    ...     }
    ... )
    [Row(name='ours', time=1.25, low=1.0, high=2.0, aim=1.5, value='2 steps/s', is_baseline=False, is_part=False)]
    """
    if "figures" in table:
        totals = {figure["name"] for figure in table["figures"] if figure["column"] == TOTAL}
        return [
            Row(
                f"{figure['name']}: {figure['column']}",
                figure["time"],
                aim=figure["aim"],
                value=amount(figure["value"]),
                is_baseline=figure["name"] == table["baseline"],
                is_part=figure["name"] in totals
                and figure["column"].endswith(", s")
                and figure["column"] != TOTAL,
            )
            for figure in table["figures"]
        ]
    return [
        Row(
            line["name"],
            1 / line["ratio"],
            line["high"] and 1 / line["high"],
            line["low"] and 1 / line["low"],
            table["aims"].get(line["name"]),
            line["rate"] and f"{amount(line['rate'])} {table['unit']}/s",
            line["name"] == table["baseline"],
        )
        for line in table["summary"]
    ]


def amount(value: float) -> str:
    """Return a figure with at least three significant digits, and no decimals where there are more.

    >>> amount(0.1234), amount(25.0), amount(687061.4)
    ('0.123', '25', '687,061')
    """
    return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
