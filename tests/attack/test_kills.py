"""A run that is killed at any moment, any number of times, gives the same result as an uninterrupted one."""

import signal

import numpy as np
import pytest

from tests.attack.children import at_once, in_child, readable, train

KILLS = 10  # of one run, before it may end


def uninterrupted(forks, tmp_path):
    end = in_child(forks, train, str(tmp_path / "whole"), 240, None, None, str(tmp_path / "whole.txt"))
    assert end.code == 0, end.err
    return (tmp_path / "whole.txt").read_text()


@pytest.mark.tries(all=500, sample=4)
def test_kill_9(forks, tmp_path, tries, tally):
    """Half of the kills are at random times, half just before some operation on a file of the run."""
    whole = uninterrupted(forks, tmp_path)

    def attack(job):
        number, kills = job
        rng, folder = np.random.default_rng(number), str(tmp_path / f"killed{number}")
        held, killed = [], 0
        for _ in range(kills * 3):  # some kills are after the end of the run
            if killed == kills:
                break
            by_event = rng.random() < 0.5
            args = (folder, 240, int(rng.integers(1, 60)) if by_event else None)
            end = in_child(forks, train, *args, after=None if by_event else rng.uniform(0.05, 0.8))
            if end.code == 0:
                folder = f"{folder}x"  # it has ended: continue with another one
            elif end.code == -signal.SIGKILL:
                killed += 1
                held += [fault for fault in readable_but_for_parts(folder)]
            else:
                held.append(end)
        file = str(tmp_path / f"{number}.txt")
        end = in_child(forks, train, folder, 240, None, None, file)
        if end.code != 0:
            held.append(end)
        elif (tmp_path / f"{number}.txt").read_text() != whole:
            held.append(f"{folder}: another result than that of a run which was never killed")
        held += readable(folder)
        return held

    chains = [(i, min(KILLS, tries - i * KILLS)) for i in range(-(-tries // KILLS))]
    tally([fault for faults in at_once(attack, chains) for fault in faults], tries)


def readable_but_for_parts(folder):
    return [fault for fault in readable(folder) if not fault.startswith("left behind")]
