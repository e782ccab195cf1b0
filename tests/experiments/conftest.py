"""Every run of a test is checked: the numbers in its pictures' titles are those of its outcome."""

import re
from pathlib import Path

import pytest
from PIL import Image

from gradfn import runs
from gradfn.runs.folder import read_config

# By experiment: a picture, a pattern of its title, and the measured numbers that the groups of the pattern are.
SHARED = {
    "cnn": [("confusion", r"^([\d.]+) %", ["test accuracy"])],
    "digits": [("confusion", r"^([\d.]+) %", ["test accuracy"])],
    "gpt": [("curves", r"validation loss ([\d.]+)", ["validation loss"])],
    "grok": [
        ("grok", r"Memorized at step ([\d,]+)", ["step of memorization"]),
        ("grok", r", generalized at step ([\d,]+)", ["step of generalization"]),
    ],
    "influence": [
        ("influence", r"rises by (-?[\d.]+) nats", ["rise of the loss without the digits that EK-FAC names"]),
        ("influence", r"random ones by (-?[\d.]+)", ["rise of the loss without random digits"]),
        ("agreement", r"EK-FAC \((-?[\d.]+)\)", ["linear datamodeling score, EK-FAC"]),
    ],
    "induction": [("bump", r"at step ([\d,]+)", ["step at which the loss has fallen fastest"])],
    "spike": [
        ("spikes", r"^(\d+) % of the planted", ["planted batches that are found"]),
        ("spikes", r"and (\d+) other steps$", ["other steps that are found"]),
    ],
    "lens": [
        (
            "depth",
            r"logit lens, ([\d.]+) nats fall to ([\d.]+)",
            ["cross-entropy of the logit lens at the embedding", "cross-entropy of the last layer"],
        )
    ],
    "mnist": [("confusion", r"^([\d.]+) %", ["best test accuracy"])],
    "moons": [("strip", r"([\d.]+) % at step [\d,]+$", ["test accuracy"])],
    "noise": [
        (
            "noise",
            r"from (\d+) .* to (\d+)",
            ["noise scale at the start", "noise scale in the second half"],
        )
    ],
    "rates": [("valley", r"best is ([\d.]+) \(([\d.]+) %", ["best rate", "best median test accuracy"])],
    "reconstruct": [
        (
            "wanted",
            r"class for (\d+) of 10 drawings of the dense",
            ["drawings of the dense network most like a digit of their class"],
        )
    ],
    "regions": [("remains", r"half reads (\d+) %", ["test accuracy from the better half alone"])],
    "regress": [
        (
            "predictions",
            r"network (-?\d+) %, linear regression (-?\d+) %",
            ["test R²", "test R² of linear regression"],
        )
    ],
    "reverse": [("curves", r"test accuracy ([\d.]+) %", ["sequences reversed without a mistake"])],
    "rnn": [
        ("curves", rf"{cell} validation loss ([\d.]+)", [f"{cell} validation loss"])
        for cell in ("vanilla", "gru", "lstm")
    ],
    "saturate": [
        (
            "learned",
            r"\(LeCun\) read (\d+) % .* residual (\d+) %",
            ["test accuracy of ten sigmoid layers", "the same with residual connections"],
        )
    ],
    "vit": [("confusion", r"^([\d.]+) %", ["test accuracy"])],
    "width": [
        ("trade", r"base case \S+ x \S+ reads ([\d.]+) %", ["test accuracy of the base case"]),
        ("trade", r"best of .*?\) ([\d.]+) %", ["test accuracy of the best network"]),
    ],
}


def figures_that_differ(experiment, folder, outcome):
    """Return the numbers in titles that differ from the outcome, as (picture, title's, outcome's)."""
    found = []
    for picture, pattern, names in SHARED.get(experiment, []):
        with Image.open(Path(folder) / f"{picture}.png") as image:
            title = " ".join(image.info["Title"].partition("\n(data")[0].split())
        match = re.search(pattern, title)
        measured = [outcome.measured[name] for name in names]
        if match is None and all(value != value for value in measured):
            continue  # grok's networks that did not generalize
        assert match, (pattern, title)
        for text, value in zip(match.groups(), measured, strict=True):
            if not any(_same(text, value * scale) for scale in (1, 100)):
                found.append((picture, text, value))
    return found


def _same(text, value):
    """Return whether a number in a text is a value rounded to the digits of the text."""
    text = text.replace(",", "")
    half = 0.5 * 10.0 ** -len(text.partition(".")[2])
    return value != value if text == "nan" else abs(float(text) - value) <= half + 1e-9


# Of a module, not of the session: that would last into the tests of other folders.
@pytest.fixture(scope="module", autouse=True)
def _titles_report_the_outcome():
    finish = runs.finish

    def checked(folder, outcome, **measured):
        finish(folder, outcome, **measured)
        experiment = read_config(Path(folder))["experiment"]
        assert figures_that_differ(experiment, folder, outcome) == []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "finish", checked)
        yield
