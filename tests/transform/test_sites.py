"""Sites: the three sources, their names, selection."""

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import checkpoint_name

import gradfn as gf
from gradfn.transform import find_sites, parameter_order, parameter_uses, select, trace, trace_as_written

X = jnp.ones((2, 3))
W = jnp.ones((3, 3))


def names(f, *args):
    return [site.name for site in find_sites(trace(f, *args))]


def test_parameters_name_the_places_where_they_meet_data():
    def f(p, x):
        h = jax.nn.sigmoid(x @ p["W1"] + p["b1"][None])
        w2 = (2.0 * p["W2"]).astype(jnp.float32).T  # still a parameter
        return jnp.sum(jax.nn.silu(h @ w2)) + 1e-3 * jnp.sum(p["W1"] ** 2)

    p = {"W1": W, "b1": jnp.ones(3), "W2": W}
    found = find_sites(trace(f, p, X))
    assert [s.name for s in found] == ["W1", "b1", "b1:sigmoid", "W2", "W2:silu"]
    assert [s.source for s in found] == ["parameter"] * 5
    assert [s.kind for s in found] == ["", "", "sigmoid", "", "silu"]
    uses = parameter_uses(trace(f, p, X))  # leaves in the tree's order: W1, W2, b1
    assert [sorted(u.leaves) for u in uses] == [[0], [2], [1], [0]]  # the last is the penalty


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (jax.nn.relu, "relu"),
        (lambda z: jnp.maximum(z, 0.0), "relu"),
        (jnp.tanh, "tanh"),
        (lambda z: 1.0 / (1.0 + jnp.exp(-z)), "sigmoid"),
        (jax.nn.sigmoid, "sigmoid"),
        (jax.nn.silu, "silu"),
    ],
)
def test_activation_functions_are_recognised(function, kind):
    found = find_sites(trace(lambda w, x: jnp.sum(function(x @ w)), W, X))
    assert (found[-1].name, found[-1].kind) == (f"params:{kind}", kind)


def test_a_value_with_several_names_is_listed_once_under_the_users():
    def f(p, x):
        with jax.named_scope("layer"):
            z = x @ p["W"]
        return jnp.sum(checkpoint_name(jnp.tanh(checkpoint_name(z, "z")), "a"))

    found = find_sites(trace(f, {"W": W}, X))
    assert [(s.name, s.source, s.kind) for s in found] == [("z", "name", ""), ("a", "name", "tanh")]


def test_scopes_give_what_leaves_them():
    def f(p, x):
        with jax.named_scope("encoder"):
            with jax.named_scope("dense"):
                inner = jnp.sin(x) * 2.0
            h = inner @ p["W"]
        return jnp.sum(jax.vmap(jnp.cos)(h))

    assert names(f, {"W": W}, X) == ["encoder/dense", "encoder"]
    assert names(jax.vmap(f, in_axes=(None, 0)), {"W": W}, X[:, None]) == ["encoder/dense", "encoder"]
    assert names(jax.jit(f), {"W": W}, X) == ["encoder/dense", "encoder"]


def test_repeated_names_take_their_scope_or_a_number():
    def twice(w, x):
        return checkpoint_name(checkpoint_name(jnp.sin(x * 2), "h") * 2, "h").sum()

    def scoped(w, x):
        for name in ("first", "second"):
            with jax.named_scope(name):
                x = checkpoint_name(jnp.sin(x), "h")
        return x.sum()

    def tied(w, x):
        return ((x @ w) @ w).sum()

    assert names(twice, W, X) == ["h", "h.1"]
    assert names(scoped, W, X) == ["first/h", "second/h"]
    assert names(tied, W, X) == ["params", "params.1"]


def test_parameters_stay_recognised_through_containers():
    def layer(h, w):
        return jax.checkpoint(lambda h, w: jnp.tanh(h @ w))(h, w), None

    def f(p, x):
        h, _ = jax.lax.scan(layer, x, p["blocks"])
        return jax.lax.cond(h[0, 0] > 0, lambda h: (h @ p["W"]).sum(), lambda h: h.sum(), h)

    found = find_sites(trace(f, {"blocks": jnp.stack([W] * 4), "W": W}, X))
    assert [(s.name, s.axes) for s in found] == [("blocks", (4,)), ("blocks:tanh", (4,)), ("W", ())]


def test_a_parameter_that_starts_a_recurrence_is_a_use():
    def f(p, x):
        h, _ = jax.lax.scan(lambda h, x: (jnp.tanh(h + x), None), p["h0"], x)
        return h.sum()

    program = trace(f, {"h0": jnp.ones(3)}, X)
    assert [(u.path, u.operand) for u in parameter_uses(program)] == [((0,), 0)]
    assert names(f, {"h0": jnp.ones(3)}, X) == []


def test_data_closed_over_is_data():
    assert names(lambda p: jnp.sum(X @ p["W"]), {"W": W}) == ["W"]


def test_integers_and_values_in_while_loops_have_no_gradient():
    def f(w, x):
        best = checkpoint_name(jnp.argmax(x @ w, -1), "best")
        y = jax.lax.while_loop(lambda y: y[0, 0] < 9, lambda y: checkpoint_name(y * 2, "doubled"), x)
        return best.sum().astype(y.dtype) + y.sum()

    found = {s.name: s for s in find_sites(trace(f, W, X))}
    assert not found["best"].differentiable
    assert not found["doubled"].differentiable
    assert found["params"].differentiable


def test_selection_by_name_glob_list_and_function():
    found = find_sites(trace(lambda p, x: jnp.sum(jnp.tanh(x @ p["Wa"]) @ p["Wb"]), {"Wa": W, "Wb": W}, X))
    assert [s.name for s in select(found, "Wa")] == ["Wa"]
    assert [s.name for s in select(found, "W?")] == ["Wa", "Wb"]
    assert [s.name for s in select(found, ["*:tanh", "Wb"])] == ["Wa:tanh", "Wb"]
    assert [s.name for s in select(found, lambda s: s.kind == "tanh")] == ["Wa:tanh"]
    assert select(found, None) == found
    with pytest.raises(ValueError, match=r"no site 'Wc'\. Near: .*Wb"):
        select(found, "Wc")
    with pytest.raises(ValueError, match=r"no site '\?\?\?'\. There are: Wa, Wa:tanh, Wb"):
        select(found, "???")
    with pytest.raises(ValueError, match="it has none"):
        select([], "a1")


def test_parameters_in_the_order_of_use():
    """By hand: tied weights at their first use, those inside a loop at the loop's, and one that nothing uses not."""

    def loss(params, x):
        h = x @ params["z"]

        def layer(h, w):
            return jnp.tanh(h @ w), None

        h, _ = jax.lax.scan(layer, h, params["layers"])
        h = h + params["a"][None]
        return jnp.sum(h @ params["z"].T)

    params = {name: jnp.ones(3) for name in ("a", "unused")}
    params |= {"layers": jnp.ones([2, 3, 3]), "z": jnp.ones([3, 3])}
    program = trace_as_written(loss, params, jnp.ones([2, 3]))
    assert parameter_order(program) == ("z", "layers", "a")
    assert gf.inspect(loss)(params, jnp.ones([2, 3])).to_dict()["param_order"] == ["z", "layers", "a"]
