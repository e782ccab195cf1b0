"""`over` and `axes`: what the axes of a result stand for."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf
from gradfn.circuits._model import trace_model
from gradfn.circuits._over import grid


def sites(selection, scan=False):
    net = gf.gpt(gf.GPTConfig(vocab=11, context=8, n_layers=2, n_heads=4, width=8, n_kv_heads=2, scan=scan))
    params = net.init(jax.random.key(0))
    return trace_model(net.apply, (params, jnp.arange(5)), "sweep").select(selection)


def test_the_words_are_the_axes_of_the_result_in_their_order():
    found = grid(sites("*mixed"), "head x layer x position", None, "sweep")
    assert found.words == ("head", "layer", "position")
    assert found.shape == (4, 2, 5)
    assert found.axes == {"head": 1, "position": 0}
    assert found.sizes == {"head": 4, "position": 5}
    assert found.labels[1] == ("blocks/0/attention/mixed", "blocks/1/attention/mixed")
    assert found.labels[0] == ("0", "1", "2", "3")


def test_iterations_of_a_scan_are_layers_in_the_order_of_computation():
    unrolled, scanned = (
        grid(sites(["*residual", "*residual_mid"], scan), "layer", None, "s") for scan in (False, True)
    )
    names = [label.split("/")[-1] for label in unrolled.labels[0]]
    assert names == ["residual_mid", "residual"] * 2
    assert [label.split("/")[-1] for label in scanned.labels[0]] == [
        *("residual_mid[0]", "residual[0]", "residual_mid[1]", "residual[1]")
    ]
    assert [site.name.split("/")[-1] for site in scanned.sites] == ["residual_mid", "residual"]


def test_arrange_puts_values_of_every_site_and_iteration_in_order():
    found = grid(sites(["*residual", "*residual_mid"], scan=True), "position x layer", None, "sweep")
    values = {site.name: jnp.tile(10 * i + jnp.arange(2)[:, None], 5) for i, site in enumerate(found.sites)}
    np.testing.assert_array_equal(found.arrange(values), np.tile([0, 10, 1, 11], (5, 1)))


def test_a_mask_selects_one_entry_of_each_named_axis_and_all_of_the_others():
    chosen = sites("*mixed")
    found = grid(chosen, "layer x head x feature", {"head": -2, "feature": 2}, "sweep")
    mask = jnp.broadcast_to(found.mask(chosen[0], [jnp.array(3), jnp.array(1)]), chosen[0].shape)
    assert mask.sum() == 5
    assert mask[:, 3, 1].all()


@pytest.mark.parametrize(
    ("selection", "over", "axes", "message"),
    [
        ("*mixed", "layer x feature", None, "over has the word 'feature', and axes does not say"),
        ("*mixed", "layer x layer", None, "different words joined by ' x ', .* got 'layer x layer'"),
        ("*mixed", "", None, "different words joined by ' x ', .* got ''"),
        ("*residual", "layer x head", {"head": 2}, re.escape("'head' is axis 2 of the values, and site")),
        ("*mixed", "layer x position x head", {"position": 1, "head": -2}, "stand for the same axis"),
        (["*mixed", "*keys"], "layer x head", None, "'head' has 2 entries at site .*keys.* and 4 at site"),
        (
            ["*mixed", "*residual"],
            "layer x feature",
            {"feature": -1},
            "has the axes feature at .* Count axes",
        ),
    ],
)
def test_what_does_not_fit_the_sites_is_refused(selection, over, axes, message):
    with pytest.raises(ValueError, match=f"sweep: .*{message}"):
        grid(sites(selection), over, axes, "sweep")
