"""Folders whose entries are links, pipes or folders: nothing outside is written, and nothing blocks forever."""

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import warnings
from pathlib import Path

import pytest

from tests.attack import mutations
from tests.attack.children import in_child, snapshot, train
from tests.attack.mutations import SECONDS, where
from tests.attack.test_mutations import make

NAMES = [
    *(
        "config.json",
        "versions.json",
        "result.json",
        "metrics.jsonl",
        "inspections.jsonl",
        "noise.jsonl",
        "spikes.jsonl",
        "kept",
    ),
    *(
        "checkpoint.safetensors",
        "digit_net.safetensors",
        "cnn_net.safetensors",
        "training_set.safetensors",
        "picture.png",
        "events",
        "report.html",
        ".report.html.part",
    ),
    *(
        ".checkpoint.safetensors.part",
        ".metrics.jsonl.part",
        ".lock",
        "kept/0000000080.safetensors",
        "model.json",
    ),
    *("checkpoint", "checkpoint/0000000090", "checkpoint/0000000090.json", "kept/0000000080.json"),
    *("against-digits-b.html", "part", "part/metrics.jsonl", ".config.json.part"),
]
THINGS = [
    "link to a file",
    "link to a folder",
    "link to nothing",
    "link to a device",
    "pipe",
    "folder",
    "other's run",
]


def put(thing, place, outside):
    """Replace an entry that a run expects."""
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)
    place.parent.mkdir(exist_ok=True)
    links = {"link to a file": "file", "link to a folder": "folder", "link to nothing": "nothing"}
    links |= {"link to a device": "/dev/zero", "other's run": f"run/{place.name}"}
    if thing in links:
        place.symlink_to(outside / links[thing])
    elif thing == "pipe":
        os.mkfifo(place)
    else:
        place.mkdir()


def fresh(folder):
    """Start a new training in the folder, which removes the files of an earlier one."""
    import tests.attack.children as children

    return mutations.refused(lambda: children.train(folder, 30, resume=False), folder)


def resumed(folder):
    """Resume the training in the folder."""
    return mutations.refused(lambda: train(folder), folder)


def compare(folder):
    """Write the page of two runs."""
    return mutations.fault_of_command("report", folder, os.path.join(os.path.dirname(folder), "digits-b"))


def page(folder):
    """Write the page of a run to its folder."""
    return mutations.fault_of_command("report", folder)


def written(folder):
    """Write a result."""
    from gradfn import runs

    return mutations.refused(lambda: runs.finish(Path(folder), runs.Outcome()), folder)


ACTIONS = [resumed, fresh, page, compare, written, mutations.kept, mutations.sample, mutations.stored]


def attack(base, tries, results):
    """Replace entries in copies of a run, run each action on them, and check that files outside are unchanged."""
    base, faults = Path(base), []
    outside, original = base / "outside", base / "original"
    warnings.simplefilter("ignore")
    make("run", original)
    outside.mkdir()
    (outside / "folder").mkdir()
    (outside / "folder" / "0000000080.safetensors").write_text("mine")
    (outside / "folder" / "events.out.tfevents.1").write_text("mine")
    (outside / "file").write_text("mine")
    shutil.copytree(original, outside / "run")
    shutil.copytree(original, base / "digits-b")
    before = snapshot(outside)
    every = list(itertools.product(NAMES, THINGS, ACTIONS))
    random.Random(0).shuffle(every)

    def stop(number, frame):
        raise TimeoutError(f"took more than {SECONDS} s")

    signal.signal(signal.SIGALRM, stop)
    for name, thing, action in every[:tries]:
        folder = base / "run"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(original, folder)
        put(thing, folder / name, outside)
        signal.alarm(SECONDS)
        fault = None
        try:
            fault = action(str(folder))
        except OSError as error:
            if str(folder) not in str(error):
                fault = f"{type(error).__name__}: {error} {where(error)}"
        except BaseException as error:
            fault = f"{type(error).__name__}: {str(error)[:300]} {where(error)}"
        finally:
            signal.alarm(0)
        if snapshot(outside) != before:
            fault = f"{fault}; what is outside of the run has changed"
            before = snapshot(outside)
        if fault:
            faults.append(f"{thing} as {name}, {action.__name__}: {fault}")
    with contextlib.suppress(OSError):
        shutil.rmtree(base / "run")
    Path(results).write_text(json.dumps(faults))


@pytest.mark.tries(all=400, sample=15)
def test_hostile_folders(forks, tmp_path, tries, tally):
    results = tmp_path / "faults.json"
    end = in_child(forks, attack, str(tmp_path), tries, str(results))
    assert results.exists(), end
    tally(json.loads(results.read_text()), tries)
