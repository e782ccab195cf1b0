"""Loss spikes: what a step is watched for, and what is recorded of a step that spikes.

Each step of a compiled chunk records the norms of its gradient. The host holds them against running bands
(`bands.py`). If a number leaves its band, the steps of the chunk are repeated up to that one, from the state at the
start of the chunk, and the step is examined in full. So watching costs little, and a spike is seen at the parameters
that it happened at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from gradfn.core.params import named_leaves
from gradfn.core.precision import widen
from gradfn.flatten import BatchMean, Loss
from gradfn.train.bands import Bands, Spike, series
from gradfn.train.measures import norm
from gradfn.train.rows import Row
from gradfn.train.step import Change, TrainState, of_example

if TYPE_CHECKING:
    from gradfn.inspection import Inspection
    from gradfn.train.chunk import Chunks
    from gradfn.train.source import Source

OF_A_STEP = ("loss", "grad_norm", "update_norm")
# How many parameters and examples the row of a spike names.
NAMED = 10


def spike_of(inspect_when: Any, state: TrainState) -> Spike | None:
    """Return what `fit` watches for, given its argument.

    Raises:
        ValueError: it is neither "spike" nor a `Spike`, or a number to watch does not exist.
    """
    if inspect_when is None:
        return None
    spike = Spike() if inspect_when == "spike" else inspect_when
    if not isinstance(spike, Spike):
        raise ValueError(
            f'fit: inspect_when must be "spike", a gf.train.Spike or None, got {inspect_when!r:.60}'
        )
    known = [*OF_A_STEP, *moments(state.opt_state, state.params)]
    for name in spike.watch:
        if name not in known:
            raise ValueError(f"fit: inspect_when cannot watch {name!r}; there are {', '.join(known)}")
    return spike


def moments(opt_state: PyTree, params: PyTree) -> dict[str, PyTree]:
    """Return the parts of an optimizer's state that have one array per parameter, by their names in it.

    >>> import jax.numpy as jnp, optax
    >>> params = {"w": jnp.ones(3)}
    >>> list(moments(optax.adamw(0.1).init(params), params))
    ['mu', 'nu']
    """
    structure: PyTree = jax.tree.structure(params)
    shapes = list(map(jnp.shape, jax.tree.leaves(params)))

    def is_moment(node: PyTree) -> bool:
        return (
            bool(jax.tree.structure(node) == structure)
            and list(map(jnp.shape, jax.tree.leaves(node))) == shapes
        )

    found: dict[str, PyTree] = {}
    for path, node in jax.tree_util.tree_leaves_with_path(opt_state, is_leaf=is_moment):
        if is_moment(node):
            names = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
            found.setdefault(names[-1] if names else "moment", node)
    return found


def watched(spike: Spike, change: Change, after: TrainState) -> dict[str, jax.Array]:
    """Return what a step records to be watched: the norm of each array's gradient, and other norms by name."""
    found = {"grad_norms": jnp.stack([_quick_norm(leaf) for leaf in jax.tree.leaves(change.grads)])}
    if "update_norm" in spike.watch:
        found["update_norm"] = norm(change.updates)
    parts = moments(after.opt_state, after.params)
    return found | {name: norm(parts[name]) for name in spike.watch if name in parts}


def _quick_norm(x: jax.Array) -> jax.Array:
    """Return the norm of an array in one pass; infinite where a square overflows, which leaves every band."""
    return jnp.sqrt(jnp.sum(jnp.square(jnp.abs(widen(x)))))


class Examined(NamedTuple):
    """What is recorded of a step that spikes.

    Attributes:
        inspection: in short, see `gradfn.inspection.flow.summarized`.
        examples: `[batch]`, the norm of each example's gradient; None unless the loss is a mean over examples.
        moments: root mean squares of the optimizer's moments before the step, by name, in the tree of the parameters.
    """

    inspection: Inspection
    examples: jax.Array | None
    moments: dict[str, PyTree]


def examiner(
    loss: Loss,
    inspected_step: Callable[[TrainState, PyTree], tuple[Any, Any, Any, Inspection]],
) -> Callable[[TrainState, PyTree], Examined]:
    """Return the function that examines the next step of a state, on its batch; the step is not taken.

    Args:
        loss: of a batch.
        inspected_step: see `gradfn.train.chunk.one_inspected_step`.
    """

    def examine(state: TrainState, batch: PyTree) -> Examined:
        *_, inspection = inspected_step(state, batch)
        parts = moments(state.opt_state, state.params)
        rms = {name: jax.tree.map(_rms, part) for name, part in parts.items()}
        return Examined(inspection, _example_norms(loss, state, batch), rms)

    return examine


def _example_norms(loss: Loss, state: TrainState, batch: PyTree) -> jax.Array | None:
    from gradfn.per_example import norms

    if not isinstance(loss, BatchMean) or state.model_state is not None:
        return None
    of_one, key = of_example(loss, state)
    return norms(of_one)(state.params, batch, key=key).total


def _rms(x: jax.Array) -> jax.Array:
    return norm(x) / max(x.size, 1) ** 0.5


class Found(NamedTuple):
    """A step of a chunk at which a watched number left its band.

    Attributes:
        i: its index in the chunk.
        row: what its row says of the numbers that were watched.
    """

    i: int
    row: Row


