"""Which kernel is traced for which device, and the TPU's kernel (interpreted) against the plain form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf
from gradfn.layers import _attend, _kernels

CONFIG = gf.GPTConfig(vocab=7, context=512, n_layers=1, n_heads=2, width=16, n_kv_heads=1, compute="bfloat16")


def lowered(platform, transform, **changes):
    """Return the text of the program for a platform: of a transform of a loss, on two sequences."""
    config = gf.GPTConfig(**{**vars(CONFIG), **changes})
    net = gf.gpt(config)
    tokens = jax.ShapeDtypeStruct((2, config.context), jnp.int32)
    params = jax.eval_shape(net.init, jax.random.key(0))
    traced = jax.jit(transform(gf.next_token_loss(net))).trace(params, (tokens, tokens))
    return traced.lower(lowering_platforms=(platform,)).as_text()


def gradient(loss):
    return jax.grad(gf.batch_mean(loss))


def product(loss):
    return lambda params, batch: gf.curvature.hvp(gf.batch_mean(loss))(params, params, batch)


def norms(loss):
    return lambda params, batch: gf.per_example.norms(loss)(params, batch).norms


def inspected(loss):
    return lambda params, batch: gf.inspect(gf.batch_mean(loss), sites="logits")(params, batch).grads


@pytest.fixture
def with_cudnn(monkeypatch):
    """Trace as on a machine with a GPU and cuDNN."""
    module = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    if not hasattr(module, "check_cudnn_version"):
        pytest.skip("jax checks for cuDNN in another place")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(module, "check_cudnn_version", lambda: 91300)


def test_gpus_use_cudnn_in_half_precision(with_cudnn):
    assert "__cudnn$fmhaSoftmaxBackward" in lowered("cuda", gradient)
    assert "__cudnn$fmhaSoftmaxBackward" in lowered("cuda", gradient, scan=True, n_layers=2, positions="rope")
    # Single precision, lengths that are not supported, and what needs other derivatives.
    assert "cudnn" not in lowered("cuda", gradient, compute=None)
    assert "cudnn" not in lowered("cuda", gradient, context=513)
    for transform in (product, norms, inspected):
        assert "cudnn" not in lowered("cuda", transform)
    with gf.layers.attention_form("blocks"):
        assert "cudnn" not in lowered("cuda", gradient)


def test_gpus_without_cudnn_use_blocks(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    text = lowered("cuda", gradient)
    assert "cudnn" not in text
    assert "stablehlo.while" in text


def test_masks_and_positions_are_left_to_blocks(with_cudnn):
    x = jnp.zeros([512, 1, 8], jnp.bfloat16)
    assert _kernels.kernel_for(x, x, x, None, 0)
    assert _kernels.kernel_for(x, x, x, None, None)
    assert _kernels.kernel_for(x, x, x, jnp.ones([1, 512], bool), 0) is None
    assert _kernels.kernel_for(x, x, x, None, 3) is None
    assert _kernels.kernel_for(x, x[:256], x[:256], None, None) is None
    with jax.default_device(jax.devices("cpu")[0]):
        assert _kernels.kernel_for(x, x, x, None, 0) is None


def test_tpus_use_a_kernel_of_pallas_on_one_device(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    # XLA cannot divide it over the eight devices that there are.
    assert "tpu_custom_call" not in lowered("tpu", gradient)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert "tpu_custom_call" in lowered("tpu", gradient)
    assert "tpu_custom_call" in lowered("tpu", gradient, scan=True, n_layers=2, compute=None)
    assert "tpu_custom_call" not in lowered("tpu", gradient, context=515)
    assert "tpu_custom_call" not in lowered("tpu", product)


@pytest.mark.parametrize(("n_queries", "causal"), [(256, True), (128, False)])
def test_the_kernel_of_tpus_computes_the_same(monkeypatch, n_queries, causal):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    rng = np.random.default_rng(0)
    # A batch of two sequences, two query heads that share keys and values.
    shapes = [2, n_queries, 2, 8], [2, 256, 1, 8], [2, 256, 1, 8]
    batch = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]

    def plain(*arrays):
        return _attend.plain(*arrays, None, 0 if causal else None)

    def total(form):
        return lambda *batch: (jax.vmap(form)(*batch) ** 3).sum()

    kernel = _kernels._splash(batch[0][0], batch[1][0], causal, interpret=True)
    found, expected = (
        jax.jit(jax.value_and_grad(total(form), (0, 1, 2)))(*batch) for form in (kernel, plain)
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(np.abs(b).max()))
