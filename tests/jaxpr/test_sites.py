"""Sites: the three sources, their names, selection."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import gradfn as gf
from gradfn.inspection import inspect, patch, sites
from gradfn.jaxpr import find_sites, find_sites_and_order, parameter_uses, select, trace, trace_as_written

X = jnp.ones((2, 3))
W = jnp.ones((3, 3))


def names(f, *args):
    return [site.name for site in find_sites(trace(f, *args))]


def test_parameters_name_the_equations_where_they_meet_data():
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


def test_repeated_names_get_their_scope_or_a_number():
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
    with pytest.raises(ValueError, match=r"no site 'Wc'\. Did you mean .*Wb"):
        select(found, "Wc")
    with pytest.raises(ValueError, match=r"no site '\?\?\?'\. Sites: Wa, Wa:tanh, Wb"):
        select(found, "???")
    with pytest.raises(ValueError, match="has no sites"):
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
    assert find_sites_and_order(program)[1] == ("z", "layers", "a")
    assert gf.inspect(loss)(params, jnp.ones([2, 3])).to_dict()["param_order"] == ["z", "layers", "a"]


Z = jax.random.normal(jax.random.key(0), (5, 3))


def batch_norm(p, x):
    """A scope with three outputs in training, two of which are the new running statistics."""
    with jax.named_scope("norm"):
        mean, var = jnp.mean(x, 0), jnp.var(x, 0)
        state = {"mean": 0.9 * p["mean"] + 0.1 * mean, "var": 0.9 * p["var"] + 0.1 * var}
        out = (x - mean[None]) / jnp.sqrt(var + 1e-3)[None] * p["scale"][None]
    return out, state


NORM = {"scale": jnp.full(3, 1.5), "mean": jnp.zeros(3), "var": jnp.ones(3)}


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint])
def test_what_reaches_only_aux_is_not_a_site_of_the_loss(wrap):
    def loss(p, x):
        out, state = wrap(batch_norm)(p, x)
        return jnp.sum(jnp.sin(out)), state

    inspection = jax.jit(inspect(loss, keep=None, stats="rms"))(NORM, Z)
    assert [s.name for s in inspection.sites] == ["scale", "norm"] or [s.name for s in inspection.sites] == [
        "norm"
    ]
    out, _ = batch_norm(NORM, Z)
    np.testing.assert_allclose(inspection["norm"].value, out, rtol=1e-5)
    np.testing.assert_allclose(inspection["norm"].grad, jnp.cos(out), rtol=1e-4)
    assert float(patch(loss, {"norm": 0.5})(NORM, Z)[0]) == pytest.approx(15 * np.sin(0.5), rel=1e-5)


def test_of_a_function_that_is_no_loss_all_outputs_count_and_the_first_keeps_the_name():
    found = {s.name: s for s in sites(batch_norm)({"scale": NORM["scale"]} | NORM, Z)}
    assert found["norm"].shape == (5, 3)
    assert {"mean", "var"} <= set(found)  # the running statistics are among the parameters here

    def with_state(scale, state, x):
        return batch_norm({"scale": scale, **state}, x)

    found = {s.name: s.shape for s in sites(with_state)(NORM["scale"], NORM, Z)}
    assert found["norm"] == (5, 3)
    assert found["norm.1"] == found["norm.2"] == (3,)


def tapped_in_a_scan(x):
    def step(carry, x):
        a, b, c = carry  # a is computed from c one iteration later
        return (a + checkpoint_name(c, "late"), checkpoint_name(b * x, "aside"), x * c), a

    (_, b, _), ys = lax.scan(step, (x[0], x[0], x[0]), x)
    return jnp.sum(ys), b


def tapped_in_a_cond(x):
    def left(x):
        return checkpoint_name(x * 2, "used"), checkpoint_name(x * 3, "aside")

    used, aside = lax.cond(x[0, 0] > 0, left, lambda x: (x, x), x)
    return jnp.sum(used), aside


def tapped_in_a_while(x):
    def body(state):
        i, x, y = state
        return (
            checkpoint_name(i + 1, "counter"),
            checkpoint_name(x * 0.5, "used"),
            checkpoint_name(y * i, "aside"),
        )

    _, used, aside = lax.while_loop(lambda s: s[0] < 3, body, (1.0, x, x))
    return jnp.sum(used), aside


def tapped_in_jit_and_remat(x):
    @jax.jit
    @jax.checkpoint
    def inner(x):
        return checkpoint_name(jnp.sin(x), "used"), checkpoint_name(x * 3, "aside")

    used, aside = inner(x)
    return jnp.sum(used), aside


def tapped_in_a_shard_map(x):
    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec()

    def local(x):
        return checkpoint_name(x * 2, "used"), checkpoint_name(x * 3, "aside")

    inner = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=(spec, spec), check_vma=False)
    used, aside = inner(x)
    return jnp.sum(used), aside


@pytest.mark.parametrize(
    "f",
    [
        tapped_in_a_scan,
        tapped_in_a_cond,
        tapped_in_a_while,
        tapped_in_jit_and_remat,
        tapped_in_a_shard_map,
    ],
)
def test_reachability_through_every_container_agrees_with_what_a_patch_changes(f):
    x = jnp.abs(Z)
    value, aux = f(x)
    found = find_sites(trace(f, x))
    assert {s.reaches for s in found} == {"result", "aux"}
    for site in found:
        patched, patched_aux = patch(f, {site.name: lambda v: 1.5 * v + 1.0})(x)
        assert (float(patched) != float(value)) == (site.reaches == "result")
        assert site.reaches == "result" or not np.allclose(patched_aux, aux)


def test_a_tap_that_reaches_only_aux_is_seen_and_has_no_gradient():
    def loss(w, x):
        h = jnp.tanh(x @ w)
        probe = checkpoint_name(h * 3, "probe")
        checkpoint_name(h * 4, "dropped")
        return jnp.sum(h), probe

    inspection = jax.jit(inspect(loss, keep=None, stats="rms"))(W, Z)
    np.testing.assert_allclose(inspection["probe"].value, 3 * jnp.tanh(Z @ W), rtol=1e-6)
    assert not np.any(inspection["probe"].grad)
    assert float(inspection.grad_stats["probe"].count) == 0
    listed = sites(loss)(W, Z)
    assert [s.reaches for s in listed] == ["result", "result", "aux", "nothing"]
    assert "probe: only aux is computed from it" in str(listed)
    assert "dropped: nothing is computed from it" in str(listed)
    with pytest.raises(ValueError, match="depends on site 'dropped'"):
        patch(loss, {"dropped": 0.0})(W, Z)
    assert not np.any(patch(loss, {"probe": 0.0})(W, Z)[1])


WRITTEN_OUT = {
    "gelu": lambda z: 0.5 * z * (1 + jnp.tanh(jnp.sqrt(2 / jnp.pi) * (z + 0.044715 * z**3))),
    "gelu_erf": lambda z: z * 0.5 * (1 + lax.erf(z / np.sqrt(2))),
    "silu": lambda z: z / (1 + jnp.exp(-z)),
    "softplus": lambda z: jnp.log1p(jnp.exp(z)),
    "log_sigmoid": lambda z: -jnp.logaddexp(0.0, -z),
    "leaky_relu": lambda z: jnp.where(z > 0, z, 0.2 * z),
    "elu": lambda z: jnp.where(z > 0, z, 1.5 * jnp.expm1(z)),
    "hard_tanh": lambda z: jnp.clip(z, -1.0, 1.0),
    "relu6": lambda z: jnp.minimum(jnp.maximum(z, 0.0), 6.0),
    "mish": lambda z: z * jnp.tanh(jnp.log1p(jnp.exp(z))),
    "softmax": lambda z: jnp.exp(z) / jnp.exp(z).sum(-1, keepdims=True),
    "softmax_over_rows": lambda z: jax.nn.softmax(z, axis=0),
    "log_softmax": lambda z: z - jax.nn.logsumexp(z, axis=-1, keepdims=True),
    "quick_gelu": lambda z: z * jax.nn.sigmoid(1.702 * z),
}
OF_JAX = [
    *("relu", "relu6", "sigmoid", "gelu", "silu", "elu", "selu", "celu", "leaky_relu", "softplus", "mish"),
    *("hard_tanh", "hard_sigmoid", "hard_silu", "squareplus", "softmax", "log_softmax", "log_sigmoid"),
    "soft_sign",
]
CASES = {name: getattr(jax.nn, name) for name in OF_JAX} | {
    f"{n}, by hand": f for n, f in WRITTEN_OUT.items()
}
KINDS = sorted([*OF_JAX, "quick_gelu"], key=len, reverse=True)
CASES["gelu, exact"] = lambda z: jax.nn.gelu(z, approximate=False)
CASES["celu, scaled"] = lambda z: jax.nn.celu(z, 0.5)
CASES["leaky_relu, slope"] = lambda z: jax.nn.leaky_relu(z, 0.3)


def every_activation(cases):
    def loss(p, x):
        return sum(jnp.sum(jnp.sin(CASES[case](x @ p[case]))) for case in cases)

    return loss, dict.fromkeys(cases, W)


def test_activation_functions_are_recognized_by_what_they_compute():
    loss, params = every_activation(CASES)
    with jax.numpy_rank_promotion("allow"):
        found = {s.name: s.kind for s in find_sites(trace(loss, params, Z))}
    for case in CASES:
        kind = next(k for k in KINDS if case.startswith(k))
        assert found[f"{case}:{kind}"] == kind


def test_the_site_of_an_activation_function_is_its_output():
    cases = ["gelu", "gelu, exact", "softmax", "log_sigmoid", "leaky_relu, by hand"]
    loss, params = every_activation(cases)
    with jax.numpy_rank_promotion("allow"):
        inspection = jax.jit(inspect(loss, keep=None, stats="rms"))(params, Z)
        for case in cases:
            name = f"{case}:{next(k for k in KINDS if case.startswith(k))}"
            out = CASES[case](Z @ W)
            np.testing.assert_allclose(inspection[name].value, out, rtol=1e-5, atol=1e-7)
            np.testing.assert_allclose(inspection[name].grad, jnp.cos(out), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "function",
    [
        lambda z: jnp.maximum(z, 0.5),
        lambda z: z * jax.nn.sigmoid(1.5 * z),
        lambda z: jnp.clip(z, -2.0, 2.0),
        lambda z: jnp.log1p(jnp.exp(2 * z)),
        lambda z: jnp.where(z > 0, z, 1.2 * z),
        lambda z: z - 1.0,
        lambda z: jnp.exp(z) / (1 + jnp.exp(z).sum(-1, keepdims=True)),
        lambda z: jnp.exp(z) / jnp.exp(z).sum(0)[:, None],  # normalizes the wrong axis
        lambda z: jax.nn.softmax(z / 0.7),
        lambda z: jax.jit(lambda relu: jnp.maximum(relu, 0.1))(z),
    ],
)
def test_what_is_not_quite_an_activation_function_has_no_label(function):
    square = jnp.ones((3, 3))
    with jax.numpy_rank_promotion("allow"):
        found = find_sites(trace(lambda w, x: jnp.sum(function(x @ w)), W, square))
    assert [(s.name, s.kind) for s in found] == [("params", "")]


def test_a_function_only_called_like_an_activation_function_is_not_one():
    @jax.jit
    def relu(z):
        return jnp.maximum(z, 0.1)

    @jax.jit
    def gelu(w, x):
        return x @ w

    assert names(lambda w, x: jnp.sum(relu(gelu(w, x))), W, X) == ["params"]


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("name", ["gelu", "silu", "softmax", "log_sigmoid"])
def test_activation_functions_in_half_precision(dtype, name):
    function = getattr(jax.nn, name)
    assert names(lambda w, x: jnp.sum(function(x @ w)), W.astype(dtype), X.astype(dtype)) == [
        *("params", f"params:{name}")
    ]


def test_a_masked_softmax_is_a_softmax():
    def scores(w, x, mask, where):
        z = checkpoint_name(x @ w, "scores")
        if where:
            return jnp.sum(jax.nn.softmax(z, where=mask) ** 2)
        return jnp.sum(jax.nn.softmax(jnp.where(mask, z, -1e30)) ** 2)

    mask = jnp.tril(jnp.ones((5, 3), bool))
    truth = jax.nn.softmax(jnp.where(mask, Z @ W, -jnp.inf))
    for where in (False, True):
        inspection = jax.jit(inspect(lambda w, x: scores(w, x, mask, where), keep="scores:softmax"))(W, Z)  # noqa: B023
        np.testing.assert_allclose(inspection["scores:softmax"].value, truth, rtol=1e-5, atol=1e-7)


def test_activation_functions_under_vmap_scan_and_remat():
    def layer(h, w):
        return jax.checkpoint(lambda h, w: jax.nn.gelu(h @ w))(h, w), None

    def f(p, x):
        return jnp.sum(jax.vmap(lambda row: lax.scan(layer, row, p)[0])(x))

    assert names(f, jnp.stack([W] * 4), X) == ["params", "params:gelu"]


def test_a_value_of_several_parameters_is_named_after_most_of_it_or_what_they_share():
    @jax.custom_vjp
    def network(p, x):
        return jnp.tanh(x @ p["h"]["W"]) @ p["o"]["W"]

    network.defvjp(lambda p, x: (network(p, x), (p, x)), lambda r, g: (r[0], g @ r[0]["h"]["W"].T))
    tree = {"h": {"W": W, "b": jnp.ones(3)}, "o": {"W": W}}
    assert names(lambda p, x: jnp.sum(network(p, x)), tree, X) == ["network"]
    assert "network: a function with its own derivative rule" in str(
        sites(lambda p, x: jnp.sum(network(p, x)))(tree, X)
    )
    assert names(lambda p, x: jnp.sum(network(p["net"], x)), {"net": tree}, X) == ["net"]

    def generated(p, x):
        w = p["hyper"]["W"] @ p["hyper"]["z"] + p["hyper"]["b"]
        return jnp.sum(jnp.tanh(x @ w.reshape(3, 3)))  # [9] -> [3, 3]

    hyper = {"W": jnp.ones((9, 2)), "b": jnp.ones(9), "z": jnp.ones(2)}
    assert names(generated, {"hyper": hyper}, X) == ["hyper", "hyper:tanh"]

    def low_rank(p, x):
        return jnp.sum(x @ (p["q"]["W"] + p["lora"]["A"] @ p["lora"]["B"]))

    low = {"q": {"W": W}, "lora": {"A": jnp.ones((3, 1)), "B": jnp.ones((1, 3))}}
    assert names(low_rank, low, X) == ["q/W"]

    def weight_norm(p, x):
        return jnp.sum(x @ (p["g"][None] * p["v"] / jnp.linalg.norm(p["v"], axis=0)[None]))

    assert names(weight_norm, {"g": jnp.ones(3), "v": W}, X) == ["v"]
    assert names(lambda p, x: jnp.sum(x @ (p["a"] @ p["b"])), {"a": W, "b": W}, X) == ["a+b"]


def test_a_mixture_of_experts_under_vmap_shows_the_outputs_of_its_experts():
    experts = {
        f"e{k}": {"W": jax.random.normal(jax.random.key(k), (3, 3)), "b": jnp.ones(3)} for k in range(2)
    }
    index = jnp.array([0, 1, 0, 1, 1])

    def switched(p, x):
        branches = [lambda x, e=e: jnp.tanh(e["W"] @ x + e["b"]) for e in p.values()]
        return jnp.sum(jax.vmap(lambda i, x: lax.switch(i, branches, x))(index, x) ** 2)

    inspection = jax.jit(inspect(switched, keep=None, stats="rms"))(experts, Z)
    assert [s.name for s in inspection.sites] == [
        *("e0/W", "e0/b", "e0/b:tanh"),
        *("e1/W", "e1/b", "e1/b:tanh"),
    ]
    chosen = index[:, None] == 1
    truth = Z @ experts["e1"]["W"].T
    np.testing.assert_allclose(jnp.where(chosen, inspection["e1/W"].value - truth, 0), 0, atol=1e-6)
    out = jnp.tanh(truth + 1)
    np.testing.assert_allclose(
        inspection["e1/b:tanh"].grad, jnp.where(chosen, 2 * out, 0), rtol=1e-4, atol=1e-6
    )

    def looked_up(w, x):
        return jnp.sum(jax.vmap(lambda i, x: jnp.tanh(w[i] @ x))(index, x) ** 2)

    stacked = jnp.stack([e["W"] for e in experts.values()])
    inspection = jax.jit(inspect(looked_up, keep=None, stats="rms"))(stacked, Z)
    assert [s.name for s in inspection.sites] == ["params", "params:tanh"]
    np.testing.assert_allclose(
        inspection["params"].value.reshape(5, 3),
        jnp.einsum("bij,bj->bi", stacked[index], Z),
        rtol=1e-5,
        atol=1e-6,
    )


def test_an_embedding_is_still_the_row_that_was_looked_up():
    def f(p, tokens):
        return jnp.sum((p["E"][tokens] + p["P"]) @ p["W"])

    p = {"E": jnp.ones((7, 3)), "P": jnp.ones((2, 3)), "W": W}
    found = find_sites(trace(f, p, jnp.array([1, 2])))
    assert [(s.name, s.shape) for s in found] == [("E", (2, 3)), ("P", (2, 3)), ("W", (2, 3))]


def adapted(p, x, steps, scan):
    """Gradient descent on the parameters, inside the loss."""

    def net(p, x):
        return jnp.tanh(x @ p["W1"] + p["b1"][None]) @ p["W2"]

    def step(p, _):
        grads = jax.grad(lambda p: jnp.mean(net(p, x) ** 2))(p)
        return jax.tree.map(lambda a, g: a - 0.1 * g, p, grads), None

    if scan:
        p, _ = lax.scan(step, p, None, length=steps)
    else:
        for _ in range(steps):
            p, _ = step(p, None)
    return jnp.mean((net(p, x) - 1) ** 2), p


def test_weights_that_an_inner_loop_trains_are_weights():
    p = {"W1": W * 0.3, "b1": jnp.ones(3) * 0.1, "W2": W * 0.2}
    inspection = jax.jit(inspect(lambda p, x: adapted(p, x, 3, scan=True)[0], keep=None, stats="rms"))(p, Z)
    shapes = {s.name: s.axes + s.shape for s in inspection.sites}
    assert shapes == {
        **{name: (3, 5, 3) for name in ("W1", "b1", "b1:tanh", "W2")},
        **{name: (5, 3) for name in ("W1.1", "b1.1", "b1.1:tanh", "W2.1")},
    }
    for k in range(3):
        _, q = adapted(p, Z, k, scan=False)
        np.testing.assert_allclose(inspection["W1"].value[k], Z @ q["W1"], rtol=1e-4, atol=1e-6)
    _, q = adapted(p, Z, 3, scan=False)
    out = jnp.tanh(Z @ q["W1"] + q["b1"][None]) @ q["W2"]
    np.testing.assert_allclose(inspection["W2.1"].value, out, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(inspection["W2.1"].grad, 2 * (out - 1) / out.size, rtol=1e-4, atol=1e-6)
    unrolled = find_sites(trace(lambda p, x: adapted(p, x, 1, scan=False)[0], p, Z))
    assert all(s.shape == (5, 3) for s in unrolled)  # no updated weight among them


def test_complex_values_are_sites_with_a_gradient():
    def f(p, x):
        return jnp.sum(jnp.abs(jnp.fft.fft(x) @ p["W"].astype(jnp.complex64)) ** 2)

    inspection = jax.jit(inspect(f, keep=None, stats="rms"))({"W": W}, Z)
    out = jnp.fft.fft(Z) @ W.astype(jnp.complex64)
    np.testing.assert_allclose(inspection["W"].value, out, rtol=1e-4)
    np.testing.assert_allclose(inspection["W"].grad, 2 * out.conj(), rtol=1e-4)  # jax's convention


def test_two_networks_in_one_function_have_names_of_their_own():
    nets = {"enc": gf.mlp([4, 3, 2]), "dec": gf.mlp([2, 3, 4])}
    params = {name: net.init(jax.random.key(0)) for name, net in nets.items()}

    def by_parameters(params, x):
        return jnp.sum(nets["dec"].apply(params["dec"], nets["enc"].apply(params["enc"], x)))

    def by_scope(params, x):
        with jax.named_scope("first"):
            x = nets["enc"].apply(params["enc"], x)
        with jax.named_scope("second"):
            return jnp.sum(nets["dec"].apply(params["dec"], x))

    def in_loops(params, x):
        return jnp.sum(jax.lax.scan(lambda h, _: (by_parameters(params, h) * h, None), x, None, length=2)[0])

    taps = ("z1", "a1", "z2")
    for f, prefixes in ((by_parameters, ("enc", "dec")), (in_loops, ("enc", "dec"))):
        named = [s.name for s in gf.sites(f)(params, jnp.ones(4)) if s.source == "name"]
        assert named == [f"{prefix}/{tap}" for prefix in prefixes for tap in taps]
    named = [s.name for s in gf.sites(by_scope)(params, jnp.ones(4)) if s.source == "name"]
    assert named == [f"{prefix}/{tap}" for prefix in ("first", "second") for tap in taps]
    inspection = gf.inspect(by_parameters, keep="*/a1")(params, jnp.ones(4))
    by_hand = jax.nn.sigmoid(params["enc"]["W1"] @ jnp.ones(4) + params["enc"]["b1"])
    np.testing.assert_allclose(inspection["enc/a1"].value, by_hand, rtol=1e-5)


def test_numbers_behind_names_are_explained_where_they_are_shown():
    def f(w, x):
        return jnp.sum(gf.tap(gf.tap(x * w, "h") * 2, "h"))

    listed = gf.sites(f)(2.0, jnp.ones(3))
    assert listed.names == ["h", "h.1"]
    note = "h, h.1, ...: the first value of that name in the order of computation, the second, ..."
    assert note in " ".join(str(listed).split())
    assert note in " ".join(str(gf.inspect(f)(2.0, jnp.ones(3))).split())
    assert "h.1" not in str(gf.sites(lambda w, x: gf.tap(x * w, "h"))(2.0, jnp.ones(3)))


def test_a_batch_axis_added_by_vmap_stays_in_front():
    W, b, X = jnp.ones((8, 4)), jnp.ones(8), jnp.arange(20.0).reshape(5, 4)

    def one(params, x):
        return jnp.sum(jnp.tanh(params["W"] @ x + params["b"]))

    def batch(params, x):
        return jnp.mean(jax.vmap(one, (None, 0))(params, x))

    params = {"W": W, "b": b}
    inspection = gf.inspect(batch, keep=None)(params, X)
    assert {site.shape for site in inspection.sites} == {(5, 8)}
    np.testing.assert_allclose(inspection["W"].value, X @ W.T, rtol=1e-6)
    expected = jax.grad(lambda z: jnp.mean(jnp.sum(jnp.tanh(z + b[None]), 1)))(X @ W.T)
    np.testing.assert_allclose(inspection["W"].grad, expected, rtol=1e-5)
    np.testing.assert_allclose(gf.patch(batch, {"W": X @ W.T / 2})(params, X), batch({"W": W / 2, "b": b}, X))

    def own_transpose(params, x):
        return jnp.sum(jnp.sin((params["W"] @ x).T))

    def of_matrices(params, x):
        return jnp.mean(jax.vmap(own_transpose, (None, 0))(params, x))

    assert gf.sites(own_transpose)(params, X.T)[0].shape == (8, 5)
    assert gf.sites(of_matrices)(params, jnp.ones((2, 4, 5)))[0].shape == (8, 2, 5)


def helper(params, x):
    return jnp.tanh(params["W"] @ x)


def test_the_lines_shown_are_the_users_own():
    net = gf.mlp([4, 3, 2])

    def loss(params, x):
        h = helper(params["own"], net.apply(params["net"], x))  # both of these sites are on this line
        return jnp.sum(jax.nn.softmax(h))

    params = {"own": {"W": jnp.ones((3, 2))}, "net": net.init(jax.random.key(0))}
    lines = {site.name: site.line for site in gf.sites(loss)(params, jnp.ones(4))}
    assert all(__file__ in line for line in lines.values())
    assert lines["net/W1"].endswith(".loss)")
    assert lines["own/W"].endswith("(helper)")
    # Where no line is the user's own, the library's is shown.
    assert (
        "gradfn/nets/_mlp.py"
        in {s.name: s.line for s in gf.sites(net.apply)(params["net"], jnp.ones(4))}["z1"]
    )
