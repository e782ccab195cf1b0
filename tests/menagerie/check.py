"""What holds for every architecture: four properties, each compared with something that does not use gradfn.

Both sides of a comparison are traced and then evaluated operation by operation (`by_hand.evaluate`): then equal
operations give equal bits, and XLA has no freedom to fuse two programs differently.
"""

import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxpr_as_fun

import gradfn as gf
from tests.menagerie.by_hand import inlined, traced

PROPERTIES = ("gradients", "values", "site gradients", "norms")


class Case(NamedTuple):
    """One architecture: `f(params, x)` of one example, its parameters, and examples `[B, ...]`.

    `exact` is false where it computes in bfloat16 or float32, too coarse for finite differences.
    """

    name: str
    f: Callable
    params: Any
    xs: Any
    exact: bool = True


# --- The properties --------------------------------------------------------------------------------------------------


def loss_of(f):
    """Return a scalar of all outputs of `f`, with another derivative at each of their elements."""

    def loss(params, x):
        total = 0.0
        for y in jax.tree.leaves(f(params, x)):
            if jnp.issubdtype(y.dtype, jnp.inexact):
                for part in (y.real, y.imag) if jnp.issubdtype(y.dtype, jnp.complexfloating) else (y,):
                    weights = np.cos(np.arange(1.0, 1.0 + part.size)).reshape(part.shape)
                    total = total + jnp.sum(jnp.asarray(weights, part.dtype) * part + 0.05 * part * part)
        return total

    return loss


def check(case):
    """Return, by property, None where it holds, else the error."""
    loss, x = loss_of(case.f), jax.tree.map(lambda leaf: leaf[0], case.xs)
    memory = {}

    def inspection():
        if "inspection" not in memory:
            run = traced(gf.inspect(loss, keep=None, stats=("rms",)), case.params, x)
            memory["inspection"] = run(case.params, x)
        return memory["inspection"]

    checks = {
        "gradients": lambda: gradients(loss, case.params, x, inspection()),
        "values": lambda: values(loss, case.params, x, inspection()),
        "site gradients": lambda: site_gradients(loss, case, x, inspection()),
        "norms": lambda: norms(loss, case),
    }
    results = {}
    for name, run in checks.items():
        if name == "site gradients" and not case.exact:
            continue
        try:
            run()
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"
        else:
            results[name] = None
    return results


def gradients(loss, params, x, inspection):
    """The loss, the gradients of parameters and inputs have the bits of `jax.value_and_grad`, both op by op.

    gf.inspect inlines each `jit` that contains a site. Where such a function uses a value several times, the sum of
    that value's cotangents gets another order; then the bits are those of `value_and_grad` of the inlined program.
    """
    leaves, tree = jax.tree.flatten((params, x))
    chosen = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact)]

    def of_some(some):
        full = list(leaves)
        for i, leaf in zip(chosen, some):
            full[i] = leaf
        return loss(*jax.tree.unflatten(tree, full))

    some = [leaves[i] for i in chosen]
    actual = inspection.value, jax.tree.leaves((inspection.grads, inspection.input_grads))
    expected = traced(jax.value_and_grad(of_some), some)(some)
    assert len(actual[1]) == len(expected[1]), f"{len(actual[1])} gradients instead of {len(expected[1])}"
    for k, (a, b) in enumerate(zip(jax.tree.leaves(actual), jax.tree.leaves(expected))):
        near(f"result {k}", a, b, _bound(b) * 1e-5)
    if not _equal(actual, expected):
        program = inlined(jax.make_jaxpr(of_some)(some))
        of_inlined = lambda some: jaxpr_as_fun(program)(*some)[0]  # noqa: E731
        expected = traced(jax.value_and_grad(of_inlined), some)(some)
    for k, (a, b) in enumerate(zip(jax.tree.leaves(actual), jax.tree.leaves(expected))):
        same_bits(f"result {k}", a, b)


def values(loss, params, x, inspection):
    """What `gf.inspect` and `gf.capture` return at a site has the bits of the equation in a run by hand."""
    by_hand = traced(loss, params, x).values(params, x)
    captured = traced(gf.capture(loss, keep=None, stats=()), params, x)(params, x)
    near("the captured output", captured.output, inspection.value, 1e-12)
    assert list(captured) == list(inspection)
    assert set(inspection.values) == set(inspection)
    for site in inspection.sites:
        # Of a branch that did not run, the values are zeros.
        zeros = np.zeros(site.axes + site.shape, site.dtype)
        expected = by_hand[site.path][site.index] if site.path in by_hand else zeros
        same_bits(site.name, captured[site.name].value, expected)
        # A few primitives (`svd`) are computed in another way where they are differentiated.
        near(site.name, inspection[site.name].value, expected, _bound(expected) * 1e-4)
        # [axes, elements]
        flat = np.abs(np.asarray(expected, np.result_type(expected, np.float32))).reshape(*site.axes, -1)
        if flat.size:
            rms = np.sqrt(np.mean(flat * flat, -1))
            near(f"rms of {site.name}", inspection.stats[site.name].rms, rms, 1e-5)


