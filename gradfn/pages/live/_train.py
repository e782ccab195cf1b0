"""The training itself in the page of a run: the same data and initial parameters, with controls for everything else."""

from __future__ import annotations

from gradfn.pages.charts import short
from gradfn.pages.live.arrays import as_json, encoded
from gradfn.pages.live.part import Live
from gradfn.runs.kept import Kept
from gradfn.runs.live_net import ACTIVATIONS
from gradfn.runs.training_set import TrainingSet, sizes

MAX_DEPTH, MAX_WIDTH = 10, 256  # hidden layers, and nodes in each
LIMIT = 1_500_000  # bytes of the content
TOO_LARGE = "The data set is too large to train on in the page."


def train(run: Kept, room: int) -> Live | str | None:
    """Return the training of a run: see `gradfn.pages.live.KINDS`."""
    found = run.training_set
    if found is None:
        return TOO_LARGE if run.training_set_left_out else None
    nodes, activation = sizes(found.params), found.about["activation"]
    if activation not in ACTIVATIONS:
        return f"The page cannot train with the activation {short(activation)}, but only with {', '.join(ACTIVATIONS)}."
    if len(nodes) - 2 > MAX_DEPTH or max(nodes[1:-1], default=0) > MAX_WIDTH:
        return f"The page trains networks of at most {MAX_DEPTH} hidden layers with {MAX_WIDTH} nodes each."
    content = as_json(described(found))
    if len(content) > min(room, LIMIT):
        return TOO_LARGE
    n_train, n_test = len(found.train[1]), len(found.test[1])
    about = {
        "sizes": "-".join(map(str, nodes)),
        "data": short(found.about["data"]),
        "inputs": found.about["inputs"],
        "n_train": f"{n_train:,}",
        "n_test": f"{n_test:,}",
        "examples": f"{found.about['examples']:,}" if found.about["examples"] > n_train else "",
        "max_width": max(64, *nodes[1:-1], 0),
        "max_depth": MAX_DEPTH,
        "n": n_train,
    }
    return Live("train", "Train it", about, content)


def described(found: TrainingSet) -> dict[str, object]:
    """Return the data, the initial parameters and the settings as JSON."""
    arrays = {name: encoded(array, "float32") for name, array in found.params.items()}
    for part, (x, y) in (("train", found.train), ("test", found.test)):
        arrays |= {f"{part}_x": encoded(x), f"{part}_y": encoded(y, "uint8")}
    if found.spline is not None:
        arrays["spline"] = encoded(found.spline, "float32")
    return {**found.about, "sizes": sizes(found.params), "arrays": arrays}
