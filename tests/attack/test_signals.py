"""A run stopped by a signal writes a checkpoint and prints how to resume; the final result is unchanged."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gradfn
from tests.attack.children import at_once, command, in_child, readable, train, wait_for_handlers

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


@pytest.mark.tries(all=40, sample=3)
def test_fit_stops_well(forks, tmp_path, tries, tally):
    end = in_child(forks, train, str(tmp_path / "whole"), 240, None, None, str(tmp_path / "whole.txt"))
    assert end.code == 0, end.err
    whole = (tmp_path / "whole.txt").read_text()

    def attack(number):
        rng, folder, file = (
            np.random.default_rng(number),
            str(tmp_path / str(number)),
            tmp_path / f"{number}.txt",
        )
        which = [signal.SIGINT, signal.SIGTERM][number % 2]
        end = in_child(forks, train, folder, after=rng.uniform(0.1, 1.2), number=which)
        # Before `fit` starts, signals have Python's default effect.
        faults = [] if end.code in (0, CODES[which], -which) and not end.traceback else [end]
        again = in_child(forks, train, folder, 240, None, None, str(file))
        if again.code or file.read_text() != whole:
            faults.append(f"after signal {which}: {again}, or another result")
        return faults + readable(folder)

    tally([fault for faults in at_once(attack, range(tries)) for fault in faults], tries)


@pytest.mark.tries(all=6, sample=1)
def test_the_command_line_stops_well(forks, tmp_path, tries, tally):
    options = ("run", "digits", "--epochs", "3")
    end = in_child(forks, command, *options, "--folder", str(tmp_path / "whole"))
    assert end.code == 0, end.err
    whole = json.loads((tmp_path / "whole" / "result.json").read_text())

    def attack(number):
        rng, folder = np.random.default_rng(number), str(tmp_path / str(number))
        which = list(CODES)[number % 3]
        words = (*options, "--folder", folder)
        end = in_child(forks, command, *words, after=rng.uniform(0.2, 6.0), number=which)
        lines = end.err.strip().splitlines()
        faults = []
        if end.code not in (0, CODES[which]) or end.traceback or len(lines) > 2 or (end.code and not lines):
            faults.append(end)
        again = in_child(forks, command, *words, "--resume")
        result = Path(folder, "result.json")
        if again.code or json.loads(result.read_text()) != whole:
            faults.append(f"after signal {which}: {again}, or another result")
        return faults + readable(folder)

    tally([fault for faults in at_once(attack, range(tries)) for fault in faults], tries)


@pytest.mark.tries(all=12, sample=2)
def test_ctrl_c_while_jax_is_imported(tmp_path, tries, tally):
    environment = os.environ | {"PYTHONPATH": str(Path(gradfn.__file__).parents[1]), "JAX_PLATFORMS": "cpu"}

    def attack(number):
        options = ["--epochs", "1", "--folder", str(tmp_path / str(number))]
        words = [sys.executable, "-m", "gradfn", "run", "digits", *options]
        run = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        try:
            wait_for_handlers(run)
            run.wait(1.5 * number / tries)
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGINT)
        out, err = run.communicate()
        held = run.returncode == 130 and len(err.strip().splitlines()) <= 2 and "Traceback" not in out + err
        return [] if held else [f"{run.returncode}: {out} {err}"]

    tally([fault for faults in at_once(attack, range(tries)) for fault in faults], tries)


def test_a_second_signal_stops_at_once(forks, tmp_path):
    end = in_child(forks, interrupted_twice, str(tmp_path))
    assert end.code == 0, end
    assert re.search(r"stopped within \d", end.out), end


def interrupted_twice(folder):
    """Interrupt a long evaluation twice."""
    import threading
    import time

    def evaluate(params):
        for i in range(2):
            threading.Timer(0.3 + 0.3 * i, os.kill, (os.getpid(), signal.SIGINT)).start()
        time.sleep(20)
        return {}

    began = time.monotonic()
    try:
        train(folder, evaluate=evaluate)
    except KeyboardInterrupt:
        took = time.monotonic() - began
        print(f"stopped within {took:.1f} s")
        return int(took > 15)
    return 1
