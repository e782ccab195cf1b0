"""Which folder a run has, and with which options an earlier one is resumed."""

from __future__ import annotations

import dataclasses
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from gradfn.runs.config import RunConfig, options
from gradfn.runs.folder import CONFIG, RUNS, RunError, latest, read_config, refuse_a_run

C = TypeVar("C", bound=RunConfig)


def settle(experiment: str, config: C) -> C:
    """Choose the folder of a run, and with `resume` its stored options.

    Args:
        experiment: its name.
        config: with `folder` and `resume`. With `resume`, options left at their defaults take the stored values.

    Returns:
        The config with its folder, and with the stored options. Where there is no run to resume, `resume` is
        False and a line is printed that says so.

    Raises:
        RunError: the folder already contains a run; or, with `resume`, a run of another experiment or with other
            options.
    """
    if config.resume:
        before = stored(experiment, config)
        if before is not None:
            return merge(config, before, type(config)())
        print(f"no run to resume in {config.folder or RUNS / experiment}: starting a new one")
        return settle(experiment, dataclasses.replace(config, resume=False))
    if config.folder is None:
        # To the microsecond, so that runs that are started together do not meet in one folder.
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
        return dataclasses.replace(config, folder=str(RUNS / experiment / stamp))
    refuse_a_run(Path(config.folder))
    return config


def stored(experiment: str, config: C) -> C | None:
    """Return the config of the run that `config` would resume, or None where there is no such run.

    It is the run in `config.folder`, or, where that is None, the latest in `runs/<experiment>`.

    Raises:
        RunError: the folder contains a run of another experiment, or one with options that this one does not have.
        FileError: its config cannot be read.
    """
    folder = latest(experiment) if config.folder is None else Path(config.folder)
    if folder is None or not os.path.lexists(folder / CONFIG):
        return None
    content = read_config(folder)
    if content["experiment"] != experiment:
        raise RunError(f"{folder} contains a run of {content['experiment']}, not of {experiment}")
    try:
        if unknown := sorted(content["options"].keys() - options(config).keys()):
            raise ValueError(f"no option {unknown[0]!r}")
        return msgspec.convert(content["options"] | {"folder": str(folder), "resume": True}, type(config))
    except (TypeError, ValueError) as error:
        raise RunError(
            f"{folder / CONFIG}: not the options that {experiment} takes now ({error}); start a new run"
        ) from error


def merge(config: C, before: C, default: C) -> C:
    """Return the stored config `before`, provided that each option of `config` is as stored or as in `default`.

    Raises:
        RunError: another value was requested; the message names the option.
    """
    for name, value in options(config).items():
        was = options(before)[name]
        if value != was and value != options(default)[name]:
            raise RunError(
                f"{name} {value}: the run in {before.folder} has {name} {was}. "
                "Drop the option, or start a new run without --resume"
            )
    return before


def some(**parts: Any) -> None:
    """Raise a RunError that names the first part of the data that has no example.

    >>> some(train=[1, 2], validation=[])
    Traceback (most recent call last):
    gradfn.runs.folder.RunError: data: too few examples, so that none are left for validation; use more
    """
    for name, part in parts.items():
        if not len(part):
            raise RunError(f"data: too few examples, so that none are left for {name}; use more")


def batch_for(config: Any, n: int, what: str) -> int:
    """Return how many of `n` examples a step takes: `config.batch`; a default of more than there are means all.

    Raises:
        RunError: more were requested than there are; `what` is what they are called.
    """
    if config.batch > n and config.batch != type(config)().batch:
        raise RunError(f"batch: there are {n:,} {what}, got {config.batch}")
    return min(config.batch, n)


def heads_for(config: Any) -> int:
    """Return how many attention heads a network has: as `config.heads` says, else at most 4 that divide its width.

    >>> from types import SimpleNamespace
    >>> [heads_for(SimpleNamespace(heads=None, width=width)) for width in (128, 30, 25)]
    [4, 3, 1]
    """
    return config.heads or next(n for n in (4, 3, 2, 1) if config.width % n == 0)