def find(
    spike: Spike,
    bands: Bands,
    recorded: Mapping[str, Any],
    losses: np.ndarray,
    names: Sequence[str],
    step: int,
) -> list[Found]:
    """Learn from the steps of a chunk, and return those at which a watched number left its band.

    A number that stays outside for several steps is found at the first of them.

    Args:
        spike: what counts as one.
        bands: what was learned so far; it learns on.
        recorded: by the chunk, see `watched`, on the host.
        losses: of the chunk's steps.
        names: of the parameters.
        step: the number of steps before the chunk.
    """
    if not len(losses):
        return []
    of_steps = series(dict(recorded), losses, spike)
    n = len(of_steps)
    columns = np.concatenate([np.stack(list(of_steps.values()), 1), recorded["grad_norms"]], 1).astype(
        np.float64
    )
    of_log = np.array([name != "loss" for name in of_steps] + [True] * len(names))
    was_outside = bool(bands.steps) and max(bands.since[:n]) >= 0
    above, edges, since = bands.learn(columns, of_log, step, spike)
    outside: np.ndarray = np.any(since[:, :n] >= 0, axis=1)
    starts = np.flatnonzero(outside & ~np.append(was_outside, outside[:-1]))
    found = []
    for i in map(int, starts):
        # Those that left first, and of these the furthest; those inside last.
        left = np.where(since[i, n:] >= 0, since[i, n:], np.inf)
        order = np.lexsort((-above[i, n:], left))
        row = {
            "step": step + i,
            "left": [name for k, name in enumerate(of_steps) if since[i, k] >= 0],
            "values": {name: float(columns[i, k]) for k, name in enumerate(of_steps)},
            "edges": {name: float(edges[i, k]) for k, name in enumerate(of_steps)},
            "parameters": [
                {
                    "name": names[k],
                    "grad_norm": float(columns[i, n + k]),
                    "deviations": float(above[i, n + k]),
                    "since": int(since[i, n + k]) if since[i, n + k] >= 0 else None,
                }
                for k in order[:NAMED]
            ],
        }
        found.append(Found(i, row))
    return found


def row_of(found: Found, examined: Examined, indices: np.ndarray | None) -> Row:
    """Return the row of a spike.

    Args:
        found: by `find`.
        examined: the step, on the host.
        indices: `[batch]`, of the examples among the data; None where data are not arrays.
    """
    from gradfn.inspection.flow import to_dict

    examples = None
    if examined.examples is not None:
        norms = np.asarray(examined.examples, np.float64)
        largest = np.argsort(-norms, kind="stable")[:NAMED]
        share = np.square(norms) / max(np.square(norms).sum(), np.finfo(np.float64).tiny)
        examples = {
            "norms": norms.tolist(),
            "largest": [
                {
                    "position": int(at),
                    "index": None if indices is None else int(indices[at]),
                    "norm": float(norms[at]),
                    "share": float(share[at]),
                }
                for at in largest
            ],
        }
    rms = {
        name: {path or "params": float(x) for path, x in named_leaves(part)}
        for name, part in examined.moments.items()
    }
    row = found.row | {"examples": examples, "moments": rms, "inspection": to_dict(examined.inspection)}
    return row | {"text": line_of(row)}


def examined(run: Chunks, source: Source, here: tuple[TrainState, Any, int], found: Found) -> Row:
    """Repeat the steps of a chunk up to one that spikes, examine that step, and return its row.

    Args:
        run: the compiled functions of the run.
        source: of the batches.
        here: the state at the start of the chunk, the epoch's order, and the row of the chunk's first batch.
        found: the step.
    """
    state, order, row = here
    before = run.advance(state, order, row, found.i)[0] if found.i else state
    of_step: Any = jax.device_get(run.examine(before, order, row + found.i))
    # Only data in arrays have indices.
    indices = np.asarray(order[row + found.i]) if source.epoch_steps else None
    return row_of(found, of_step, indices)


def line_of(row: Row) -> str:
    """Return what a spike's row says, in one line.

    >>> line_of({"step": 7, "left": ["loss"], "values": {"loss": 9.0}, "edges": {"loss": 2.5},
    ...       "parameters": [{"name": "W1", "grad_norm": 30.0, "deviations": 12.0, "since": 7}], "examples": None})
    'step 7: spike: loss 9 (band up to 2.5); first W1 (gradient 30, 12 deviations above its mean)'
    """
    numbers = ", ".join(
        f"{name} {row['values'][name]:.3g} (band up to {row['edges'][name]:.3g})" for name in row["left"]
    )
    text = f"step {row['step']:,}: spike: {numbers}"
    if row["parameters"]:
        first = row["parameters"][0]
        # No gradient may have left its band, though the loss has.
        place = "first" if first["since"] is not None else "no gradient outside its band, the furthest"
        text += f"; {place} {first['name']} (gradient {first['grad_norm']:.3g}, {first['deviations']:.3g} deviations "
        text += "above its mean)"
    if row["examples"]:
        most = row["examples"]["largest"][0]
        which = f"{most['position']} of the batch" if most["index"] is None else f"{most['index']:,}"
        text += f"; example {which} has {most['share']:.0%} of the examples' squared norms"
    return text
