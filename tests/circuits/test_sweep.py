"""`patch_sweep`: each entry is a run with one value patched by hand."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf
from gradfn.circuits import patch_sweep


def metric(logits):
    return logits[-1, 3] - logits[-1, 5]


def gpt(scan=False):
    net = gf.gpt(gf.GPTConfig(vocab=11, context=8, n_layers=2, n_heads=2, width=8, scan=scan))
    params = gf.gpt(gf.GPTConfig(vocab=11, context=8, n_layers=2, n_heads=2, width=8)).init(jax.random.key(0))
    # Larger than GPT-2's start, so that every part matters.
    params = jax.tree.map(lambda x: 10 * x if x.ndim == 2 else x, params)
    tokens = jax.random.randint(jax.random.key(1), (2, 5), 0, 11)
    return net, gf.stack_blocks(params) if scan else params, tokens


def by_hand(net, params, source, target, sites):
    """Return a function of a site and an index into its value: the metric of the run with that part patched."""
    values = jax.jit(gf.capture(net.apply, keep=sites))(params, source).values

    @functools.partial(jax.jit, static_argnums=0)
    def run(name, mask):
        edit = {name: lambda old: jnp.where(mask, values[name], old)}
        return metric(gf.patch(net.apply, edit)(params, target))

    def patched(name, at):
        return run(name, jnp.zeros(values[name].shape, bool).at[at].set(True))

    return patched


@pytest.mark.parametrize("into", ["corrupt", "clean"])
def test_every_entry_is_a_run_patched_by_hand(into):
    net, params, (a, b) = gpt()
    sweep = patch_sweep(
        net.apply, (params, a), (params, b), metric, over="layer x position x head", into=into, batch_size=3
    )
    assert sweep.metric.shape == (2, 5, 2)
    source, target = (a, b) if into == "corrupt" else (b, a)
    patched = by_hand(net, params, source, target, "*mixed")
    for layer, position, head in itertools.product(range(2), range(5), range(2)):
        name = f"blocks/{layer}/attention/mixed"
        expected = patched(name, (position, head))
        np.testing.assert_allclose(sweep.metric[layer, position, head], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(sweep.clean, metric(net.apply(params, a)), rtol=1e-5)
    np.testing.assert_allclose(sweep.corrupt, metric(net.apply(params, b)), rtol=1e-5)


def test_streams_are_patched_by_position_and_the_last_one_restores_the_clean_metric():
    net, params, (a, b) = gpt()
    sweep = jax.jit(lambda a, b: patch_sweep(net.apply, (params, a), (params, b), metric))(a, b)
    patched = by_hand(net, params, a, b, "*residual")
    for layer, position in itertools.product(range(2), range(5)):
        expected = patched(f"blocks/{layer}/residual", position)
        np.testing.assert_allclose(sweep.metric[layer, position], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(sweep.normalized[1], [0, 0, 0, 0, 1], atol=1e-5)
    np.testing.assert_allclose(sweep.effect, sweep.metric - sweep.corrupt)


@pytest.mark.parametrize(
    ("over", "sites"),
    [("layer x head", None), ("position x layer", ["*residual", "*residual_mid"]), ("position", "*residual")],
)
def test_layers_under_a_scan_give_the_same(over, sites):
    sweeps = []
    for scan in (False, True):
        net, params, (a, b) = gpt(scan)
        sweeps.append(
            patch_sweep(net.apply, (params, a), (params, b), metric, over=over, sites=sites, batch_size=4)
        )
    unrolled, scanned = sweeps
    assert unrolled.metric.shape == scanned.metric.shape
    np.testing.assert_allclose(unrolled.metric, scanned.metric, rtol=1e-4, atol=1e-5)


def test_without_layer_all_sites_are_patched_together():
    net, params, (a, b) = gpt()
    sweep = patch_sweep(net.apply, (params, a), (params, b), metric, over="head")
    names = [f"blocks/{i}/attention/mixed" for i in range(2)]
    values = gf.capture(net.apply, keep=names)(params, a).values
    for head in range(2):
        edits = {
            name: lambda old, name=name, head=head: old.at[:, head].set(values[name][:, head])
            for name in names
        }
        np.testing.assert_allclose(
            sweep.metric[head], metric(gf.patch(net.apply, edits)(params, b)), rtol=1e-5
        )


def test_a_batch_of_pairs_by_vmap_and_the_table_averages_it():
    net, params, (a, b) = gpt()
    pairs = jnp.stack([a, a[::-1]]), jnp.stack([b, b[::-1]])

    def run(a, b):
        return patch_sweep(net.apply, (params, a), (params, b), metric)

    sweeps, first = jax.vmap(run)(*pairs), run(a, b)
    assert sweeps.normalized.shape == (2, 2, 5)
    np.testing.assert_allclose(sweeps.metric[0], first.metric, rtol=1e-4, atol=1e-5)
    assert "averaged over 2 pairs" in str(sweeps)
    mean = jax.tree.map(lambda x: x.mean(0), sweeps)
    assert mean.table().rows == sweeps.table().rows


def test_the_table_lists_the_largest_effects_first():
    net, params, (a, b) = gpt()
    sweep = patch_sweep(net.apply, (params, a), (params, b), metric)
    effects = [abs(row[3]) for row in sweep.table(rows=4).rows]
    assert effects == sorted(effects, reverse=True)
    np.testing.assert_allclose(effects[0], jnp.abs(sweep.effect).max(), rtol=1e-6)
    assert "6 of 10 rows are not shown" in str(sweep.table(rows=4))


def test_a_flax_transformer_that_takes_a_batch():
    nn = pytest.importorskip("flax.linen")

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            attended = nn.MultiHeadDotProductAttention(num_heads=2, name="attn")(nn.LayerNorm()(x))
            return x + attended

    class Model(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(11, 8)(tokens)
            for i in range(2):
                x = Block(name=f"block{i}")(x)
            return nn.Dense(11)(x)

    model = Model()
    a, b = jax.random.randint(jax.random.key(1), (2, 1, 5), 0, 11)
    params = model.init(jax.random.key(0), a)

    def of_batch(logits):
        return metric(logits[0])

    sweep = patch_sweep(
        model.apply,
        (params, a),
        (params, b),
        of_batch,
        sites="Model/block?",
        axes={"position": 1},
        batch_size=2,
    )
    assert sweep.labels[0] == ("Model/block0", "Model/block1")
    for layer, position in itertools.product(range(2), range(5)):
        name = f"Model/block{layer}"
        value = gf.capture(model.apply, keep=name)(params, a)[name].value
        patched = gf.patch(
            model.apply,
            {name: lambda old, value=value, position=position: old.at[:, position].set(value[:, position])},
        )
        np.testing.assert_allclose(sweep.metric[layer, position], of_batch(patched(params, b)), rtol=1e-5)


def test_what_the_runs_share_is_not_batched():
    net, params, (a, b) = gpt()

    def run(a, b):
        return patch_sweep(
            net.apply, (params, a), (params, b), metric, sites="blocks/1/residual", batch_size=2
        )

    # In the loop over batches there is the tail behind the patched site alone: the final norm and the head.
    def loop_products(jaxpr, inside=False):
        n = 0
        for eqn in jaxpr.eqns:
            n += inside and eqn.primitive.name == "dot_general"
            for value in eqn.params.values():
                if hasattr(value, "jaxpr"):
                    n += loop_products(value.jaxpr, inside or eqn.primitive.name == "scan")
        return n

    assert loop_products(jax.make_jaxpr(run)(a, b).jaxpr) == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"sites": "*mixd"}, ValueError, r"patch_sweep: there is no site '\*mixd'. Did you mean"),
        ({"over": "layer x neuron"}, ValueError, "over has the word 'neuron'"),
        ({"over": "layer x head", "sites": "*residual", "axes": {"head": 2}}, ValueError, "is axis 2"),
        ({"sites": ["*mixed", "logits"], "over": "layer x head"}, ValueError, "'head' has 2 entries"),
        ({"metric": lambda logits: logits[-1]}, TypeError, r"one floating number, got float32\[11\]"),
        ({"into": "dirty"}, ValueError, 'into must be "corrupt" or "clean", got \'dirty\''),
        ({"batch_size": 0}, ValueError, "batch_size must be an integer >= 1, got 0"),
    ],
)
def test_what_cannot_be_swept_is_refused(change, error, message):
    net, params, (a, b) = gpt()
    settings = {"metric": metric} | change
    with pytest.raises(error, match=message):
        patch_sweep(net.apply, (params, a), (params, b), settings.pop("metric"), **settings)


def test_inputs_that_do_not_match_are_refused():
    net, params, (a, b) = gpt()
    with pytest.raises(ValueError, match=r"expected int32\[5\].*got int32\[4\] in corrupt"):
        patch_sweep(net.apply, (params, a), (params, b[:4]), metric)
    with pytest.raises(TypeError, match="as a tuple"):
        patch_sweep(net.apply, a, b, metric)


def test_a_site_in_a_branch_that_may_not_run_is_refused():
    def f(w, x):
        return jax.lax.cond(x[0] > 0, lambda x: gf.tap(w * x, "inside"), lambda x: x, x)

    with pytest.raises(ValueError, match=r"'inside' is inside a branch of a lax\.cond"):
        patch_sweep(
            f, (jnp.ones(2), jnp.ones(2)), (jnp.ones(2), -jnp.ones(2)), jnp.sum, sites="inside", over="layer"
        )
