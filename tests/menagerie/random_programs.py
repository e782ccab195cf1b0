"""Random programs over the primitives of `jax.lax`, each determined by its seed.

A program is a chain of operations on matrices `[N, N]`. Most operations take a parameter; some contain a shorter
program of their own: loops, branches, checkpoints, functions with derivative rules. All are scaled such that values
stay near 1. Kinks and steps are not at zero, which padding produces.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.menagerie.check import Case

N = 4


def program(seed):
    """Return the case of a seed."""
    rng = np.random.default_rng(seed)
    length = int(rng.integers(3, 7))
    plan = _plan(rng, length, depth=2)
    params = {
        f"p{k}": jnp.asarray(0.6 * np.random.default_rng([seed, k]).normal(size=(N, N)))
        for k in range(_count(plan))
    }

    def f(params, x):
        return _run(plan, iter(params[f"p{k}"] for k in range(len(params))), x)

    xs = jnp.asarray(np.random.default_rng([seed, 99]).normal(size=(3, N, N)))
    return Case(f"random {seed}: {_text(plan)}", f, params, xs)


def _plan(rng, length, depth):
    """Return the operations: `(name, plans of the programs inside)`."""
    plan = []
    for _ in range(length):
        if depth and rng.random() < 0.3:
            name = str(rng.choice(list(NESTED)))
            inner = [_plan(rng, int(rng.integers(1, 4)), depth - 1) for _ in range(NESTED[name][1])]
        else:
            name, inner = str(rng.choice(list(PLAIN))), []
        plan.append((name, inner))
    return plan


def _count(plan):
    return sum(1 + sum(map(_count, inner)) for _, inner in plan)


def _text(plan):
    return " ".join(name + "".join(f"({_text(p)})" for p in inner) for name, inner in plan)


def _run(plan, params, x):
    for name, inner in plan:
        own = next(params)
        if name in PLAIN:
            x = PLAIN[name](own, x)
        else:
            parts = [[next(params) for _ in range(_count(p))] for p in inner]
            functions = [lambda ps, x, p=p: _run(p, iter(ps), x) for p in inner]
            x = NESTED[name][0](own, x, *zip(functions, parts))
    return x


# --- Operations without a program inside: (parameter [N, N], x [N, N]) -> [N, N] -------------------------------------


def _spd(x):
    """Return a positive definite matrix."""
    return x @ x.T / N + jnp.eye(N)


def _gap(x):
    """Return a symmetric matrix whose eigenvalues are apart."""
    return (x + x.T) / 8 + jnp.diag(jnp.arange(1.0, N + 1))


def _conv(p, x):
    kernel = p[:3, :2].reshape(3, 2, 1, 1)  # [N, N] -> [3, 2, in 1, out 1]
    image = x.reshape(1, N, N, 1)  # [N, N] -> [1, N, N, 1]
    return lax.conv_general_dilated(
        image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    ).reshape(N, N)  # [1, N, N, 1] -> [N, N]


def _conv_1d(p, x):
    kernel = p[:3].reshape(3, N, 1)[:, :2]  # [3, N] -> [3, 2 in a group, out 1]
    kernel = jnp.concatenate([kernel, -kernel[::-1]], 2)
    return lax.conv_general_dilated(
        x[None], jnp.tile(kernel, (1, 1, 2)), (1,), [(2, 2)], rhs_dilation=(2,),
        dimension_numbers=("NHC", "HIO", "NHC"), feature_group_count=2,
    )[0]  # fmt: skip


def _conv_transposed(p, x):
    kernel = p[:2].reshape(2, 1, N) * jnp.ones((2, N, 1))  # [2, N] -> [2, in N, out N]
    return lax.conv_transpose(x[None], kernel, (2,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"))[0, ::2]


def _gather(p, x):
    rows = jnp.array([2, 0, 3, 0])
    return x[rows] + p[rows, rows[::-1]]


def _gather_by_value(p, x):
    rows = jnp.argsort(lax.stop_gradient(x[:, 0] + p[1]))
    return p[rows] + 0.5 * jnp.take_along_axis(x, rows[:, None], 0)


def _scatter(p, x):
    return x.at[jnp.array([1, 3])].set(jnp.sin(p[:2]))


def _scatter_add(p, x):
    return x.at[jnp.array([1, 3, 1])].add(p[:3])


def _scatter_mul(p, x):
    return x.at[jnp.array([0, 2])].multiply(p[:2], unique_indices=True)


def _scatter_max(p, x):
    return x.at[jnp.array([0, 2])].max(p[:2])


def _dynamic_slice(p, x):
    start = jnp.sum(x > 0.11) % 3
    return x * lax.dynamic_slice(p, (start, 0), (1, N))


def _dynamic_update(p, x):
    start = jnp.argmax(x[0] + p[2])
    return lax.dynamic_update_slice(x, p[:1], (start, 0))


def _sort(p, x):
    return jnp.sort(x + p, axis=0)


def _sort_pairs(p, x):
    keys, others = lax.sort((x + p, p), dimension=1, num_keys=1)
    return keys * others


def _top_k(p, x):
    return lax.top_k(x + p, 2)[0].repeat(2, 1)


def _lstsq(p, x):
    return jnp.linalg.solve(_spd(p), x)


def _cholesky(p, x):
    return jnp.linalg.cholesky(_spd(x + p))


def _triangular(p, x):
    return lax.linalg.triangular_solve(jnp.tril(p) * 0.3 + jnp.eye(N) * 2, x, left_side=True, lower=True)


def _qr(p, x):
    q, r = jnp.linalg.qr(_gap(x) + 0.1 * p)
    return q + 0.2 * r


def _eigh(p, x):
    values, vectors = jnp.linalg.eigh(_gap(x + p))
    return jnp.square(vectors) * values


def _svd(p, x):
    return jnp.ones((N, N)) * jnp.linalg.svd(_gap(x) + 0.1 * p, compute_uv=False)


def _det(p, x):
    sign, log = jnp.linalg.slogdet(_spd(x))
    return p * log * sign + x


def _inverse(p, x):
    return jnp.linalg.inv(_spd(p)) @ x


def _fft(p, x):
    return jnp.fft.ifft2(jnp.fft.fft2(x) * jnp.fft.fft2(p)).real * 0.3


def _rfft(p, x):
    return jnp.fft.irfft(jnp.fft.rfft(x) * (1 + p[:, :3]), n=N)


def _complex(p, x):
    z = lax.complex(x, p)
    return jnp.abs(jnp.exp(0.3 * z) * jnp.conj(z) + 0.1j) + jnp.angle(z + 3.0)


def _complex_product(p, x):
    z = lax.complex(p, x) @ lax.complex(x, -p)
    return 0.2 * (z.imag + z.real)


def _window_sum(p, x):
    return lax.reduce_window(x * p, 0.0, lax.add, (2, 2), (1, 1), "SAME")


def _window_max(p, x):
    return lax.reduce_window(x + p, -jnp.inf, lax.max, (2, 3), (1, 1), "SAME") * p


def _window_strided(p, x):
    return lax.reduce_window(x + p, -jnp.inf, lax.max, (2, 2), (2, 2), "VALID").repeat(2, 0).repeat(2, 1)


def _associative(p, x):
    def join(a, b):
        return a[0] * b[0], b[0] * a[1] + b[1]

    return lax.associative_scan(join, (jax.nn.sigmoid(p), x))[1]


def _pad(p, x):
    return lax.pad(x, 0.5, ((1, -1, 0), (0, 2, 0)))[:, :N] * p


def _dilate(p, x):
    return lax.pad(x[:2] * p[0], jnp.sum(p), ((0, 1, 1), (0, 0, 0)))


def _batched_dot(p, x):
    a = x.reshape(2, 2, N)  # [N, N] -> [2, 2, N]
    b = p.reshape(2, 2, N)  # [N, N] -> [2, 2, N]
    out = lax.dot_general(a, b, (((2,), (2,)), ((0,), (0,))))
    return out.reshape(2, 2, 2, 1).repeat(2, 3).reshape(N, N) * 0.5  # [2, 2, 2] -> [N, N]


def _one_hot(p, x):
    codes = jax.nn.one_hot(jnp.argmax(x + p, 1), N, dtype=x.dtype)
    return codes @ p + 0.5 * x


def _integers(p, x):
    n = jnp.floor(3 * x + 0.37).astype(jnp.int32)
    bits = lax.population_count(n) + (n >> 1) + (n ^ 5) % 3 - lax.clz(n) // 16
    return x + p * bits.astype(x.dtype) * 0.1


def _argsorted(p, x):
    order = jnp.argsort(x + p, axis=1)
    return jnp.take_along_axis(p, order, 1) + 0.3 * x


def _where(p, x):
    return jnp.where(x > p, jnp.sin(x), p * x)


def _select(p, x):
    which = jnp.clip(jnp.floor(x + 0.37).astype(jnp.int32), 0, 2)
    return lax.select_n(which, x, p, x * p)


def _clamp(p, x):
    return lax.clamp(-1.0, x, 1.0) + 0.1 * lax.clamp(p - 1, x, p + 1)


def _narrow_sum(p, x):
    """A cast to float64 and back is the identity, in two operations."""
    return lax.convert_element_type(lax.convert_element_type(x * p, jnp.complex128).real, jnp.float64)


def _random(p, x):
    noise = jax.random.normal(jax.random.key(3), (N, N), x.dtype)
    return x + 0.3 * p * noise


def _dropout(p, x):
    kept = jax.random.bernoulli(jax.random.fold_in(jax.random.key(1), 2), 0.6, (N, N))
    return jnp.where(kept, x / 0.6, 0.0) @ p


def _while(p, x):
    """The number of iterations depends on the data; what they compute does not."""
    n = jnp.sum(x > 0.11)
    count, total = lax.while_loop(lambda s: s[0] < n, lambda s: (s[0] + 1, s[1] * 0.5 + 1.0), (0, 0.0))
    return x * p * total + count.astype(x.dtype) * 0.01


def _attention(p, x):
    scores = (x @ p) @ x.T / 2
    mask = jnp.tril(jnp.ones((N, N), bool))
    return jax.nn.softmax(jnp.where(mask, scores, -jnp.inf)) @ x


def _norm(p, x):
    centered = x - jnp.mean(x, 1, keepdims=True)
    return centered * lax.rsqrt(jnp.var(x, 1, keepdims=True) + 1e-3) * p[0] + p[1]


PLAIN = {
    "matmul": lambda p, x: x @ p,
    "matmul_left": lambda p, x: p.T @ x,
    "einsum": lambda p, x: 0.5 * jnp.einsum("ij,kj,kl->il", x, p, p),
    "outer": lambda p, x: 0.5 * jnp.tensordot(p[0], x[:, 0], 0),
    "bias": lambda p, x: x + p[0],
    "gain": lambda p, x: x * p[:, :1],
    "scalar": lambda p, x: x * p[0, 0] + p[1, 1],
    "sub": lambda p, x: p - x,
    "div": lambda p, x: x / (1 + p * p),
    "div_by_x": lambda p, x: p / (1 + x * x),
    "pow": lambda p, x: (1 + x * x) ** p * 0.5,
    "integer_pow": lambda p, x: 0.2 * x**3 + p**2,
    "sin": lambda p, x: jnp.sin(x) * p,
    "cos": lambda p, x: jnp.cos(x + p),
    "tan": lambda p, x: jnp.tan(0.3 * jnp.tanh(x)) + p,
    "tanh": lambda p, x: jnp.tanh(x * p),
    "exp": lambda p, x: jnp.exp(-x * x) * p,
    "expm1": lambda p, x: jnp.expm1(jnp.tanh(x)) + p,
    "log": lambda p, x: jnp.log(1.5 + x * x) * p,
    "log1p": lambda p, x: jnp.log1p(x * x + p * p),
    "sqrt": lambda p, x: jnp.sqrt(1 + x * x) - p,
    "rsqrt": lambda p, x: lax.rsqrt(1 + x * x) + p,
    "cbrt": lambda p, x: jnp.cbrt(2 + x * x) * p,
    "logistic": lambda p, x: lax.logistic(x) * p,
    "erf": lambda p, x: lax.erf(x) + p,
    "erf_inv": lambda p, x: lax.erf_inv(0.8 * jnp.tanh(x)) * p,
    "lgamma": lambda p, x: lax.lgamma(2 + x * x) * 0.3 + p,
    "digamma": lambda p, x: lax.digamma(2 + x * x) * p,
    "bessel": lambda p, x: lax.bessel_i1e(x) + p,
    "atan2": lambda p, x: jnp.arctan2(x, 2 + p * p),
    "asinh": lambda p, x: jnp.arcsinh(x) * p,
    "acos": lambda p, x: jnp.arccos(0.8 * jnp.tanh(x)) * p,
    "sinh": lambda p, x: 0.5 * jnp.sinh(jnp.tanh(x)) + jnp.cosh(0.5 * p),
    "atanh": lambda p, x: jnp.arctanh(0.7 * jnp.tanh(x)) - p,
    "abs": lambda p, x: jnp.abs(x + p),
    "sign": lambda p, x: jnp.sign(x + 0.21) * p + 0.5 * x,
    "max": lambda p, x: jnp.maximum(x, p),
    "min": lambda p, x: jnp.minimum(x, p),
    "relu": lambda p, x: jax.nn.relu(x + p),
    "gelu": lambda p, x: jax.nn.gelu(x @ p),
    "silu": lambda p, x: jax.nn.silu(x) * p,
    "floor": lambda p, x: jnp.floor(2 * x + 0.37) * p * 0.3 + x,
    "rem": lambda p, x: lax.rem(x + 0.21, 1.3 + 0 * x) + p,
    "square": lambda p, x: 0.3 * jnp.square(x) + p,
    "logaddexp": lambda p, x: jnp.logaddexp(x, p),
    "reduce_sum": lambda p, x: p * jnp.sum(x, 0) * 0.4,
    "reduce_max": lambda p, x: p * jnp.max(x + p, 1, keepdims=True),
    "reduce_prod": lambda p, x: p + 0.2 * jnp.prod(jnp.tanh(x), 0),
    "mean": lambda p, x: p * jnp.mean(x),
    "logsumexp": lambda p, x: x - jax.nn.logsumexp(x + p, axis=0),
    "softmax": lambda p, x: jax.nn.softmax(x + p, axis=0),
    "var": lambda p, x: p * jnp.std(x, 0) + x,
    "cumsum": lambda p, x: 0.5 * jnp.cumsum(x * p, 0),
    "cumsum_reverse": lambda p, x: 0.5 * lax.cumsum(x + p, 1, reverse=True),
    "cumprod": lambda p, x: jnp.cumprod(jnp.tanh(x) + 0.5, 1) * p,
    "cummax": lambda p, x: lax.cummax(x + p, 0),
    "cumlogsumexp": lambda p, x: 0.4 * lax.cumlogsumexp(x + p, 0),
    "concatenate": lambda p, x: jnp.concatenate([x[:1], p[1:3], jnp.sin(x[3:])]),
    "transpose": lambda p, x: x.T * p,
    "reshape": lambda p, x: (x.reshape(2, 8) + p.reshape(2, 8)).reshape(N, N),  # [N, N] -> [2, 8] -> [N, N]
    "rev": lambda p, x: x[::-1] * p,
    "roll": lambda p, x: jnp.roll(x, 1, 1) + p,
    "slice": lambda p, x: jnp.concatenate([x[2:], x[:2]]) * p[::-1],
    "stride": lambda p, x: x[::2].repeat(2, 0) + p,
    "broadcast": lambda p, x: jnp.broadcast_to(x[1], (N, N)) * p,
    "split": lambda p, x: jnp.concatenate([jnp.sin(part) for part in jnp.split(x * p, 2, 1)], 1),
    "stack": lambda p, x: jnp.sum(jnp.stack([x, p, x * p]), 0) * 0.5,
    "tril": lambda p, x: jnp.tril(x) @ jnp.triu(p),
    "kron": lambda p, x: jnp.kron(x[:2, :2], p[:2, :2]),
    "vmap": lambda p, x: jax.vmap(lambda row, q: jnp.tanh(q * jnp.sum(row)) + row)(x, p),
    "vmap_matmul": lambda p, x: jax.vmap(lambda row: p @ row)(x),
    "cross": lambda p, x: jnp.pad(jnp.cross(x[:, :3], p[:, :3]), ((0, 0), (0, 1))) * 0.5,
    "poly": lambda p, x: 0.2 * jnp.polyval(p[0], jnp.tanh(x)),
    "stop": lambda p, x: x * p + jnp.round(lax.stop_gradient(jnp.sign(x + 0.21))),
    "conv": _conv, "conv_1d": _conv_1d, "conv_transposed": _conv_transposed,
    "gather": _gather, "gather_by_value": _gather_by_value, "scatter": _scatter,
    "scatter_add": _scatter_add, "scatter_mul": _scatter_mul, "scatter_max": _scatter_max,
    "dynamic_slice": _dynamic_slice, "dynamic_update": _dynamic_update,
    "sort": _sort, "sort_pairs": _sort_pairs, "top_k": _top_k, "solve": _lstsq, "cholesky": _cholesky,
    "triangular": _triangular, "qr": _qr, "eigh": _eigh, "svd": _svd, "slogdet": _det, "inv": _inverse,
    "fft": _fft, "rfft": _rfft, "complex": _complex, "complex_product": _complex_product,
    "window_sum": _window_sum, "window_max": _window_max, "window_strided": _window_strided,
    "associative_scan": _associative, "pad": _pad, "dilate": _dilate, "batched_dot": _batched_dot,
    "one_hot": _one_hot, "integers": _integers, "argsort": _argsorted, "where": _where, "select": _select,
    "clamp": _clamp, "convert": _narrow_sum, "random": _random, "dropout": _dropout, "while": _while,
    "attention": _attention, "norm": _norm,
}  # fmt: skip


# --- Operations with programs inside: (parameter, x, (program, its parameters), ...) -> [N, N] -----------------------


def _scan(p, x, inner):
    f, ps = inner

    def step(carry, row):
        y = jnp.tanh(f(ps, carry))
        return y + 0.2 * row, jnp.sum(y) * row

    last, rows = lax.scan(step, x, p)
    return last + 0.2 * rows


def _scan_params(p, x, inner):
    """Parameters with the layers in front."""
    f, ps = inner
    stacked = [jnp.stack([q, 0.5 * q, q + p]) for q in ps]
    return lax.scan(lambda x, ps: (x + 0.5 * jnp.tanh(f(ps, x)), ()), x, stacked)[0]


def _scan_reverse(p, x, inner):
    f, ps = inner
    return lax.scan(lambda c, row: (jnp.tanh(f(ps, c * row)), c[0]), x, p, reverse=True)[1]


def _scan_unrolled(p, x, inner):
    f, ps = inner
    return lax.scan(lambda c, row: (jnp.tanh(f(ps, c)) + row, ()), x, p, unroll=2)[0]


def _fori(p, x, inner):
    f, ps = inner
    return lax.fori_loop(0, 2, lambda i, c: jnp.tanh(f(ps, c) + p * i.astype(c.dtype)), x)


def _nested_scan(p, x, inner):
    f, ps = inner

    def outer(c, row):
        c, ys = lax.scan(lambda c, q: (jnp.tanh(f(ps, c)) * q, jnp.sum(c)), c, row[:2])
        return c + 0.1 * row, jnp.sum(ys)

    c, total = lax.scan(outer, x, p[:2])
    return c + 0.1 * jnp.sum(total)


def _cond(p, x, a, b):
    return lax.cond(jnp.sum(x) > 0.123, lambda x: a[0](a[1], x), lambda x: b[0](b[1], x) * p, x)


def _switch(p, x, a, b, c):
    which = jnp.sum(x > 0.11) % 3
    return lax.switch(which, [lambda x, g=g: g[0](g[1], x) for g in (a, b, c)], x) + p


def _cond_in_scan(p, x, a, b):
    def step(c, row):
        y = lax.cond(jnp.sum(c) > row[0], lambda c: a[0](a[1], c), lambda c: b[0](b[1], c), c)
        return jnp.tanh(y) + row, ()

    return lax.scan(step, x, p)[0]


def _remat(p, x, inner):
    return jax.checkpoint(inner[0])(inner[1], x) * p


def _remat_policy(p, x, inner):
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return jax.checkpoint(lambda ps, x: jnp.sin(inner[0](ps, x) @ p), policy=policy)(inner[1], x)


def _remat_scan(p, x, inner):
    step = jax.checkpoint(lambda c, row: (jnp.tanh(inner[0](inner[1], c)) + row, ()))
    return lax.scan(step, x, p)[0]


def _jit(p, x, inner):
    return jax.jit(inner[0])(inner[1], x) + p


def _jit_twice(p, x, inner):
    g = jax.jit(inner[0])
    return g(inner[1], jnp.tanh(g(inner[1], x))) * p


def _named(p, x, inner):
    with jax.named_scope("block"):
        y = inner[0](inner[1], x)
    return y @ p


def _residual(p, x, inner):
    return x + 0.3 * inner[0](inner[1], x @ p)


def _parallel(p, x, a, b):
    return a[0](a[1], x) * jax.nn.sigmoid(b[0](b[1], x)) + p


def _same_params(p, x, inner):
    f, ps = inner
    return f(ps, jnp.tanh(f(ps, x))) @ p


def _vmap(p, x, inner):
    return jax.vmap(lambda s: inner[0](inner[1], x * s))(p[0]).mean(0)


def _vmap_params(p, x, inner):
    ps = [jnp.stack([q, q.T]) for q in inner[1]]
    return jnp.sum(jax.vmap(inner[0], (0, None))(ps, x), 0) * p


def _custom_jvp(p, x, inner):
    """A rule that is the derivative, written as another program."""
    f, ps = inner
    g = jax.custom_jvp(lambda ps, x, p: jnp.tanh(f(ps, x)) * p)

    @g.defjvp
    def rule(primals, tangents):
        (ps, x, p), (dps, dx, dp) = primals, tangents
        y, dy = jax.jvp(f, (ps, x), (dps, dx))
        t = jnp.tanh(y)
        return t * p, (1 - t * t) * dy * p + t * dp

    return g(ps, x, p)


def _custom_vjp(p, x, inner):
    f, ps = inner

    @jax.custom_vjp
    def g(ps, x, p):
        return jnp.sin(f(ps, x)) + p

    def forward(ps, x, p):
        y, back = jax.vjp(f, ps, x)
        return jnp.sin(y) + p, (y, back)

    def backward(kept, cotangent):
        y, back = kept
        return *back(cotangent * jnp.cos(y)), cotangent

    g.defvjp(forward, backward)
    return g(ps, x, p)


def _gradient(p, x, inner):
    """The gradient of a program is a part of the program."""
    slope = jax.grad(lambda x: jnp.sum(jnp.tanh(inner[0](inner[1], x)) * p))(x)
    return jnp.tanh(slope) + 0.3 * x


def _inner_step(p, x, inner):
    """One step of gradient descent on the parameters, as in meta-learning."""
    f, ps = inner
    slopes = jax.grad(lambda ps: jnp.mean(jnp.square(jnp.tanh(f(ps, x)) - p)))(ps)
    return jnp.tanh(f([q - 0.1 * s for q, s in zip(ps, slopes)], x))


def _jvp(p, x, inner):
    y, dy = jax.jvp(lambda x: jnp.tanh(inner[0](inner[1], x)), (x,), (p,))
    return y + jnp.tanh(dy)


def _linear_solve(p, x, inner):
    matrix = _spd(p)
    return lax.custom_linear_solve(
        lambda v: matrix @ v, jnp.tanh(inner[0](inner[1], x)),
        lambda _, b: jnp.linalg.solve(matrix, b), symmetric=True,
    )  # fmt: skip


def _map(p, x, inner):
    return jnp.mean(lax.map(lambda row: inner[0](inner[1], x * row), p), 0)


NESTED = {
    "scan": (_scan, 1), "scan_params": (_scan_params, 1), "scan_reverse": (_scan_reverse, 1),
    "scan_unrolled": (_scan_unrolled, 1), "fori": (_fori, 1), "nested_scan": (_nested_scan, 1),
    "cond": (_cond, 2), "switch": (_switch, 3), "cond_in_scan": (_cond_in_scan, 2), "remat": (_remat, 1),
    "remat_policy": (_remat_policy, 1), "remat_scan": (_remat_scan, 1), "jit": (_jit, 1),
    "jit_twice": (_jit_twice, 1), "named": (_named, 1), "residual": (_residual, 1),
    "parallel": (_parallel, 2), "same_params": (_same_params, 1), "vmap": (_vmap, 1),
    "vmap_params": (_vmap_params, 1), "custom_jvp": (_custom_jvp, 1), "custom_vjp": (_custom_vjp, 1),
    "gradient": (_gradient, 1), "inner_step": (_inner_step, 1), "jvp": (_jvp, 1),
    "linear_solve": (_linear_solve, 1), "map": (_map, 1),
}  # fmt: skip
