"""Two runs in one folder: the first owns it, the second raises and writes nothing."""

import time
from pathlib import Path

import numpy as np
import pytest

from gradfn.files import FileError
from tests.attack.children import at_once, in_child, readable, train


def slowly(folder, hash_file, wait):
    """Train for a second or more, after a delay; return 2 if another run owns the folder."""
    time.sleep(wait)
    try:
        train(folder, hash_file=hash_file, evaluate=lambda params: time.sleep(0.06) or {})
    except FileError as error:
        print(error)
        return 2
    return 0


@pytest.mark.tries(all=10, sample=1)
def test_owners(forks, tmp_path, tries, tally):
    end = in_child(forks, slowly, str(tmp_path / "whole"), str(tmp_path / "whole.txt"), 0.0)
    assert end.code == 0, end
    whole = (tmp_path / "whole.txt").read_text()

    def attack(number):
        folder, rng = tmp_path / str(number), np.random.default_rng(number)
        folder.mkdir()
        jobs = [(str(folder), str(folder / f"{i}.txt"), rng.uniform(0, 0.5)) for i in range(3)]
        ends = at_once(lambda job: in_child(forks, slowly, *job), jobs)
        faults = []
        for end, job in zip(ends, jobs, strict=True):
            if end.code == 0 and Path(job[1]).read_text() != whole:
                faults.append(f"another result: {end}")
            if end.code not in (0, 2) or (
                end.code == 2 and ("in use" not in end.out or end.out.count("\n") != 1)
            ):
                faults.append(end)
        if not any(end.code == 0 for end in ends):
            faults.append(f"none continued: {ends}")
        rows = (folder / "metrics.jsonl").read_text().splitlines()
        if len(rows) != 16:
            faults.append(f"expected 16 rows, got {len(rows)}")
        return faults + readable(folder)

    tally([fault for faults in map(attack, range(tries)) for fault in faults], tries)
