"""List the equations of a jaxpr, and run it with a visitor at chosen ones (see `gradfn.jaxpr`)."""

import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, cached_property
from pathlib import Path as FilePath
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, primitives
from jax.sharding import PartitionSpec, Sharding
from jaxtyping import PyTree

from gradfn.jaxpr.varying import zeros

Path = tuple[int, ...]
Evaluate = Callable[[Sequence[PyTree]], list[PyTree]]
Visitor = Callable[["Equation", Evaluate, Sequence[PyTree], PyTree], tuple[Sequence[PyTree], PyTree]]

# jax has renamed the primitives of jit and remat between versions, so their names are looked up, not spelled out.
_CALLS = {primitives.jit_p.name, primitives.call_p.name, primitives.closed_call_p.name}
_CUSTOM = {primitives.custom_jvp_call_p.name, primitives.custom_vjp_call_p.name}
_SCAN, _COND, _WHILE = primitives.scan_p.name, primitives.cond_p.name, primitives.while_p.name
_MOVES = {"reshape", "transpose", "squeeze", "broadcast_in_dim"}
_REMAT, _SHARD_MAP = primitives.remat_p.name, "shard_map"
_CONTAINERS = {*_CALLS, *_CUSTOM, _SCAN, _COND, _WHILE, _REMAT, _SHARD_MAP}
# The same operations with `jax_remat3`, where one primitive carries an object for each operation.
_CARRIED = {"CheckpointName": "name", "CheckpointNameFwd": "name", "RematTraced": _REMAT}


# Files of gradfn and of Python itself, and the folders of all other libraries.
_LIBRARIES = (str(FilePath(__file__).parents[1]), str(FilePath(os.__file__).parent), "<frozen")
_PACKAGES = ("site-packages", "dist-packages")
# What calls the function that is traced: frames further out are not part of it.
_TRACED_BY = str(FilePath(__file__).with_name("program.py"))


class Frame(NamedTuple):
    """One container around an equation: its kind, its path and, if it adds a leading axis, the length of that.

    That of a shard_map is split over axes (`split`) of its mesh.
    """

    kind: str
    path: Path
    length: int | None = None
    split: tuple[str, ...] | None = None
    mesh: Any = None


class Equation:
    """One equation of a program and its context.

    `path` identifies it: its index in the outermost jaxpr, then, for each container around it, the index of the
    container's body (the branch of a cond, otherwise 0) and the index of the equation in that body. `frames`
    are those containers, outermost first; `scope` is its `jax.named_scope` stack, `line` the user's source line.
    """

    def __init__(self, path: Path, eqn: Any, frames: tuple[Frame, ...], scope: str) -> None:
        self.path, self.eqn, self.frames, self.scope = path, eqn, frames, scope

    @cached_property
    def line(self) -> str:
        """Where the equation was written, as `file:line (function)`: the innermost line outside of libraries.

        In a notebook, the file is the cell, such as `In[3]`. Where only libraries (gradfn, Flax) have a line, it is the
        innermost one outside of jax.
        """
        traceback = self.eqn.source_info.traceback
        frames: Sequence[Any] = traceback.frames if traceback else ()
        for frame in frames:
            if frame.file_name == _TRACED_BY:
                break
            if not frame.file_name.startswith(_LIBRARIES) and not any(
                p in frame.file_name for p in _PACKAGES
            ):
                return f"{_shown(frame.file_name)}:{frame.line_num} ({frame.function_name})"
        return re.sub(r"(:\d+):\d+", r"\1", source_info_util.summarize(self.eqn.source_info))

    @property
    def axes(self) -> tuple[int, ...]:
        """The leading axes of its tokens and captures: iterations of scans, devices of shard_maps."""
        return tuple(f.length for f in self.frames if f.length is not None)

    def zeros(self, shapes: PyTree) -> PyTree:
        """Return zeros like a tree of shapes with its leading axes in front: tokens, to be passed from outside."""
        stacked = [frame for frame in self.frames if frame.length is not None]
        # Outside of the shard_maps around it, no axis of the mesh is manual.
        mesh = next((frame.mesh for frame in stacked if frame.mesh is not None), None)
        return zeros(shapes, self.axes, tuple(frame.split for frame in stacked), mesh)

    @property
    def in_while(self) -> bool:
        """Whether it runs in a while loop, through which no reverse-mode gradient (so no token) passes."""
        return any(f.kind == "while" for f in self.frames)

    def __repr__(self) -> str:
        return f"Equation({self.path}, {self.eqn.primitive.name}, scope={self.scope!r}, line={self.line!r})"


