"""The picture of a program: its nodes, edges and widths, as a program that reads SVG finds them."""

import xml.etree.ElementTree as ET

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf

SVG = "{http://www.w3.org/2000/svg}"


def parts(picture):
    """The labels of the nodes, and the classes and widths of the edges."""
    root = ET.fromstring(picture)
    labels = [group.find(f"{SVG}text").text for group in root.iter(f"{SVG}g")]
    return labels, [(path.get("class"), float(path.get("stroke-width"))) for path in root.iter(f"{SVG}path")]


def f(W, x):
    a = gf.tap(W @ x, "a")
    b = gf.tap(0.01 * a, "b")
    return jnp.sum(gf.tap(b + jax.lax.stop_gradient(a), "c"))


def test_edges_are_as_wide_as_gradients_are_long():
    args = jnp.eye(3), jnp.ones(3)
    listed = gf.sites(f)(*args)
    labels, edges = parts(listed.svg(gf.inspect(f)(*args)))
    assert labels == ["data", "a", "b", "c", "result"]
    # From a to b the gradient has 0.01 of its later length; the edge of a around b carries a as well.
    widths = dict.fromkeys(width for kind, width in edges if kind == "flow")
    assert len(widths) == 2
    assert max(widths) > 3 * min(widths)
    assert {kind for kind, _ in parts(listed.svg())[1]} == {"plain"}


def test_a_gradient_that_is_nan_is_red():
    def loss(W, x):
        a = gf.tap(W * x, "a")
        return gf.tap(jnp.sqrt(a), "b").sum()

    args = jnp.zeros(3), jnp.ones(3)
    kinds = {kind for kind, _ in parts(gf.sites(loss)(*args).svg(gf.inspect(loss)(*args)))[1]}
    assert "bad" in kinds


def test_modules_are_folded_to_a_depth():
    net = gf.gpt(gf.GPTConfig(vocab=17, context=6, n_layers=2, n_heads=2, width=8))
    args = net.init(jax.random.key(0)), jnp.arange(6)
    listed = gf.sites(net.apply)(*args)
    shallow, _ = parts(listed.svg(depth=2))
    assert shallow[:5] == ["data", "embed", "embedded", "0", "1"]
    deep, edges = parts(listed.svg())
    assert {"attention", "residual_mid", "feed"} <= set(deep)
    assert len(deep) <= 46
    # Without an inspection, every edge is there, thin: also the four around attention and feed-forward layers.
    assert len(edges) >= len(deep) - 1 + 4
    assert "saved for the backward pass" in str(listed)


def test_an_iteration_leads_back_to_the_next():
    def loop(w, x):
        return jnp.sum(
            jax.lax.scan(lambda c, _: (gf.tap(jnp.sin(gf.tap(c * w, "a")), "b"), None), x, length=3)[0]
        )

    kinds = [kind for kind, _ in parts(gf.sites(loop)(jnp.ones(2), jnp.ones(2)).svg())[1]]
    assert kinds.count("plain back") == 1


def test_names_are_escaped_and_odd_programs_drawn():
    def odd(x):
        return gf.tap(x * 2, "<b>&\"'")

    labels, _ = parts(gf.sites(odd)(jnp.ones(2)).svg())
    assert "<b>&\"'" in labels
    assert parts(gf.sites(lambda x: x)(jnp.ones(2)).svg())[0] == ["result"]


def test_errors():
    args = jnp.eye(3), jnp.ones(3)
    listed = gf.sites(f)(*args)
    with pytest.raises(ValueError, match="no program: call svg on what"):
        gf.SiteList(listed).svg()
    with pytest.raises(ValueError, match="depth must be an integer >= 1, got 0"):
        listed.svg(depth=0)
    other = gf.inspect(lambda w, x: jnp.sum(gf.tap(w @ x, "other")))(*args)
    with pytest.raises(ValueError, match="inspection is of another function"):
        listed.svg(other)


def test_costs_of_sites_by_name():
    listed = gf.sites(f)(jnp.eye(3), jnp.ones(3))
    assert sum(listed.costs.flops.values()) == 2 * 9 + 3 + 3 + 3
    np.testing.assert_equal(set(listed.costs.flops), {*listed.names, ""})
    assert gf.SiteList(listed).costs.flops == {}
