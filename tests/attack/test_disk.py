"""A full disk, a folder that becomes read-only or disappears: one line of error, and the last checkpoint stays."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from tests.attack.children import at_once, in_child, readable, train

NO_SIGNAL = 0  # sending it has no effect


def mount(*words):
    return subprocess.run(["mount", *map(str, words)], capture_output=True, check=False).returncode == 0


@pytest.fixture
def disks(tmp_path):
    """Return a function of `(name, kilobytes)` that creates a folder on its own disk of that size."""
    made = []

    def disk(name, kilobytes):
        folder = tmp_path / name
        folder.mkdir()
        if not mount("-t", "tmpfs", "-o", f"size={kilobytes}k", "none", folder):
            pytest.skip("needs the right to mount a tmpfs")
        made.append(folder)
        return folder

    if os.name != "posix" or not shutil.which("mount"):
        pytest.skip("needs mount")
    yield disk
    for folder in made:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def close(wait, disk):
    """Make a disk read-only after a delay."""
    time.sleep(wait)
    mount("-o", "remount,ro,force", disk)


def training(folder, hash_file=None, seconds=0.0):
    """Train; print a system error as one line, like the command line."""

    def evaluate(params):
        time.sleep(seconds)
        return {"spread": float(params["W1"].std())}

    try:
        train(folder, hash_file=hash_file, evaluate=evaluate)
    except OSError as error:
        print(f"{type(error).__name__}: {error}")
        return 1
    return 0


def whole(forks, tmp_path):
    end = in_child(forks, training, str(tmp_path / "whole"), str(tmp_path / "whole.txt"))
    assert end.code == 0, end
    return (tmp_path / "whole.txt").read_text()


def faults_of(end, folder):
    """Return the faults of a run that could not write: it must print one line and leave a valid checkpoint."""
    lines = end.out.strip().splitlines()
    if end.code == 1 and (len(lines) != 1 or str(folder) not in lines[0] or end.err):
        return [end]
    return [*([] if end.code in (0, 1) else [end]), *readable(folder)]


def resumed(forks, folder, file, expected, when):
    """Resume a run; return the faults of its result."""
    end = in_child(forks, training, str(folder), str(file))
    right = end.code == 0 and file.read_text() == expected
    return [*([] if right else [f"{when}: {end}, or another result"]), *readable(folder)]


@pytest.mark.tries(all=30, sample=2)
def test_full_disk(forks, tmp_path, tries, tally, disks):
    expected = whole(forks, tmp_path)
    sizes = np.random.default_rng(0).integers(1, 40, tries) * 4  # kilobytes, by pages
    jobs = [(i, disks(str(i), size), size) for i, size in enumerate(sizes)]

    def attack(job):
        number, disk, size = job
        folder, file = disk / "run", tmp_path / f"{number}.txt"
        faults = faults_of(in_child(forks, training, str(folder)), disk)
        if not mount("-o", "remount,size=20m", disk):
            return [*faults, "no room could be made"]
        return [*faults, *resumed(forks, folder, file, expected, f"{size} kB, after room was made")]

    tally([fault for faults in at_once(attack, jobs) for fault in faults], tries)


@pytest.mark.tries(all=8, sample=1)
def test_a_disk_that_becomes_read_only(forks, tmp_path, tries, tally, disks):
    expected = whole(forks, tmp_path)
    jobs = [(i, disks(str(i), 20_000)) for i in range(tries)]

    def attack(job):
        number, disk = job
        folder, file = disk / "run", tmp_path / f"{number}.txt"
        wait = np.random.default_rng(number).uniform(0.6, 1.5)
        end = in_child(
            forks, training, str(folder), None, 0.05, number=NO_SIGNAL, after=lambda: close(wait, disk)
        )
        faults = faults_of(end, disk)
        mount("-o", "remount,rw", disk)
        return [*faults, *resumed(forks, folder, file, expected, "after it could be written again")]

    tally([fault for faults in at_once(attack, jobs) for fault in faults], tries)


@pytest.mark.tries(all=8, sample=1)
def test_a_folder_that_goes_away(forks, tmp_path, tries, tally):
    def attack(number):
        folder = tmp_path / f"gone{number}"
        wait = np.random.default_rng(number).uniform(0.6, 1.5)
        remove = lambda: (time.sleep(wait), shutil.rmtree(folder, ignore_errors=True))  # noqa: E731
        end = in_child(forks, training, str(folder), None, 0.05, number=NO_SIGNAL, after=remove)
        return faults_of(end, folder)

    tally([fault for faults in at_once(attack, range(tries)) for fault in faults], tries)
    assert not list(Path(tmp_path).rglob("*.part"))
