"""Choose the folder of a run, and the options with which an earlier run is resumed."""

from __future__ import annotations

import dataclasses
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from gradfn.runs.config import PROCESS, RunConfig, options
from gradfn.runs.folder import CONFIG, RUNS, RunError, from_first, latest, read_config, refuse_a_run, several

C = TypeVar("C", bound=RunConfig)


def settle(experiment: str, config: C) -> C:
    """Choose the folder of a run, and with `resume` its stored options; of several processes, the first one chooses.

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
    if not several():
        return _settle(experiment, config)
    chosen = from_first(lambda: dataclasses.asdict(_settle(experiment, config)))
    return dataclasses.replace(msgspec.convert(chosen, type(config)), **_of_process(config))


def _settle(experiment: str, config: C) -> C:
    if config.resume:
        before = stored(experiment, config)
        if before is not None:
            return merge(config, before, type(config)())
        print(f"no run to resume in {config.folder or RUNS / experiment}: starting a new one")
        return _settle(experiment, dataclasses.replace(config, resume=False))
    if config.folder is None:
        # In microseconds, so that runs that start together get different folders.
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
            f"{folder / CONFIG}: its options do not fit the current {experiment} ({error}); start a new run"
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
    return dataclasses.replace(before, **_of_process(config))


def _of_process(config: RunConfig) -> dict[str, Any]:
    """Return the options that say how this process computes a run, which are not stored."""
    return {name: getattr(config, name) for name in PROCESS if hasattr(config, name)}