def _shown(file_name: str) -> str:
    """Return the name of a source file; of the cell of a notebook, `In[3]` instead of that of a temporary file."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    label = shell.compile.format_code_name(file_name) if shell else None
    return label[1] if label else file_name


def scope_of(eqn: Any, outer: str = "") -> str:
    """Return the named scopes around an equation, joined by `/`, without the wrappers that transforms add."""
    inner = _bare_scope(str(eqn.source_info.name_stack))
    return f"{outer}/{inner}" if outer and inner else outer or inner


def within_scope_of(eqn: Any) -> AbstractContextManager:
    """Return a context in which new equations get the named scopes of an equation."""
    scope = scope_of(eqn)
    return jax.named_scope(scope) if scope else nullcontext()


@cache
def _bare_scope(name_stack: str) -> str:
    text = re.sub(r"\b(?:vmap|jvp|transpose|pmap|linearize)\(", "", name_stack).replace(")", "")
    # einsum opens a scope named after its formula, which is not a module.
    return "/".join(part for part in text.split("/") if part and "->" not in part)


def operation(eqn: Any) -> str:
    """Return the name of an equation's operation; that of a named value is `name` in every version of jax."""
    # Most equations, each of which comes here several times.
    if eqn.primitive.name != _COND and "_prim" not in eqn.params:
        return eqn.primitive.name
    if (only := stands_for(eqn)) is not None:
        return operation(only)
    carried = _CARRIED.get(type(eqn.params.get("_prim")).__name__)
    return eqn.primitive.name if carried is None else carried


def params_of(eqn: Any) -> dict[str, Any]:
    """Return the parameters of an equation's operation."""
    known = type(eqn.params.get("_prim")).__name__ in _CARRIED
    return eqn.params["_prim"].params if known else eqn.params


def stands_for(eqn: Any) -> Any:
    """Return the one equation that a choice by platform (`lax.platform_dependent`) stands for, or None.

    It is that of the default branch, if only reshapes are around it: a convolution, for which CPUs have another form.
    The choice is then no container but an equation like this one.
    """
    if eqn.primitive.name != _COND or (eqn.params.get("branches_platforms") or [()])[-1] is not None:
        return None
    body, _ = _open(eqn.params["branches"][-1])
    moved = [inner for inner in body.eqns if inner.primitive.name not in _MOVES]
    return moved[0] if len(moved) == 1 and len(body.outvars) == 1 else None


def bodies(
    eqn: Any, enter_custom: bool = False, enter_choices: bool = False
) -> tuple[str, list[tuple[Jaxpr, Sequence[PyTree]]]]:
    """Return the kind of a container and its (jaxpr, consts) bodies; an empty list for any other equation.

    With `enter_choices`, a choice by platform that stands for one equation is a container too.
    """
    if enter_choices and stands_for(eqn) is not None:
        return "cond", [_open(branch) for branch in eqn.params["branches"]]
    name = operation(eqn)
    if name not in _CONTAINERS:
        return "", []
    params = params_of(eqn)
    if name in _CALLS:
        return "jit", [_open(params.get("jaxpr", params.get("call_jaxpr")))]
    if name == _SCAN:
        return "scan", [_open(params["jaxpr"])]
    if name == _REMAT:
        return "remat", [_open(params["jaxpr"])]
    if name == _COND:
        return "cond", [_open(branch) for branch in params["branches"]]
    if name == _WHILE:
        return "while", [_open(params["body_jaxpr"])]
    if name == _SHARD_MAP:
        return "shard_map", [_open(params["jaxpr"])]
    if enter_custom and name in _CUSTOM:
        return "custom", [_open(params["call_jaxpr"])]
    return "", []


def _open(jaxpr: Any) -> tuple[Jaxpr, Sequence[PyTree]]:
    # Newer versions of jax have one class for both.
    closed = isinstance(jaxpr, ClosedJaxpr) and hasattr(jaxpr, "consts")
    return (jaxpr.jaxpr, jaxpr.consts) if closed else (jaxpr, ())


def scan_split(eqn: Any) -> tuple[int, int]:
    """Return the number of constants and carries of a scan, inferred from ranks (names differ between versions)."""
    jaxpr: Any = _open(eqn.params["jaxpr"])[0]
    n_xs = sum(len(o.aval.shape) > len(i.aval.shape) for o, i in zip(eqn.invars, jaxpr.invars, strict=True))
    n_ys = sum(len(o.aval.shape) > len(i.aval.shape) for o, i in zip(eqn.outvars, jaxpr.outvars, strict=True))
    n_carry = len(eqn.outvars) - n_ys
    return len(eqn.invars) - n_carry - n_xs, n_carry


