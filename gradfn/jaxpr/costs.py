"""What a program costs at each of its sites: operations of the forward pass, and bytes saved for the backward pass.

Each equation belongs to the first site, in the order of computation, that is computed from it: an attention's scores
to its probabilities, a mask that all layers use to the first of them. What leads to no site belongs to the result.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var
from jaxtyping import PyTree

from gradfn.jaxpr.dataflow import loop_split
from gradfn.jaxpr.interpreter import Path, bodies, operation, params_of
from gradfn.jaxpr.program import Program
from gradfn.jaxpr.sites import Site, find_sites
from gradfn.jaxpr.users import Users

# Data is moved, made up or renamed, but nothing is calculated.
_FREE = {
    *("reshape", "transpose", "squeeze", "broadcast_in_dim", "expand_dims", "slice", "dynamic_slice", "rev"),
    *(
        "dynamic_update_slice",
        "concatenate",
        "pad",
        "gather",
        "scatter",
        "copy",
        "copy_p",
        "iota",
        "name",
        "split",
    ),
    *(
        "convert_element_type",
        "bitcast_convert_type",
        "stop_gradient",
        "sharding_constraint",
        "pvary",
        "pcast",
    ),
    *("optimization_barrier", "device_put", "create_token", "random_wrap", "random_unwrap", "debug_callback"),
    *("random_bits", "random_seed", "random_fold_in", "random_split", "threefry2x32"),
    *("empty", "mesh_cast", "reshard", "all_gather", "ppermute", "all_to_all", "axis_index", "debug_print"),
}
# The shape of their output is that of their operand, but they are not elementwise.
_UNKNOWN = {
    "cholesky",
    "fft",
    "sort",
    "triangular_solve",
    "householder_product",
    "custom_call",
    "pallas_call",
}
_REDUCTIONS = ("reduce_", "arg", "cum")


def flops_of(eqn: Any) -> int | None:
    """Return the floating-point operations of an equation that contains no others; None where they are not known.

    A product counts 2 per multiplication, everything elementwise 1 per element (also an exponential), a reduction 1
    per element that it reads. Moving data and computing with integers count nothing.
    """
    name, out = operation(eqn), math.prod(eqn.outvars[0].aval.shape) if eqn.outvars else 0
    sizes = [math.prod(getattr(v.aval, "shape", ())) for v in eqn.invars]
    floating = [v for v in (*eqn.invars, *eqn.outvars) if jnp.issubdtype(v.aval.dtype, jnp.inexact)]
    if name in _FREE or not eqn.outvars or not floating:
        return 0
    params = params_of(eqn)
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return 2 * out * math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        channels = eqn.invars[1].aval.shape[params["dimension_numbers"].rhs_spec[0]]
        return 2 * out * sizes[1] // channels
    if name.startswith(_REDUCTIONS):
        return sum(sizes)
    if name.startswith("scatter"):
        return sizes[-1]
    if name in ("psum", "pmax", "pmin"):
        return out
    elementwise = len(eqn.outvars) == 1 and all(_broadcasts(v.aval, eqn.outvars[0].aval) for v in eqn.invars)
    return out if elementwise and name not in _UNKNOWN else None


def _broadcasts(operand: Any, out: Any) -> bool:
    """Tell whether an operand has one element, or one per element of the output."""
    shape = getattr(operand, "shape", ())
    return not shape or (
        len(shape) == len(out.shape) and all(n in (1, m) for n, m in zip(shape, out.shape, strict=True))
    )


@dataclass(frozen=True)
class Costs:
    """What a program costs, by the name of its sites; under `""` what leads to no site.

    Attributes:
        flops: operations of the forward pass.
        saved: bytes that are computed for a site and saved for the backward pass, which differentiates with respect
            to the parameters. Under `"inputs"` are those of parameters and data that the backward pass uses.
        notes: what was not counted.
    """

    flops: dict[str, int]
    saved: dict[str, int]
    notes: tuple[str, ...]


def costs(program: Program, sites: Sequence[Site]) -> Costs:
    """Return what a program costs at each of its sites."""
    names, uncounted = [*(site.name for site in sites), ""], set[str]()
    counted = _flops(program.jaxpr.jaxpr, (), next_sites(program.jaxpr, sites), uncounted)
    flops = {name: counted[k] for k, name in enumerate(names)}
    notes = ["FLOPs of a while loop are those of one iteration"] if "while" in uncounted else []
    if unknown := sorted(uncounted - {"while"}):
        notes.append(f"FLOPs of {', '.join(unknown)} are not counted")
    try:
        saved, note = _saved(program, names)
    # A function without a derivative, such as a callback, has sites and FLOPs all the same; what it raises is its own.
    except Exception as error:
        saved, note = {}, [f"saved: unknown, the function has no derivative: {str(error).splitlines()[0]}"]
    return Costs(flops, saved, (*notes, *note))


Owner = Mapping[Path, int | None]


def next_sites(closed: ClosedJaxpr, sites: Sequence[Site]) -> dict[Path, int | None]:
    """Return, by path, the index of the first site that is computed from each equation.

    It is the number of sites for an equation that only the result depends on, and None for one that nothing depends
    on. A container has the first site of its results.
    """
    at = {(site.path, site.index): k for k, site in enumerate(sites)}
    owner: dict[Path, int | None] = {}

    def body(jaxpr: Jaxpr, prefix: Path, results: Sequence[int | None]) -> list[int | None]:
        following: dict[Var, int | None] = {}

        def leads(atom: Any, k: int | None) -> None:
            if not isinstance(atom, Literal):
                following[atom] = _first(following.get(atom), k)

        for atom, k in zip(jaxpr.outvars, results, strict=True):
            leads(atom, k)
        for i in reversed(range(len(jaxpr.eqns))):
            eqn, path = jaxpr.eqns[i], (*prefix, i)
            outs = [at.get((path, k), following.get(v)) for k, v in enumerate(eqn.outvars)]
            owner[path] = _first(*outs)
            for atom, k in zip(eqn.invars, operands(eqn, path, outs), strict=True):
                leads(atom, k)
        return [following.get(v) for v in jaxpr.invars]

    def operands(eqn: Any, path: Path, outs: Sequence[int | None]) -> list[int | None]:
        kind, inner = bodies(eqn)
        if not inner:
            return [owner[path]] * len(eqn.invars)
        if kind == "cond":
            branches = [body(jaxpr, (*path, k), outs) for k, (jaxpr, _) in enumerate(inner)]
            return [owner[path], *(_first(*each) for each in zip(*branches, strict=True))]
        if kind not in ("scan", "while"):
            return body(inner[0][0], (*path, 0), outs)
        skipped, n_consts, n_carry = loop_split(kind, eqn)
        ins = body(inner[0][0], (*path, 0), outs)
        # What a carry leads to in the next iteration.
        again = [_first(*pair) for pair in zip(outs[:n_carry], ins[n_consts:], strict=False)]
        ins = body(inner[0][0], (*path, 0), [*again, *outs[n_carry:]])
        return [owner[path]] * skipped + ins

    body(closed.jaxpr, (), [len(sites)] * len(closed.jaxpr.outvars))
    return owner


def _first(*indices: int | None) -> int | None:
    return min((k for k in indices if k is not None), default=None)


def _flops(
    jaxpr: Jaxpr, prefix: Path, owner: Owner, uncounted: set[str], within: int | None = None
) -> Counter[int]:
    """Return the operations of a body by the index of the site.

    Args:
        jaxpr: the body.
        prefix: its path.
        owner: the index of the site by path.
        uncounted: collects the operations without a formula, and `while`.
        within: the index for all of a custom function's body, which is one equation.
    """
    out = Counter[int]()
    for i, eqn in enumerate(jaxpr.eqns):
        path = (*prefix, i)
        k = owner.get(path) if within is None else within
        kind, inner = bodies(eqn, enter_custom=True)
        if k is None:
            continue
        if not inner:
            n = flops_of(eqn)
            uncounted.update([operation(eqn)] if n is None else [])
            out[k] += n or 0
            continue
        inside = k if kind == "custom" else within
        branches = [_flops(body, (*path, b), owner, uncounted, inside) for b, (body, _) in enumerate(inner)]
        times = 1
        if kind == "scan":
            times = eqn.params["length"]
        elif kind == "shard_map":
            times = math.prod(eqn.params["mesh"].shape[axis] for axis in eqn.params["newly_manual_axes"])
        elif kind == "while":
            uncounted.add("while")
        # Of a choice, the branch that costs most.
        most = max(branches, key=lambda counted: sum(counted.values()))
        out.update({site: times * n for site, n in most.items()})
    return out


def _saved(program: Program, names: Sequence[str]) -> tuple[dict[str, int], list[str]]:
    """Return the bytes saved for the backward pass by the name of the site, and notes.

    They are the arrays in the function that `jax.vjp` returns. Its forward pass is a program like the given one, with
    further results, and has the same sites.
    """
    variables = [
        i
        for i, (owner, aval) in enumerate(zip(program.owners, program.jaxpr.in_avals, strict=True))
        if owner == 0 and jnp.issubdtype(aval.dtype, jnp.inexact)
    ]
    closed = program.jaxpr
    if not variables or not any(jnp.issubdtype(aval.dtype, jnp.inexact) for aval in closed.out_avals):
        return {}, []

    def forward(inputs: list[PyTree]) -> tuple[list[PyTree], list[PyTree]]:
        def of(*leaves: PyTree) -> list[PyTree]:
            full = list(inputs)
            for i, leaf in zip(variables, leaves, strict=True):
                full[i] = leaf
            return jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *full)

        outs, pullback = jax.vjp(of, *[inputs[i] for i in variables])
        return outs, jax.tree.leaves(pullback)

    with_saved = jax.make_jaxpr(forward)(program.inputs)
    n = len(closed.out_avals)
    results, residuals = with_saved.jaxpr.outvars[:n], with_saved.jaxpr.outvars[n:]
    alone = replace(program, jaxpr=with_saved.replace(jaxpr=with_saved.jaxpr.replace(outvars=results)))
    sites = find_sites(alone)
    if [site.name for site in sites] != list(names[:-1]):
        note = "saved: all under the result, since the differentiated program has other sites"
        return {"": sum(map(_nbytes, residuals))}, [note]
    computed_for = _ComputedFor(with_saved.jaxpr, next_sites(alone.jaxpr, sites))
    saved = dict.fromkeys([*names, "inputs"], 0)
    for atom in residuals:
        k = computed_for((), atom)
        saved["inputs" if k is None else names[k]] += _nbytes(atom)
    return saved, []


def _nbytes(atom: Any) -> int:
    return math.prod(atom.aval.shape) * atom.aval.dtype.itemsize


class _ComputedFor:
    """The index of the site that a value is computed for; None for the program's inputs and what is made of them.

    A value that only the backward pass uses, such as the slope of an activation function, counts to the last of the
    sites that it is computed from.
    """

    def __init__(self, jaxpr: Jaxpr, owner: Owner) -> None:
        self.users, self.owner = Users(jaxpr), owner
        self.known: dict[Var, int | None] = {}

    def __call__(self, prefix: Path, atom: Any) -> int | None:
        """Return the index for a value of the body at a path."""
        if isinstance(atom, Literal):
            return None
        if atom not in self.known:
            self.known[atom] = self._look_up(prefix, atom)
        return self.known[atom]

    def _look_up(self, prefix: Path, atom: Var) -> int | None:
        jaxpr, _ = self.users.body(prefix)
        if atom not in self.users.computed(prefix):
            return self._of_input(prefix, jaxpr, atom)
        i, output = self.users.computed(prefix)[atom]
        eqn, path = jaxpr.eqns[i], (*prefix, i)
        _, inner = bodies(eqn)
        if inner:
            return self((*path, 0), inner[0][0].outvars[output])
        if self.owner.get(path) is not None:
            return self.owner[path]
        return max((k for v in eqn.invars if (k := self(prefix, v)) is not None), default=None)

    def _of_input(self, prefix: Path, jaxpr: Jaxpr, atom: Var) -> int | None:
        if not prefix or atom not in jaxpr.invars:
            return None
        eqn = self.users.body(prefix[:-2])[0].eqns[prefix[-2]]
        # The operands of a cond and a while start with what the body does not take.
        skipped = len(eqn.invars) - len(jaxpr.invars)
        return self(prefix[:-2], eqn.invars[skipped + jaxpr.invars.index(atom)])
