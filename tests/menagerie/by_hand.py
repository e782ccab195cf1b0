"""An evaluator of programs that shares nothing with gradfn: operation by operation, in numpy as far as numpy goes.

Equal operations give equal bits, since nothing is fused. Loops are loops of Python, branches are `if`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal, jaxpr_as_fun


class Traced(NamedTuple):
    """A function's program for arguments of some shapes, evaluated operation by operation."""

    closed: Any
    tree: Any

    def __call__(self, *args):
        return jax.tree.unflatten(self.tree, self._run(args)[0])

    def values(self, *args):
        """Return the values of every equation: see `evaluate`."""
        return self._run(args)[1]

    def _run(self, args):
        with np.errstate(all="ignore"):
            return evaluate(self.closed.jaxpr, self.closed.consts, jax.tree.leaves(args))


def traced(f, *args):
    closed, shapes = jax.make_jaxpr(f, return_shape=True)(*args)
    return Traced(closed, jax.tree.structure(shapes))


def evaluate(jaxpr, consts, args, path=()):
    """Return a program's outputs, and its values by path: `(3, 0, 2)` is equation 2 in the body of equation 3.

    In a scan the values of the iterations are stacked, in a while loop they are those of the last iteration, and those
    of a branch that did not run are left out.
    """
    values = {}
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [_array(x) for x in [*consts, *args]]))

    def read(atom):
        return atom.val if isinstance(atom, Literal) else env[atom]

    for i, eqn in enumerate(jaxpr.eqns):
        inner, outs = _RULES.get(eqn.primitive.name, _operation)(
            eqn, [read(v) for v in eqn.invars], (*path, i)
        )
        values |= inner
        values[(*path, i)] = outs
        env |= zip(eqn.outvars, outs)
    return [read(v) for v in jaxpr.outvars], values


def _array(x):
    """Return an array of numpy, contiguous: results of numpy may depend on the layout. Keys stay arrays of jax."""
    return x if _is_key(x) else np.require(np.asarray(x), requirements="C")


def _is_key(x):
    return jnp.issubdtype(getattr(x, "dtype", float), jax.dtypes.extended)


# --- Equations that contain programs ---------------------------------------------------------------------------------


def _open(body):
    return (body.jaxpr, body.consts) if hasattr(body, "consts") else (body, ())


def _call(name):
    def rule(eqn, args, path):
        outs, values = evaluate(*_open(eqn.params[name]), args, (*path, 0))
        return values, outs

    return rule


def _scan(eqn, args, path):
    p = eqn.params
    body, (n, m), steps = _open(p["jaxpr"]), (p["num_consts"], p["num_carry"]), range(p["length"])
    consts, carry, xs = args[:n], args[n : n + m], args[n + m :]
    ys, values = {}, {}
    for t in reversed(steps) if p["reverse"] else steps:
        outs, values[t] = evaluate(*body, [*consts, *carry, *[x[t] for x in xs]], (*path, 0))
        carry, ys[t] = outs[:m], outs[m:]
    stacked = [
        _stack([ys[t][k] for t in steps]) if steps else np.zeros(v.aval.shape, v.aval.dtype)
        for k, v in enumerate(eqn.outvars[m:])
    ]
    return _iterations([values[t] for t in steps]), [*carry, *stacked]


def _stack(values):
    return (np if isinstance(values[0], np.ndarray) else jnp).stack(values)


def _iterations(values):
    """Stack the values of iterations; zeros for those of a branch that did not run in an iteration."""
    some = functools.reduce(lambda a, b: a | b, values, {})

    def of(path, k, like):
        return _stack([each[path][k] if path in each else jnp.zeros_like(like) for each in values])

    return {path: [of(path, k, like) for k, like in enumerate(outs)] for path, outs in some.items()}


def _cond(eqn, args, path):
    k = int(np.clip(args[0], 0, len(eqn.params["branches"]) - 1))
    outs, values = evaluate(*_open(eqn.params["branches"][k]), args[1:], (*path, k))
    return values, outs


def _while(eqn, args, path):
    p, values = eqn.params, {}
    n, m = p["cond_nconsts"], p["body_nconsts"]
    state = args[n + m :]

    def running():
        return np.asarray(evaluate(*_open(p["cond_jaxpr"]), [*args[:n], *state])[0][0])

    while np.any(now := running()):
        new, values = evaluate(*_open(p["body_jaxpr"]), [*args[n : n + m], *state], (*path, 0))
        # Under vmap, rows that have finished keep their state.
        rows = [now.reshape(now.shape + (1,) * (np.ndim(v) - now.ndim)) for v in new]
        state = [np.where(k, a, b) if now.ndim else a for k, a, b in zip(rows, new, state)]
    return values, state


