"""One traced function, run with other inputs and with edited sites."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf
from gradfn.circuits._model import scalar_metric, trace_model


def nets():
    """The same GPT unrolled and under a scan, with parameters and two inputs."""
    config = dict(vocab=11, context=8, n_layers=3, n_heads=2, width=8)
    unrolled, scanned = (gf.gpt(gf.GPTConfig(**config, scan=scan)) for scan in (False, True))
    params = unrolled.init(jax.random.key(0))
    # Larger than GPT-2's start, so that every part matters.
    params = jax.tree.map(lambda x: 10 * x if x.ndim == 2 else x, params)
    tokens = jax.random.randint(jax.random.key(1), (2, 6), 0, 11)
    return unrolled, scanned, params, tokens


def test_a_run_with_other_inputs_is_a_call_of_the_function():
    net, _, params, (a, b) = nets()
    model = trace_model(net.apply, (params, a), "test")
    out, kept = model.run(model.inputs((params, b), "b"), keep=["logits"])
    np.testing.assert_allclose(out, net.apply(params, b), atol=1e-6)
    np.testing.assert_array_equal(kept["logits"], out)


def test_an_edit_equals_patch_and_the_value_before_it_is_kept():
    net, _, params, (a, _) = nets()
    model = trace_model(net.apply, (params, a), "test")
    name = "blocks/1/attention/mixed"
    out, kept = model.run(model.program.inputs, {name: lambda x: x.at[:, 1].set(0.0)}, [name])
    expected = gf.patch(net.apply, {name: lambda x: x.at[:, 1].set(0.0)})(params, a)
    np.testing.assert_allclose(out, expected, atol=1e-6)
    assert jnp.all(jnp.any(kept[name][:, 1] != 0, -1))


def test_tokens_edit_one_iteration_of_a_scan():
    unrolled, scanned, params, (a, _) = nets()
    model = trace_model(scanned.apply, (gf.stack_blocks(params), a), "test")
    (site,) = model.select("*attention_out")
    last = jnp.arange(3) == 2
    out, _ = model.run(
        model.program.inputs, {site.name: lambda x, off: jnp.where(off, 0.0, x)}, (), {site.name: last}
    )
    expected = gf.patch(unrolled.apply, {"blocks/2/attention_out": 0.0})(params, a)
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_inputs_of_another_shape_structure_or_dtype_are_refused():
    net, _, params, (a, _) = nets()
    model = trace_model(net.apply, (params, a), "sweep")
    with pytest.raises(ValueError, match=r"sweep: x: expected int32\[6\].*got int32\[5\] in corrupt"):
        model.inputs((params, a[:5]), "corrupt")
    with pytest.raises(ValueError, match="another structure"):
        model.inputs((params, a, a), "corrupt")
    with pytest.raises(TypeError, match="as a tuple"):
        trace_model(net.apply, [params, a], "sweep")


def test_a_site_that_does_not_exist_or_lies_in_a_while_loop_is_refused():
    def f(w, x):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 9, lambda x: gf.tap(x + w, "inner"), x)

    model = trace_model(f, (jnp.ones(2), jnp.ones(2)), "sweep")
    with pytest.raises(ValueError, match=r"there is no site 'iner'. Did you mean inner"):
        model.select("iner")
    with pytest.raises(ValueError, match="inside a while loop"):
        model.select("inner")


def test_a_metric_that_is_no_scalar_is_refused():
    with pytest.raises(TypeError, match=r"one floating number, got float32\[3\]"):
        scalar_metric(lambda out: out, jnp.ones(3), "sweep")
    with pytest.raises(TypeError, match=r"got int32\[\]"):
        scalar_metric(jnp.argmax, jnp.ones(3), "sweep")