def _frame(kind: str, path: Path, eqn: Any) -> Frame:
    if kind == "scan":
        return Frame(kind, path, eqn.params["length"])
    if kind == "shard_map":
        mesh, split = eqn.params["mesh"], _manual_axes(eqn)
        return Frame(kind, path, math.prod(mesh.shape[a] for a in split), split, mesh)
    return Frame(kind, path)


def walk(closed: ClosedJaxpr, enter_custom: bool = False, enter_choices: bool = False) -> Iterator[Equation]:
    """Yield every equation of a program in the order of the program, a container before what it contains.

    With `enter_custom` the equations inside `custom_jvp` and `custom_vjp` functions are listed too. Visiting one
    replaces the function's derivative rule by the derivative of its body, so use it only if nothing is
    differentiated later. With `enter_choices`, those of every platform are listed (see `stands_for`).
    """

    def inside(jaxpr: Jaxpr, prefix: Path, frames: tuple[Frame, ...], outer: str) -> Iterator[Equation]:
        for i, eqn in enumerate(jaxpr.eqns):
            equation = Equation((*prefix, i), eqn, frames, scope_of(eqn, outer))
            yield equation
            kind, inner = bodies(eqn, enter_custom, enter_choices)
            for k, (body, _) in enumerate(inner):
                frame = _frame(kind, equation.path, eqn)
                yield from inside(body, (*equation.path, k), (*frames, frame), equation.scope)

    yield from inside(closed.jaxpr, (), (), "")


def evaluate(eqn: Any, inputs: Sequence[PyTree]) -> list[PyTree]:
    """Evaluate one equation on `inputs` (one per operand; those of literal operands are ignored)."""
    operands = [(v, x) for v, x in zip(eqn.invars, inputs, strict=True) if not isinstance(v, Literal)]
    # x * x: each use may have its own value.
    if len({v for v, _ in operands}) < len(operands):
        fresh = iter(jax.make_jaxpr(lambda *xs: xs)(*[v.aval for v, _ in operands]).jaxpr.invars)
        eqn = eqn.replace(invars=[v if isinstance(v, Literal) else next(fresh) for v in eqn.invars])
    variables = [v for v in eqn.invars if not isinstance(v, Literal)]
    one = _empty().replace(invars=variables, outvars=eqn.outvars, eqns=[eqn], effects=eqn.effects)
    return list(jax.core.eval_jaxpr(one, (), *[x for _, x in operands]))


@cache
def _empty() -> Jaxpr:
    return jax.make_jaxpr(lambda: ())().jaxpr


class _Run(NamedTuple):
    visit: Visitor
    equations: Mapping[Path, Equation]
    containers: frozenset[Path]
    merge: Callable[[PyTree, PyTree], PyTree]


def interpret(
    closed: ClosedJaxpr,
    visit: Visitor,
    equations: Mapping[Path, Equation],
    args: Sequence[PyTree],
    tokens: Mapping[Path, PyTree] | None = None,
    merge: Callable[[PyTree, PyTree], PyTree] = lambda old, new: new,
) -> tuple[list[PyTree], dict[Path, PyTree]]:
    """Run a program with `visit` instead of the chosen equations.

    Args:
        closed: the program.
        visit: `(equation, evaluate, inputs, token) -> (outputs, capture)`; the token is None if `tokens`
            has no entry for the equation.
        equations: the chosen equations by path, from `Program.equations`.
        args: the program's inputs, flat.
        tokens: a pytree per path, each array with the equation's `axes` in front.
        merge: how a while loop joins the captures of its iterations.

    Returns:
        The program's outputs, flat, and the captures by path (equations whose capture is None are left out),
        with the equation's `axes` in front.
    """
    containers = frozenset(path[:n] for path in equations for n in range(1, len(path), 2))
    run = _Run(visit, equations, containers, merge)
    return _body(run, closed.jaxpr, closed.consts, (), args, dict(tokens or {}))