_RULES = {
    **dict.fromkeys(("jit", "pjit", "checkpoint", "remat2"), _call("jaxpr")),
    **dict.fromkeys(("closed_call", "core_call", "custom_jvp_call", "custom_vjp_call"), _call("call_jaxpr")),
    "scan": _scan,
    "cond": _cond,
    "while": _while,
}


# --- Single operations -----------------------------------------------------------------------------------------------


def _operation(eqn, args, path):
    rule = _NUMPY.get(eqn.primitive.name)
    if eqn.primitive.name in _SEVERAL:
        return {}, [_array(x) for x in _SEVERAL[eqn.primitive.name](eqn.params, *args)]
    if rule is None or not all(_is_plain(v.aval.dtype) for v in [*eqn.invars, *eqn.outvars]):
        return {}, _bind(eqn, args)
    out = np.require(np.asarray(rule(eqn.params, *args)), requirements="C")
    expected = eqn.outvars[0].aval
    if (out.shape, out.dtype) != (expected.shape, expected.dtype):
        return {}, _bind(eqn, args)
    return {}, [out]


def _is_plain(dtype):
    """Tell whether a dtype is one of numpy's own: no key, no bfloat16."""
    return isinstance(dtype, np.dtype) and dtype.kind in "biufc"


def _bind(eqn, args):
    params = eqn.primitive.get_bind_params(eqn.params)
    # Older versions of jax return the functions apart from the other parameters.
    functions, params = params if isinstance(params, tuple) else ((), params)
    with eqn.ctx.manager:
        outs = eqn.primitive.bind(*functions, *map(jnp.asarray, args), **params)
    return [_array(out) for out in (outs if eqn.primitive.multiple_results else [outs])]


def _float(f):
    """Return a rule that applies to floating arrays only: of integers, jax rounds in another direction."""
    return lambda p, *xs: f(*xs) if np.asarray(xs[0]).dtype.kind in "fc" else None


def _dot(p, a, b):
    (contract_a, contract_b), (batch_a, batch_b) = p["dimension_numbers"]
    letters = iter(range(np.ndim(a) + np.ndim(b)))
    of_a = [next(letters) for _ in range(np.ndim(a))]
    of_b = [next(letters) for _ in range(np.ndim(b))]
    for i, j in [*zip(contract_a, contract_b), *zip(batch_a, batch_b)]:
        of_b[j] = of_a[i]
    batch = [of_a[i] for i in batch_a]
    free_a = [x for i, x in enumerate(of_a) if i not in (*contract_a, *batch_a)]
    free_b = [x for i, x in enumerate(of_b) if i not in (*contract_b, *batch_b)]
    return np.einsum(a, of_a, b, of_b, [*batch, *free_a, *free_b])


def _broadcast(p, x, *_):
    shape = np.ones(len(p["shape"]), int)
    shape[list(p["broadcast_dimensions"])] = np.shape(x)
    return np.broadcast_to(np.reshape(x, shape), p["shape"])


def _select(p, which, *cases):
    if np.ndim(which) == 0:
        return cases[int(which)]
    return np.choose(np.asarray(which).astype(int), cases)


def _slice(p, x):
    strides = p["strides"] or (1,) * np.ndim(x)
    return x[tuple(map(slice, p["start_indices"], p["limit_indices"], strides))]


def _pad(p, x, value):
    config = p["padding_config"]
    sizes = [max(n + (n - 1) * inner, 0) for n, (_, _, inner) in zip(np.shape(x), config)]
    out = np.full(sizes, value)
    out[tuple(slice(None, None, inner + 1) for *_, inner in config)] = x
    out = out[tuple(slice(max(-low, 0), n - max(-high, 0)) for n, (low, high, _) in zip(sizes, config))]
    return np.pad(out, [(max(low, 0), max(high, 0)) for low, high, _ in config], constant_values=value)


def _iota(p):
    # [n] -> [1, .., n, .., 1]
    shape = [n if i == p["dimension"] else 1 for i, n in enumerate(p["shape"])]
    return np.broadcast_to(np.arange(max(shape), dtype=p["dtype"]).reshape(shape), p["shape"])


def _dynamic_slice(p, x, *starts):
    sizes = p["slice_sizes"]
    starts = [int(np.clip(s, 0, n - size)) for s, n, size in zip(starts, np.shape(x), sizes)]
    return x[tuple(slice(s, s + size) for s, size in zip(starts, sizes))]


def _convert(p, x):
    dtype = np.dtype(p["new_dtype"])
    return np.asarray(x) != 0 if dtype.kind == "b" else np.asarray(x).astype(dtype)


def _cumulative(f):
    def rule(p, x):
        axis = p["axis"]
        return np.flip(f(np.flip(x, axis), axis), axis) if p["reverse"] else f(x, axis)

    return rule


