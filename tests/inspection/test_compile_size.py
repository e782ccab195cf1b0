"""What a transform traces and lowers grows no faster than the depth of the network.

Counts of Python calls and of operations, not times: they do not depend on the machine, so that shallow networks show
what grows faster.
"""

import sys

import jax
import pytest

import gradfn as gf
from gradfn.inspection import nan_guard

DEPTHS = (1, 2, 4)


def of_example(depth):
    net = gf.gpt(gf.GPTConfig(7, 4, depth, 1, 4))
    text = jax.random.randint(jax.random.key(1), (2, 4), 0, 7)
    return gf.next_token_loss(net), jax.eval_shape(net.init, jax.random.key(0)), (text, text)


def of_batch(transform):
    return lambda loss: transform(gf.batch_mean(loss))


TRANSFORMS = {
    "value_and_grad": of_batch(jax.value_and_grad),
    "inspect": of_batch(gf.inspect),
    "capture": of_batch(gf.capture),
    "patch": of_batch(lambda loss: gf.patch(loss, {"embed": lambda x: x})),
    "backprop": of_batch(gf.backprop),
    "nan_guard": of_batch(nan_guard),
    "norms": gf.per_example.norms,
    "clipped_grads": lambda loss: gf.per_example.clipped_grads(loss, 1.0),
    "hvp": of_batch(lambda loss: lambda params, batch: gf.curvature.hvp(loss)(params, params, batch)),
}


def size(transform, depth):
    """Return the number of Python calls that tracing takes, and the number of operations of the lowered program."""
    loss, params, batch = of_example(depth)
    f = jax.jit(transform(loss))
    calls = 0

    def count(frame, event, arg):
        nonlocal calls
        calls += event == "call"

    jax.clear_caches()
    sys.setprofile(count)
    try:
        traced = f.trace(params, batch)
    finally:
        sys.setprofile(None)
    return calls, traced.lower().as_text().count(" = ")


@pytest.mark.parametrize("name", TRANSFORMS)
def test_tracing_and_operations_grow_linearly_with_depth(name):
    (calls, operations), (calls_2, operations_2), (calls_4, operations_4) = (
        size(TRANSFORMS[name], depth) for depth in DEPTHS
    )
    # With linear growth, twice as many layers add twice as much, and what is quadratic adds four times as much.
    assert operations_4 - operations_2 <= 2.02 * (operations_2 - operations)
    assert calls_4 - calls_2 <= 2.1 * (calls_2 - calls)
