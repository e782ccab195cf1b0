"""Runs: folders of options and results, what a run measured against what was expected, and reading both back.

Importing this package does not import jax, so that a page of a run is written at once.
"""

from gradfn.runs.config import RunConfig, not_negative, options, positive, within
from gradfn.runs.folder import (
    CONFIG,
    RESULT,
    RUNS,
    VERSIONS,
    RunError,
    begin,
    disown,
    keep_training,
    latest,
    write_json,
)
from gradfn.runs.outcome import Expectation, Outcome, finish, judge, listed
from gradfn.runs.resume import batch_for, heads_for, merge, settle, some, stored

__all__ = [
    "CONFIG",
    "RESULT",
    "RUNS",
    "VERSIONS",
    "Expectation",
    "Outcome",
    "RunConfig",
    "RunError",
    "batch_for",
    "begin",
    "disown",
    "finish",
    "heads_for",
    "judge",
    "keep_training",
    "latest",
    "listed",
    "merge",
    "not_negative",
    "options",
    "positive",
    "settle",
    "some",
    "stored",
    "within",
    "write_json",
]