def _body(
    run: _Run,
    jaxpr: Jaxpr,
    consts: Sequence[PyTree],
    prefix: Path,
    args: Sequence[PyTree],
    tokens: dict[Path, PyTree],
) -> tuple[list[PyTree], dict[Path, PyTree]]:
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    captures: dict[Path, PyTree] = {}
    # Outside of jit, what is not needed any more gives its memory back.
    last = {
        atom: i for i, eqn in enumerate(jaxpr.eqns) for atom in eqn.invars if not isinstance(atom, Literal)
    }
    last |= {atom: len(jaxpr.eqns) for atom in jaxpr.outvars if not isinstance(atom, Literal)}
    inside = _by_container(tokens, len(prefix) + 1)

    def read(atom: Any) -> PyTree:
        return atom.val if isinstance(atom, Literal) else env[atom]

    for i, eqn in enumerate(jaxpr.eqns):
        path = (*prefix, i)

        def compute(inputs: Sequence[PyTree], eqn: Any = eqn, path: Path = path) -> list[PyTree]:
            if path not in run.containers:
                return evaluate(eqn, inputs)
            # A call that is inlined, and a loop that is rebuilt, keep the scope that they are in.
            with within_scope_of(eqn):
                outs, inner = _container(run, eqn, path, list(inputs), inside.get(path, {}))
            captures.update(inner)
            return outs

        inputs = [read(atom) for atom in eqn.invars]
        if path in run.equations:
            outs, capture = run.visit(run.equations[path], compute, inputs, tokens.get(path))
            if capture is not None:
                captures[path] = capture
        else:
            outs = compute(inputs)
        env.update(zip(eqn.outvars, outs, strict=True))
        for atom in {*eqn.outvars, *(atom for atom in eqn.invars if not isinstance(atom, Literal))}:
            if last.get(atom, i) == i:
                del env[atom]
    return [read(atom) for atom in jaxpr.outvars], captures


def _by_container(tokens: dict[Path, PyTree], depth: int) -> dict[Path, dict[Path, PyTree]]:
    """Return the tokens inside each container of a body, whose equations have paths of a length `depth`."""
    groups: dict[Path, dict[Path, PyTree]] = {}
    for path, token in tokens.items():
        if len(path) > depth:
            groups.setdefault(path[:depth], {})[path] = token
    return groups


def _container(
    run: _Run, eqn: Any, path: Path, inputs: list[PyTree], tokens: dict[Path, PyTree]
) -> tuple[list[PyTree], dict[Path, PyTree]]:
    """Rebuild a container with jax's public functions, so that tokens go in and captures come out."""
    kind, inner = bodies(eqn, enter_custom=True, enter_choices=True)

    def body(
        args: Sequence[PyTree], tokens: dict[Path, PyTree], k: int = 0
    ) -> tuple[list[PyTree], dict[Path, PyTree]]:
        jaxpr, consts = inner[k]
        return _body(run, jaxpr, consts, (*path, k), args, tokens)

    params = params_of(eqn)
    if kind == "jit":
        outs, captures = body(_constrained(inputs, params.get("in_shardings")), tokens)
        return _constrained(outs, params.get("out_shardings")), captures
    if kind == "custom":
        return body(inputs, tokens)
    if kind == "remat":
        # One for all operands, or one per operand.
        prevent_cse = params["prevent_cse"]
        prevent_cse = prevent_cse if isinstance(prevent_cse, bool) else any(prevent_cse)
        return jax.checkpoint(body, prevent_cse=prevent_cse, policy=params["policy"])(inputs, tokens)
    if kind == "scan":
        return _scan(eqn, body, inputs, tokens)
    if kind == "cond":
        return _cond(eqn, body, len(inner), inputs, tokens)
    if kind == "while":
        return _while(run, eqn, body, inputs, tokens)
    return _shard_map(eqn, body, inputs, tokens)


def _constrained(values: list[PyTree], shardings: Any) -> list[PyTree]:
    """Keep the shardings that a jit declares for its arguments and results when it is inlined."""
    return [
        lax.with_sharding_constraint(x, s) if isinstance(s, Sharding) else x
        for x, s in zip(values, shardings or [None] * len(values), strict=True)
    ]


def _scan(
    eqn: Any, body: Callable, inputs: list[PyTree], tokens: dict[Path, PyTree]
) -> tuple[list[PyTree], dict]:
    n_consts, n_carry = scan_split(eqn)
    consts, carry, xs = inputs[:n_consts], inputs[n_consts : n_consts + n_carry], inputs[n_consts + n_carry :]

    def step(carry: list[PyTree], sliced: Any) -> tuple[list[PyTree], PyTree]:
        x, token = sliced
        outs, captures = body([*consts, *carry, *x], token)
        return outs[:n_carry], (outs[n_carry:], captures)

    params = {key: eqn.params[key] for key in ("length", "reverse", "unroll")}
    carry, (ys, captures) = lax.scan(step, carry, (xs, tokens), **params)
    return [*carry, *ys], captures