def site_gradients(loss, case, x, inspection):
    """A perturbation of all sites by `gf.patch` changes the loss as their gradients say.

    The derivative along random directions, one per site and all at once, is the sum of the products of gradients and
    directions. Each direction is scaled to add 1 at most, so that none is lost among others. Where the result differs,
    other directions are tried, since a step may cross a kink of a ReLU, and each site alone; sites where the loss
    itself has a kink or a step are left out.
    """
    some = [site for site in inspection.sites if site.differentiable and site.reaches == "result"]
    for site in inspection.sites:
        if site.differentiable and site.reaches != "result":
            assert not np.any(np.asarray(inspection[site.name].grad)), f"{site.name} reaches {site.reaches}"
    if not np.all(np.isfinite([inspection[site.name].grad_stats.rms for site in some if not site.axes])):
        # Of a program that makes NaNs, no difference is finite.
        return
    wrong = some and _differences(loss, case, x, inspection, some)
    if wrong:
        alone = {site: _differences(loss, case, x, inspection, [site]) for site in some}
        faults = {site.name: fault for site, fault in alone.items() if fault}
        smooth = [site for site, fault in alone.items() if fault != KINK]
        if len(smooth) < len(some):
            wrong = smooth and _differences(loss, case, x, inspection, smooth)
        assert not wrong or wrong == KINK, f"{wrong}; alone: {faults}"


# A loss that is not smooth in a value: a program with an `eq` of it, as the derivative of `max` has, for example.
KINK = "a kink or a step"


def _differences(loss, case, x, inspection, sites):
    """Return how the derivative by finite differences differs from the gradients, or None."""
    # A loss that bends a lot needs a smaller step.
    for seed, h in enumerate((1e-4, 1e-5, 2e-6)):
        f, expected, size = _moved(loss, case, x, inspection, sites, seed)
        at = {k: f(k * h) for k in (-2, -1, 1, 2)}
        slope = (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * h)
        bound = (1e-7 if h == 1e-4 else 1e-6) * (size + max(map(abs, at.values())))
        if abs(slope - expected) <= bound:
            return None
        bends = [abs(f(h) - 2 * f(0.0) + f(-h)) / h for h in (1e-5, 1e-7)]
        wrong = f"gradients say {expected:.10g}, finite differences {slope:.10g}"
    # Of a smooth function, it gets smaller with h.
    return KINK if bends[1] > max(1e-4, 0.1 * bends[0]) else wrong


def _moved(loss, case, x, inspection, sites, seed):
    """Return the loss as a function of a step in random directions, its derivative, and the sum of its parts."""
    rng = np.random.default_rng([zlib.crc32(case.name.encode()), seed])
    directions, total, size = {}, 0.0, 1.0
    for site in sites:
        d = rng.normal(size=site.shape)
        if site.dtype.startswith("complex"):
            d = d + 1j * rng.normal(size=site.shape)
        # Of complex values the gradient is d/dRe - i d/dIm.
        product = np.sum(np.asarray(inspection[site.name].grad) * d).real
        scale = 1 / max(1.0, abs(product))
        directions[site.name] = d * scale
        total, size = total + product * scale, size + abs(product * scale)

    def moved(params, x, t):
        edits = {n: lambda v, d=d: v + (t * d).astype(v.dtype) for n, d in directions.items()}
        return gf.patch(loss, edits)(params, x)

    run = traced(moved, case.params, x, 0.0)
    return lambda t: float(run(case.params, x, t)), total, size


def norms(loss, case):
    """The norms of the examples' gradients, and their mean, are those of `vmap(grad)`."""
    actual = traced(gf.per_example.norms(loss), case.params, case.xs)(case.params, case.xs)
    losses, grads = traced(
        jax.vmap(jax.value_and_grad(loss, allow_int=True), (None, 0)), case.params, case.xs
    )(case.params, case.xs)
    grads = [np.asarray(g) for g in jax.tree.leaves(grads) if g.dtype != jax.dtypes.float0]
    wide = [g.astype(np.result_type(g, np.float32)) for g in grads]
    # [B, elements] each
    squares = [np.sum(np.abs(g.reshape(g.shape[0], math.prod(g.shape[1:]))) ** 2, 1) for g in wide]
    total = np.sqrt(sum(squares))
    near("losses", actual.values, losses, _bound(losses) if case.exact else 0.02)
    bound = max(map(_bound, grads)) if case.exact else 0.02
    near("total", actual.total, total, bound)
    paths = [path for path, _ in actual.methods]
    for path, a, b in zip(paths, jax.tree.leaves(actual.norms), squares, strict=True):
        # In terms of the total: if a gradient almost cancels, its square has lost half of the digits.
        near(f"norms of {path}", a, np.sqrt(b), bound, scale=max(total.max(), 1e-30))
    for path, a, b in zip(paths, jax.tree.leaves(actual.grads), wide, strict=True):
        near(f"gradient of {path}", np.asarray(a, b.dtype), b.mean(0), bound, scale=np.abs(b).max(initial=0))


def _bound(x):
    return {2: 0.05, 4: 1e-4, 8: 1e-8, 16: 1e-8}[np.asarray(x).dtype.itemsize]


def _equal(a, b):
    return all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in zip(*map(jax.tree.leaves, (a, b)))
    )


def same_bits(what, actual, expected):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} instead of {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: {list(actual.shape)} instead of {list(expected.shape)}"
    if actual.tobytes() != expected.tobytes():
        gap = np.abs(actual.astype(np.complex128) - expected.astype(np.complex128)).max()
        raise AssertionError(f"{what} differs by {gap:.3g} of {np.abs(expected).max():.3g}")


def near(what, actual, expected, bound, scale=None):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, f"{what}: {list(actual.shape)} instead of {list(expected.shape)}"
    scale = np.abs(expected).max(initial=0) if scale is None else scale
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected), what)
    actual, expected, scale = (np.nan_to_num(x) for x in (actual, expected, scale))
    gap = np.abs(actual - expected).max(initial=0)
    assert gap <= bound * scale + 1e-14, f"{what} differs by {gap:.3g} of {scale:.3g}"
