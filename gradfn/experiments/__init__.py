"""The experiments, one module each.

An installed gradfn has their files in this folder. In a checkout they lie in `experiments/` beside the package, and are
imported from there under the same names, such as `gradfn.experiments.digits`.
"""

from pathlib import Path

_checkout = Path(__file__).parents[2] / "experiments"

if not (Path(__file__).parent / "_common.py").exists() and (_checkout / "_common.py").exists():
    __path__ = [str(_checkout)]
