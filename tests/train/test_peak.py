"""The operations of a step, counted by hand, and the peaks of devices."""

import jax
import jax.numpy as jnp
import pytest

import gradfn as gf
from gradfn.train.peak import peak_rate, step_flops


def forward_flops(f, *args):
    return step_flops(f, *args) / 3


def test_a_product_takes_two_operations_per_term():
    assert forward_flops(jnp.matmul, jnp.ones([3, 4]), jnp.ones([4, 5])) == 2 * 3 * 4 * 5
    batched = lambda a, b: jnp.einsum("bij,bjk->bik", a, b)  # noqa: E731
    assert forward_flops(batched, jnp.ones([7, 3, 4]), jnp.ones([7, 4, 5])) == 7 * 2 * 3 * 4 * 5


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_sums_over_its_window_and_the_channels_of_its_group(groups):
    def convolved(x, kernel):
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (1, 1),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    # [5, 8, 8, 4] by a window of 3 x 3 to [5, 6, 6, 6]
    found = forward_flops(convolved, jnp.ones([5, 8, 8, 4]), jnp.ones([3, 3, 4 // groups, 6]))
    assert found == 2 * (5 * 6 * 6 * 6) * (3 * 3 * 4 // groups)


def test_a_loop_counts_as_often_as_it_runs_and_a_cond_its_most_expensive_branch():
    W = jnp.ones([4, 4])

    def looped(x):
        return jax.lax.scan(lambda x, _: (W @ x, None), x, length=10)[0]

    def chosen(x):
        return jax.lax.cond(x[0] > 0, lambda x: W @ (W @ x), lambda x: W @ x, x)

    assert forward_flops(looped, jnp.ones(4)) == 10 * 32
    assert forward_flops(jax.jit(jax.checkpoint(chosen)), jnp.ones(4)) == 2 * 32


def test_shards_count_on_every_device():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    f = jax.shard_map(lambda x: x @ jnp.ones([4, 5]), mesh=mesh, in_specs=spec, out_specs=spec)
    assert forward_flops(f, jnp.ones([16, 4])) == 2 * 16 * 4 * 5


@pytest.mark.parametrize("scan", [False, True])
def test_a_gpt_takes_what_the_formula_of_palm_says(scan):
    """6 N + 12 L T d per token, where N has no biases and gains, and the head's matrix once."""
    config = gf.GPTConfig(
        vocab=65, context=16, n_layers=3, n_heads=2, width=32, bias=False, positions="sinusoidal", scan=scan
    )
    net = gf.gpt(config)
    loss = gf.batch_mean(gf.next_token_loss(net))
    params = net.init(jax.random.key(0))
    tokens = jnp.zeros([2, 16], jnp.int32)
    matrices = sum(leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim >= 2 + scan)
    matrices += params["embed"]["W"].size if scan else 0
    expected = (6 * matrices + 12 * 3 * 16 * 32) * 2 * 16
    assert step_flops(loss, params, (tokens, tokens)) == expected


def test_shapes_are_enough():
    net = gf.mlp([784, 16, 10])
    params = jax.eval_shape(net.init, jax.random.key(0))
    batch = jax.ShapeDtypeStruct([32, 784], jnp.float32), jax.ShapeDtypeStruct([32], jnp.int32)
    found = step_flops(gf.batch_mean(gf.classification_loss(net)), params, batch)
    assert found == 6 * 32 * (784 * 16 + 16 * 10)


@pytest.mark.parametrize(
    ("kind", "rate"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", None),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("cpu", None),
    ],
)
def test_the_peak_is_known_by_the_name_of_the_device(kind, rate):
    assert peak_rate(kind) == rate
