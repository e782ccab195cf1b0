"""Costs by site: FLOPs against formulas and XLA, saved bytes against what `jax.vjp` keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf
from gradfn.inspection.picture import edges
from gradfn.jaxpr import find_sites, trace_as_written
from gradfn.jaxpr.costs import costs


def of(f, *args):
    program = trace_as_written(f, *args)
    return costs(program, find_sites(program))


def kept(f, params, *rest):
    """The bytes that `jax.vjp` keeps when the function is compiled."""
    _, pullback = jax.vjp(jax.jit(lambda params: f(params, *rest)), params)
    return sum(leaf.nbytes for leaf in jax.tree.leaves(pullback))


def nets():
    mlp = gf.mlp([64, 128, 10], activation="tanh")
    yield "mlp", mlp, lambda p, x: jnp.mean(jax.vmap(mlp.apply, (None, 0))(p, x)), jnp.ones((16, 64))
    for scan in (False, True):
        config = gf.GPTConfig(vocab=17, context=8, n_layers=2, n_heads=2, width=16, scan=scan)
        gpt = gf.gpt(config)
        yield f"gpt, scan={scan}", gpt, gpt.apply, jnp.arange(8)


NETS = {name: (net, f, x) for name, net, f, x in nets()}


@pytest.mark.parametrize("name", NETS)
def test_sums_are_those_of_xla_and_of_jax(name):
    net, f, x = NETS[name]
    params = net.init(jax.random.key(0))
    cost = of(f, params, x)
    compiled = jax.jit(f).lower(params, x).compile()
    np.testing.assert_allclose(sum(cost.flops.values()), compiled.cost_analysis()["flops"], rtol=0.05)
    assert sum(cost.saved.values()) == kept(f, params, x)
    assert not cost.notes


def test_each_equation_counts_to_the_site_that_it_leads_to():
    def f(params, x):
        h = gf.tap(jnp.exp(x @ params["W"]), "h")
        return jnp.sum(gf.tap(h @ params["V"], "y"))

    params = {"W": jnp.ones((4, 8)), "V": jnp.ones((8, 3))}
    cost = of(f, params, jnp.ones((2, 4)))
    # The product W is a site; the exponential leads to h, the second product to y, the sum to the result.
    assert cost.flops == {"W": 2 * 2 * 4 * 8, "h": 2 * 8, "y": 2 * 2 * 8 * 3, "": 2 * 3}
    # exp keeps its result, which V's gradient needs as well; x and V are arguments.
    assert cost.saved["W"] == cost.saved["y"] == cost.saved[""] == 0
    assert cost.saved["h"] >= 4 * 16
    assert cost.saved["inputs"] == 4 * (8 + 24)
    assert sum(cost.saved.values()) == kept(f, params, jnp.ones((2, 4)))


def test_loops_branches_and_custom_rules():
    W = jnp.ones((4, 4))

    def scanned(W, x):
        return jnp.sum(jax.lax.scan(lambda c, _: (gf.tap(jnp.tanh(W @ c), "c"), None), x, length=5)[0])

    cost = of(scanned, W, jnp.ones(4))
    assert cost.flops == {"params": 5 * 2 * 16, "c": 5 * 4, "": 4}
    assert sum(cost.saved.values()) == kept(scanned, W, jnp.ones(4))

    def branching(W, x):
        return jnp.sum(jax.lax.cond(x[0] > 0, lambda: W @ x, lambda: x))

    # Of the branches, the one that costs most; also the comparison and the sum.
    assert sum(of(branching, W, jnp.ones(4)).flops.values()) == 2 * 16 + 1 + 4

    def repeated(W, x):
        return jnp.sum(jax.lax.while_loop(lambda c: c[0] < 1e3, lambda c: W @ c, x))

    assert "FLOPs of a while loop are those of one iteration" in of(repeated, W, jnp.ones(4)).notes

    def with_rule(W, x):
        return jnp.sum(jax.nn.relu(W @ x))

    assert sum(of(with_rule, W, jnp.ones(4)).flops.values()) == 2 * 16 + 4 + 4
    fft = of(lambda W, x: jnp.sum(jnp.abs(jnp.fft.fft(W @ x))), W, jnp.ones(4))
    assert "FLOPs of fft are not counted" in fft.notes


def test_convolutions_and_what_is_not_used():
    def f(W, x):
        unused = jnp.sin(x) @ x.T
        out = jax.lax.conv_general_dilated(x[None, None], W, (1, 1), "VALID")
        return out, jnp.shape(unused)[0]

    # [2, 1, 3, 3] kernels on 8 x 8: 36 positions.
    assert sum(of(f, jnp.ones((2, 1, 3, 3)), jnp.ones((8, 8))).flops.values()) == 2 * 36 * 2 * 9


def test_a_function_without_gradients_has_no_saved_bytes():
    cost = of(lambda x: jnp.argmax(gf.tap(x * 2, "a")), jnp.ones(3))
    assert cost.saved == {}
    assert cost.flops["a"] == 3


def test_a_function_that_jax_cannot_differentiate_has_flops():
    def f(W, x):
        return jax.pure_callback(np.sin, jax.ShapeDtypeStruct((3,), jnp.float32), gf.tap(W * x, "a"))

    cost = of(f, jnp.ones(3), jnp.ones(3))
    assert cost.flops["a"] == 3
    assert cost.saved == {}
    assert any(note.startswith("saved: unknown, the function has no derivative") for note in cost.notes)


def test_edges_lead_from_site_to_site():
    def f(W, x):
        a = gf.tap(x + 1, "a")
        b = gf.tap(jnp.sin(a), "b")
        return gf.tap(a + b, "c")

    program = trace_as_written(f, jnp.ones(2), jnp.ones(2))
    names = {k: site.name for k, site in enumerate(find_sites(program))} | {-1: "data", -2: "result"}
    found = {(names[a], names[b]) for a, b in edges(program, find_sites(program))}
    assert found == {("data", "a"), ("a", "b"), ("a", "c"), ("b", "c"), ("c", "result")}


def test_a_scan_returns_what_its_last_iteration_computes():
    def f(W, x):
        x = gf.tap(x + 1, "start")
        x, _ = jax.lax.scan(lambda c, _: (gf.tap(jnp.sin(c), "c"), None), x, length=3)
        return gf.tap(x * 2, "end")

    program = trace_as_written(f, jnp.ones(2), jnp.ones(2))
    names = {k: site.name for k, site in enumerate(find_sites(program))} | {-1: "data", -2: "result"}
    found = {(names[a], names[b]) for a, b in edges(program, find_sites(program))}
    assert found == {("data", "start"), ("start", "c"), ("c", "c"), ("c", "end"), ("end", "result")}
