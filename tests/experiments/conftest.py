"""Every run that a test makes is held to one rule: its pictures' titles report the figures of its verdict."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from gradfn import runs

# By experiment: a picture, a pattern in its title and one in the verdict; each group is a figure of both.
SHARED = {
    "cnn": [("confusion", r"^([\d.]+) %", r"accuracy ([\d.]+) %")],
    "digits": [("confusion", r"^([\d.]+) %", r"accuracy ([\d.]+) %")],
    "gpt": [("curves", r"validation loss ([\d.]+)", r"validation loss ([\d.]+)")],
    "grok": [
        ("grok", r"by heart at step ([\d,]+)", r"\) at step (\d+), understood"),
        ("grok", r"understood at step ([\d,]+)", r"understood \(\d+ %\) at step (\d+)"),
    ],
    "mnist": [("confusion", r"^([\d.]+) %", r"best ([\d.]+) %")],
    "moons": [("strip", r"([\d.]+) % at step [\d,]+$", r"^([\d.]+) %")],
    "neuron": [("firing", r"bias of (-\d+)", r"bias of (-\d+)")],
    "noise": [("noise", r"from (\d+) .* to (\d+)", r"scale (\d+) .* start, (\d+)")],
    "rates": [("valley", r"best is ([\d.]+) \(([\d.]+) %", r"best, ([\d.]+), .* ([\d.]+) %")],
    "reconstruct": [("wanted", r"for (\d+) of the dense", r"^(\d+) of")],
    "regions": [("remains", r"half reads (\d+) %", r"; (\d+) % of the test")],
    "regress": [
        (
            "predictions",
            r"network (-?\d+) %, linear regression (-?\d+) %",
            r"R² ([-\d.]+), that of linear regression ([-\d.]+)",
        )
    ],
    "reverse": [("curves", r"test accuracy ([\d.]+) %", r"^([\d.]+) %")],
    "rnn": [
        ("curves", rf"{cell} validation loss ([\d.]+)", rf"{cell} ([\d.]+)")
        for cell in ("vanilla", "gru", "lstm")
    ],
    "saturate": [("learned", r"\(LeCun\) read (\d+) %", r"first and (\d+) %")],
    "vit": [("confusion", r"^([\d.]+) %", r"accuracy ([\d.]+) %")],
    "width": [
        ("trade", r"base case \S+ x \S+ reads ([\d.]+) %", r"has ([\d.]+) % right"),
        ("trade", r"best of .*?\) ([\d.]+) %", r"the best \(.*?\) ([\d.]+) %"),
    ],
}


def figures_that_differ(experiment, folder, verdict):
    """Return the figures of titles that are others in the verdict, as (picture, title's, verdict's)."""
    found = []
    for picture, in_title, in_verdict in SHARED.get(experiment, []):
        with Image.open(Path(folder) / f"{picture}.png") as image:
            title = " ".join(image.info["Title"].partition("\n(data")[0].split())
        told, judged = re.search(in_title, title), re.search(in_verdict, verdict)
        if "None" in verdict and not told and not judged:
            continue  # grok's networks that have not understood
        assert told, (in_title, title)
        assert judged, (in_verdict, verdict)
        for a, b in zip(told.groups(), judged.groups(), strict=True):
            if not any(_same(a, b, scale) for scale in (1, 100)):
                found.append((picture, a, b))
    return found


def _same(title, verdict, scale):
    """Tell whether two numbers are one, rounded to their own digits; a share may stand for a percentage."""
    (a, half), (b, other) = (_rounded(text) for text in (title, verdict))
    return (
        abs(a - scale * b) <= half + scale * other + 1e-12
        if "nan" not in (title, verdict)
        else title == verdict
    )


def _rounded(text):
    text = text.replace(",", "")
    return float(text), 0.5 * 10.0 ** -len(text.partition(".")[2])


# Of a module, not of the session: that would last into the tests of other folders.
@pytest.fixture(scope="module", autouse=True)
def _titles_report_the_verdict():
    finish = runs.finish

    def checked(folder, result):
        finish(folder, result)
        experiment = json.loads((Path(folder) / runs.CONFIG).read_text())["experiment"]
        assert figures_that_differ(experiment, folder, result["verdict"]) == []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "finish", checked)
        yield
