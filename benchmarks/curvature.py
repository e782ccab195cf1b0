"""The cost of curvature: products relative to a gradient, and eigenvalues compared at equal residual.

    python -m benchmarks.curvature                  # both
    python -m benchmarks.curvature --only products
    python -m benchmarks.curvature --only eigenvalues

Products: Hessian, Gauss-Newton and empirical Fisher times a vector, relative to the gradient of the loss of the same
batch. If both factors of a matrix product depend on parameters, a Hessian product needs eight matrix products where a
gradient needs three, 2.67 times as many; in a first layer, whose input is constant, it needs three instead of two.
`gf.curvature.hessian_eigs` and similar functions compute the part that does not depend on the vector once, and need
six or two.

Eigenvalues: the five largest of the Hessian of the 784-16-10 net on 1,024 of the built-in digits, after 100 steps of
Adam. Each contender uses the fastest of its settings (tolerance, number of products, threads) for which all five
residuals `|Hv - lv| / |l|` are below 1e-3, checked in float64; the setting and its residual are printed.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import gradfn as gf
from benchmarks import harness
from benchmarks.gpt_step import CONFIG, task_of

TOLERANCE = 1e-3
K = 5
RAW = "Lanczos by hand"


class Problem(NamedTuple):
    """The 784-16-10 net on a batch of digits."""

    params: dict[str, jax.Array]
    images: jax.Array  # [1024, 784]
    labels: jax.Array  # [1024]


class Solved(NamedTuple):
    """Eigenvalues `[5]` and eigenvectors `[5, P]`, in the order W1, b1, W2, b2."""

    values: np.ndarray
    vectors: np.ndarray


Solver = Callable[[], Solved]
NET = gf.mlp([784, 16, 10])
ORDER = ("W1", "b1", "W2", "b2")


def problem() -> Problem:
    """Return the net after 100 steps of Adam."""
    data = gf.data.digits()
    images, labels = (jnp.asarray(a[:1024]) for a in data.train)
    params, optimizer = NET.init(jax.random.key(0)), optax.adam(3e-3)
    step = gf.train_step(gf.batch_mean(gf.classification_loss(NET)), optimizer)
    state = gf.train_state(params, optimizer, jax.random.key(0))
    for _ in range(100):
        state, _ = step(state, (images, labels))
    return Problem(dict(state.params), images, labels)


class Raw(NamedTuple):
    """A jitted Hessian product on flat vectors, `product(v, *data)`, written out in plain JAX."""

    product: Callable
    data: tuple[jax.Array, ...]
    size: int


def raw(p: Problem, dtype: Any = jnp.float32) -> Raw:
    """Return the product at the problem's parameters."""
    arrays = [p.params[name] for name in ORDER]
    W1, _, W2, _ = arrays
    ends = np.cumsum([a.size for a in arrays])[:-1]

    def loss(w: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        w1, b1, w2, b2 = jnp.split(w, ends)
        a = jax.nn.sigmoid(x @ w1.reshape(W1.shape).T + b1)
        z = a @ w2.reshape(W2.shape).T + b2
        return optax.softmax_cross_entropy_with_integer_labels(z, y).mean()

    @jax.jit
    def product(v: jax.Array, w: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        return jax.jvp(lambda w: jax.grad(loss)(w, x, y), (w,), (v,))[1]

    start = jnp.concatenate([a.ravel() for a in arrays]).astype(dtype)
    return Raw(product, (start, p.images.astype(dtype), p.labels), start.size)


def residual(p: Problem) -> Callable[[Solved], float]:
    """Return a function that computes the largest relative residual of five pairs, in float64."""
    with jax.enable_x64(True):
        product, data, _ = raw(p, jnp.float64)

    def worst(found: Solved) -> float:
        with jax.enable_x64(True):
            unit = found.vectors / np.linalg.norm(found.vectors, axis=1, keepdims=True)
            left = [
                np.linalg.norm(product(jnp.asarray(v, jnp.float64), *data) - value * v) / abs(value)
                for value, v in zip(found.values, unit, strict=True)
            ]
        return float(max(left))

    return worst


def gradfn_solver(p: Problem) -> Iterable[tuple[str, Solver]]:
    """Yield solvers by gf.curvature.hessian_eigs."""
    for tolerance in (3e-3, 1e-3, 3e-4):
        eigs = gf.curvature.hessian_eigs(gf.batch_mean(gf.classification_loss(NET)), K, tolerance=tolerance)

        def solve(eigs: Callable = eigs) -> Solved:
            found = eigs(p.params, (p.images, p.labels))
            vectors = np.concatenate([np.asarray(found.vectors[n]).reshape(K, -1) for n in ORDER], 1)
            return Solved(np.asarray(found.values), vectors)

        yield f"tolerance={tolerance:g}", solve


def by_hand(p: Problem) -> Iterable[tuple[str, Solver]]:
    """Yield solvers by a Python loop around a jitted Hessian product, with full reorthogonalization."""
    product, data, size = raw(p)

    def solve(n: int) -> Solved:
        Q = np.zeros([n + 1, size], np.float32)
        T = np.zeros([n, n], np.float32)
        Q[0] = np.random.default_rng(0).normal(size=size)
        Q[0] /= np.linalg.norm(Q[0])
        for j in range(n):
            w = np.array(product(Q[j], *data))
            T[j, j] = w @ Q[j]
            for _ in range(2):
                w -= (Q[: j + 1] @ w) @ Q[: j + 1]
            beta = np.linalg.norm(w)
            Q[j + 1] = w / beta
            if j + 1 < n:
                T[j, j + 1] = T[j + 1, j] = beta
        values, S = np.linalg.eigh(T)
        top = np.argsort(-abs(values))[:K]
        return Solved(values[top], S[:, top].T @ Q[:n])

    for n in range(16, 34, 2):
        yield f"{n} products", partial(solve, n)


def arpack(p: Problem) -> Iterable[tuple[str, Solver]]:
    """Yield solvers by scipy's ARPACK with the same jitted product."""
    from scipy.sparse.linalg import LinearOperator

    product, data, size = raw(p)

    def times(v: np.ndarray) -> np.ndarray:
        return np.asarray(product(v.reshape(-1).astype(np.float32), *data))

    return _eigsh(LinearOperator((size, size), matvec=times, dtype=np.float32))


def _eigsh(operator: Any) -> Iterable[tuple[str, Solver]]:
    from scipy.sparse.linalg import eigsh

    start = np.random.default_rng(0).normal(size=operator.shape[0]).astype(np.float32)

    def solve(tolerance: float, ncv: int) -> Solved:
        values, vectors = eigsh(operator, K, which="LM", tol=tolerance, ncv=ncv, v0=start)
        return Solved(values, vectors.T)

    for ncv in (12, 16, 20):  # 20 is scipy's default; with fewer vectors it restarts more often
        for tolerance in (1e-2, 1e-3):
            yield f"tol={tolerance:g}, ncv={ncv}", partial(solve, tolerance, ncv)


def _torch_model(p: Problem) -> Any:
    import torch
    from torch import nn

    model = nn.Sequential(nn.Linear(784, 16), nn.Sigmoid(), nn.Linear(16, 10))
    for weight, name in zip(model.parameters(), ORDER, strict=True):
        weight.data = torch.from_numpy(np.array(p.params[name]))
    batch = torch.from_numpy(np.array(p.images)), torch.from_numpy(np.array(p.labels)).long()
    return model, nn.CrossEntropyLoss(), batch


def curvlinops(p: Problem) -> Iterable[tuple[str, Solver]]:
    """Yield solvers by curvlinops' Hessian as a scipy operator in ARPACK, as in its documentation."""
    from curvlinops import HessianLinearOperator

    model, criterion, batch = _torch_model(p)
    operator = HessianLinearOperator(
        model, criterion, list(model.parameters()), [batch], check_deterministic=False
    )
    return on_threads(_eigsh(operator.to_scipy(np.float32)))


def pyhessian(p: Problem) -> Iterable[tuple[str, Solver]]:
    """Yield solvers by PyHessian's power iteration, one eigenvalue after the other."""
    from pyhessian import hessian

    model, criterion, batch = _torch_model(p)

    def solve(tolerance: float) -> Solved:
        import torch

        torch.manual_seed(0)
        model.zero_grad()
        values, vectors = hessian(model, criterion, data=batch, cuda=False).eigenvalues(
            maxIter=2000, tol=tolerance, top_n=K
        )
        rows = [np.concatenate([v.detach().numpy().ravel() for v in vector]) for vector in vectors]
        return Solved(np.array(values), np.stack(rows))

    return on_threads(
        (f"tol={tolerance:g}", partial(solve, tolerance)) for tolerance in (1e-4, 1e-5, 1e-6, 1e-7)
    )


def matfree(p: Problem) -> Iterable[tuple[str, Solver]]:
    """Yield solvers by matfree's Lanczos process with full reorthogonalization, compiled as one program."""
    from matfree.decomp import tridiag_sym

    product, data, size = raw(p)
    start = jax.random.normal(jax.random.key(0), [size])

    for n in range(16, 34, 2):

        @jax.jit
        def run(start: jax.Array, *data: jax.Array, n: int = n) -> tuple[jax.Array, jax.Array]:
            found = tridiag_sym(n, custom_vjp=False)(product, start, *data)
            values, S = jnp.linalg.eigh(found.J_small)
            top = jnp.argsort(-jnp.abs(values))[:K]
            return values[top], S[:, top].T @ found.Q_tall

        def solve(run: Callable = run) -> Solved:
            return Solved(*map(np.asarray, run(start, *data)))

        yield f"{n} products", solve


SOLVERS: dict[str, Callable[[Problem], Iterable[tuple[str, Solver]]]] = {
    "gradfn": gradfn_solver,
    RAW: by_hand,
    "ARPACK (scipy)": arpack,
    "matfree": matfree,
    "curvlinops": curvlinops,
    "PyHessian": pyhessian,
}


def fastest(
    settings: Iterable[tuple[str, Solver]], worst: Callable[[Solved], float]
) -> tuple[str, Solver, float]:
    """Return the fastest setting that meets the tolerance, or the most accurate one if none does."""
    tried = []
    for name, solve in settings:
        left = worst(solve())
        seconds = []
        for _ in range(3 if left <= TOLERANCE else 1):
            began = time.perf_counter()
            solve()
            seconds.append(time.perf_counter() - began)
        tried.append((name, solve, left, min(seconds)))
        if left <= TOLERANCE and name.endswith("products"):  # later settings use more of them
            return tried[-1][:3]
    enough = [t for t in tried if t[2] <= TOLERANCE]
    name, solve, left, _ = min(enough, key=lambda t: t[3]) if enough else min(tried, key=lambda t: t[2])
    return name, solve, left


def on_threads(settings: Iterable[tuple[str, Solver]]) -> Iterable[tuple[str, Solver]]:
    """Return PyTorch's settings, each with one thread and with all: for a small net one is often faster."""
    import torch

    def solve(n: int, inner: Solver) -> Solved:
        torch.set_num_threads(n)
        return inner()

    for name, inner in settings:
        for n in sorted({1, os.cpu_count() or 1}):
            yield f"{name}, threads={n}", partial(solve, n, inner)


def eigenvalues(options: argparse.Namespace) -> None:
    """Compare solvers for the five largest eigenvalues."""
    p = problem()
    worst = residual(p)
    tuned, skipped = harness.available(lambda name: fastest(SOLVERS[name](p), worst), SOLVERS)
    timings = harness.race({name: counted(solve) for name, (_, solve, _) in tuned.items()}, options.rounds)
    harness.report(
        f"Top {K} eigenvalues of the 784-16-10 net's Hessian on 1,024 digits",
        timings,
        RAW,
        "solutions",
        skipped=skipped,
        packages=(*harness.PACKAGES, "torch", "matfree", "curvlinops-for-pytorch", "pyhessian"),
        json_file=options.json,
    )
    for name, (setting, solve, left) in tuned.items():
        details = f"{setting}, residual {left:.1e}, largest {max(solve().values):.5f}"
        print(f"{name}: {1000 * float(np.median(timings[name].wall)):.1f} ms, {details}")


def counted(solve: Callable[[], Any], calls: int = 1) -> harness.Contender:
    """Return the contender that calls `solve` several times."""

    def run() -> float:
        for _ in range(calls):
            jax.block_until_ready(solve())
        return calls

    return run


def products(options: argparse.Namespace) -> None:
    """Compare products with the gradient for each model."""
    p = problem()
    wide = gf.mlp([784, 256, 256, 10], "relu")
    task = task_of(CONFIG, 12)
    gpt, tokens = gf.gpt(CONFIG), (jnp.asarray(task.tokens), jnp.asarray(task.targets))
    models = {
        "784-16-10, batch 1,024": (NET, gf.classification_loss(NET), p.params, (p.images, p.labels)),
        "784-256-256-10, batch 64": (
            wide,
            gf.classification_loss(wide),
            wide.init(jax.random.key(0)),
            (p.images[:64], p.labels[:64]),
        ),
        "GPT (4 layers, 128 wide, 64 tokens), batch 12": (gpt, gf.next_token_loss(gpt), task.start, tokens),
    }
    for title, (net, loss, params, batch) in models.items():
        mean = gf.batch_mean(loss)
        flat, unravel = ravel_pytree(params)
        vector = unravel(jax.random.normal(jax.random.key(1), flat.shape))
        ways = {
            "gradient": jax.jit(lambda params, vector, batch, mean=mean: jax.grad(mean)(params, batch)),
            "hvp": jax.jit(gf.curvature.hvp(mean)),
            "ggn_vp": jax.jit(gf.curvature.ggn_vp(net.apply)),
            "fisher_vp": jax.jit(gf.curvature.fisher_vp(loss)),
        }
        calls = 1 if net is gpt else 20
        ready = {name: counted(partial(way, params, vector, batch), calls) for name, way in ways.items()}
        timings = harness.race(ready, options.rounds)
        harness.report(title, timings, "gradient", "calls", json_file=options.json)
        walls = {name: np.array(timing.wall) for name, timing in timings.items()}
        print(
            "relative to one gradient:",
            ", ".join(
                f"{n} {np.median(w / walls['gradient']):.2f}" for n, w in walls.items() if n != "gradient"
            ),
        )


def main() -> None:
    """Run the comparisons."""
    parser = harness.arguments(__doc__.partition("\n")[0], rounds=21)
    parser.add_argument("--only", choices=("products", "eigenvalues"))
    options = parser.parse_args()
    if options.only != "eigenvalues":
        products(options)
    if options.only != "products":
        eigenvalues(options)


if __name__ == "__main__":
    main()