def _cond(
    eqn: Any, body: Callable, n: int, inputs: list[PyTree], tokens: dict[Path, PyTree]
) -> tuple[list[PyTree], dict[Path, PyTree]]:
    index, *operands = inputs
    of_branch = [jax.eval_shape(lambda k=k: body(operands, tokens, k)[1]) for k in range(n)]
    union = {path: shape for shapes in of_branch for path, shape in shapes.items()}

    def branch(k: int) -> Callable:
        def run_it(
            operands: list[PyTree], tokens: dict[Path, PyTree]
        ) -> tuple[list[PyTree], dict[Path, PyTree]]:
            outs, captures = body(operands, tokens, k)
            return outs, zeros(union) | captures

        return run_it

    branches = [branch(k) for k in range(n)]
    if platforms := eqn.params.get("branches_platforms"):
        chosen = zip(platforms, branches, strict=True)
        named = {name or "default": run for names, run in chosen for name in names or (None,)}
        return lax.platform_dependent(operands, tokens, **named)
    return lax.switch(index, branches, operands, tokens)


def _while(
    run: _Run, eqn: Any, body: Callable, inputs: list[PyTree], tokens: dict[Path, PyTree]
) -> tuple[list[PyTree], dict[Path, PyTree]]:
    """Rebuild a while loop; under `vmap` its condition may be one boolean per row.

    A row that has finished repeats its last iteration while others run: the captures of the last iteration are then
    those of each row's own last iteration, and its result does not change.
    """
    n, m = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    cond_consts, body_consts, init = inputs[:n], inputs[n : n + m], inputs[n + m :]
    cond_jaxpr: Any
    cond_jaxpr, consts = _open(eqn.params["cond_jaxpr"])
    # [] for a single condition.
    rows = cond_jaxpr.outvars[0].aval.shape

    def runs(carry: list[PyTree]) -> PyTree:
        return jax.core.eval_jaxpr(cond_jaxpr, consts, *cond_consts, *carry)[0]

    def step(state: PyTree) -> PyTree:
        carry, last, before = state
        now = runs(carry) if rows else None
        start = carry if now is None else _of_rows(now, carry, last)
        outs, captures = body([*body_consts, *start], tokens)
        merged = jax.tree.map(run.merge, before, captures)
        return (outs, [], merged) if now is None else (_of_rows(now, outs, carry), start, merged)

    shapes = jax.eval_shape(lambda: body([*body_consts, *init], tokens)[1])
    start = init, list(init) if rows else [], zeros(shapes)
    outs, _, captures = lax.while_loop(lambda state: jnp.any(runs(state[0])), step, start)
    return outs, captures


def _of_rows(which: jax.Array, ours: list[PyTree], others: list[PyTree]) -> list[PyTree]:
    """Return the rows (leading axes) where `which` is true from the first list, the others from the second."""

    def chosen(a: PyTree, b: PyTree) -> PyTree:
        # [rows] -> [rows, 1, ...]
        mask = which.reshape(which.shape + (1,) * (jnp.ndim(a) - which.ndim))
        return jnp.where(mask, a, b)

    return [chosen(a, b) for a, b in zip(ours, others, strict=True)]


def _manual_axes(eqn: Any) -> tuple[str, ...]:
    """Return the manual mesh axes of a shard_map, in the order of the mesh."""
    names = eqn.params["newly_manual_axes"]
    return tuple(axis for axis in eqn.params["mesh"].axis_names if axis in names)


def _shard_map(
    eqn: Any, body: Callable, inputs: list[PyTree], tokens: dict[Path, PyTree]
) -> tuple[list[PyTree], dict]:
    params, axes = eqn.params, _manual_axes(eqn)

    def local(inputs: list[PyTree], tokens: dict[Path, PyTree]) -> tuple[list[PyTree], dict[Path, PyTree]]:
        # Each device has its own slice of the tokens, [1, ...], and returns its own slice of the captures.
        outs, captures = body(inputs, jax.tree.map(lambda t: t[0], tokens))
        return outs, jax.tree.map(lambda c: c[None], captures)

    each = PartitionSpec(axes)
    return jax.shard_map(
        local,
        mesh=params["mesh"],
        in_specs=(list(params["in_specs"]), each),
        out_specs=(list(params["out_specs"]), each),
        axis_names=set(axes),
        check_vma=params["check_vma"],
    )(inputs, tokens)