_ONE_BY_ONE = {
    "neg": np.negative, "floor": np.floor, "ceil": np.ceil, "exp": np.exp, "log": np.log,
    "log1p": np.log1p, "expm1": np.expm1, "tanh": np.tanh, "sin": np.sin, "cos": np.cos, "tan": np.tan,
    "asin": np.arcsin, "acos": np.arccos, "atan": np.arctan, "sinh": np.sinh, "cosh": np.cosh,
    "asinh": np.arcsinh, "atanh": np.arctanh, "sqrt": np.sqrt, "cbrt": np.cbrt, "abs": np.abs,
    "is_finite": np.isfinite, "sign": np.sign, "real": np.real, "imag": np.imag,
    "square": lambda x: x * x, "rsqrt": lambda x: 1 / np.sqrt(x), "logistic": lambda x: 1 / (1 + np.exp(-x)),
    "div": np.divide, "pow": np.power, "atan2": np.arctan2, "rem": np.fmod,
}  # fmt: skip
_ANY = {
    "add": np.add, "add_any": np.add, "sub": np.subtract, "mul": np.multiply, "max": np.maximum,
    "min": np.minimum, "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor, "not": np.invert, "copy": np.asarray, "copy_p": np.asarray,
    "stop_gradient": np.asarray,
}  # fmt: skip
_REDUCTIONS = {
    "reduce_sum": np.sum, "reduce_max": np.max, "reduce_min": np.min, "reduce_prod": np.prod,
    "reduce_and": np.all, "reduce_or": np.any,
}  # fmt: skip
_NUMPY = {
    **{name: _float(f) for name, f in _ONE_BY_ONE.items()},
    **{name: lambda p, *xs, f=f: f(*xs) for name, f in _ANY.items()},
    **{name: lambda p, x, f=f: f(x, axis=tuple(p["axes"])) for name, f in _REDUCTIONS.items()},
    "integer_pow": lambda p, x: np.power(x, p["y"]) if np.asarray(x).dtype.kind in "fc" else None,
    "complex": lambda p, a, b: a + 1j * b,
    "dot_general": _dot,
    "broadcast_in_dim": _broadcast,
    "reshape": lambda p, x: None if p["dimensions"] else np.reshape(x, p["new_sizes"]),
    "squeeze": lambda p, x: np.squeeze(x, tuple(p["dimensions"])),
    "expand_dims": lambda p, x: np.expand_dims(x, tuple(p["dimensions"])),
    "transpose": lambda p, x: np.transpose(x, p["permutation"]),
    "concatenate": lambda p, *xs: np.concatenate(xs, p["dimension"]),
    "rev": lambda p, x: np.flip(x, tuple(p["dimensions"])),
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "pad": _pad,
    "select_n": _select,
    "clamp": lambda p, low, x, high: np.minimum(np.maximum(x, low), high),
    "convert_element_type": _convert,
    "cumsum": _cumulative(np.cumsum),
    "cumprod": _cumulative(np.cumprod),
    "cummax": _cumulative(np.maximum.accumulate),
    "iota": _iota,
    "stack": lambda p, *xs: np.stack(xs, p["axis"]),
}  # fmt: skip
_SEVERAL = {
    "optimization_barrier": lambda p, *xs: list(xs),
    "split": lambda p, x: np.split(x, np.cumsum(p["sizes"])[:-1], p["axis"]),
}


# --- The same program without jit in it ------------------------------------------------------------------------------


def inlined(closed):
    """Return a program with its jits inlined, at all depths. Where one uses a value twice, sums get another order."""

    def run(*args):
        env = dict(zip([*closed.jaxpr.constvars, *closed.jaxpr.invars], [*closed.consts, *args]))
        for eqn in closed.jaxpr.eqns:
            xs = [v.val if isinstance(v, Literal) else env[v] for v in eqn.invars]
            if eqn.primitive.name in ("jit", "pjit"):
                outs = jaxpr_as_fun(inlined(eqn.params["jaxpr"]))(*xs)
            else:
                names = {"scan": ["jaxpr"], "cond": ["branches"], "while": ["body_jaxpr"]}
                for name in names.get(eqn.primitive.name, []):
                    body = eqn.params[name]
                    body = tuple(map(inlined, body)) if isinstance(body, tuple) else inlined(body)
                    eqn = eqn.replace(params=eqn.params | {name: body})
                one = closed.jaxpr.replace(
                    constvars=[], invars=list(dict.fromkeys(v for v in eqn.invars if not isinstance(v, Literal))),
                    outvars=eqn.outvars, eqns=[eqn], debug_info=None,
                )  # fmt: skip
                read = {v: x for v, x in zip(eqn.invars, xs) if not isinstance(v, Literal)}
                outs = jax.core.eval_jaxpr(one, (), *read.values())
            env |= zip(eqn.outvars, outs)
        return [v.val if isinstance(v, Literal) else env[v] for v in closed.jaxpr.outvars]

    return jax.make_jaxpr(run)(*[jax.ShapeDtypeStruct(v.shape, v.dtype) for v in closed.in_avals])
