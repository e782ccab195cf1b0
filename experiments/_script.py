"""`python experiments/digits.py`: runs an experiment's file as a script, also where gradfn is not installed."""

import sys
from pathlib import Path

_checkout = Path(__file__).resolve().parents[1]

# Python put the folder of the script in front, where experiments/noise.py would be a module named noise.
if Path(sys.path[0]).resolve() == _checkout / "experiments":
    sys.path[0] = str(_checkout)

from gradfn.cli import script as run_script  # noqa: E402, F401
