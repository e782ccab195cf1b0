"""Runs: folders of options and results, what a run measured against what was expected, and reading both back.

Importing this package does not import jax, so that a page of a run is written at once.
"""

from gradfn.runs.config import RunConfig, check, option, options, within
from gradfn.runs.folder import (
    CONFIG,
    RESULT,
    RUNS,
    VERSIONS,
    RunError,
    disown,
    end,
    keep_training,
    latest,
    several,
    start,
    write_json,
)
from gradfn.runs.outcome import Expectation, Outcome, finish, judge, listed
from gradfn.runs.resume import merge, settle, stored

__all__ = [
    "CONFIG",
    "RESULT",
    "RUNS",
    "VERSIONS",
    "Expectation",
    "Outcome",
    "RunConfig",
    "RunError",
    "check",
    "disown",
    "end",
    "finish",
    "judge",
    "keep_training",
    "latest",
    "listed",
    "merge",
    "option",
    "options",
    "settle",
    "several",
    "start",
    "stored",
    "within",
    "write_json",
]
