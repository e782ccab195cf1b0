"""The losses of optax, each of a small network of gradfn."""

import inspect

import jax
import jax.numpy as jnp
import optax

import gradfn as gf
from tests.menagerie.build import floats
from tests.menagerie.contexts import Layer

L = optax.losses


def softmax(x):
    return jax.nn.softmax(x, -1)


# By loss: a function of the network's output [4, 3].
LOSSES = {
    "binary_dice_loss": lambda y: L.binary_dice_loss(y, (jnp.cos(y * 0 + 2.0) > 0) * 1.0),
    "convex_kl_divergence": lambda y: L.convex_kl_divergence(jax.nn.log_softmax(y), softmax(floats(4, 3))),
    "cosine_distance": lambda y: L.cosine_distance(y, floats(4, 3)),
    "cosine_similarity": lambda y: L.cosine_similarity(y, floats(4, 3)),
    "ctc_loss": lambda y: L.ctc_loss(y[None], jnp.zeros((1, 4)), jnp.array([[1, 2]]), jnp.zeros((1, 2))),
    "ctc_loss_with_forward_probs": lambda y: L.ctc_loss_with_forward_probs(
        y[None], jnp.zeros((1, 4)), jnp.array([[1, 2]]), jnp.zeros((1, 2))
    )[0],
    "dice_loss": lambda y: L.dice_loss(y, jnp.eye(3)[jnp.array([0, 2, 1, 0])]),
    "generalized_kl_divergence": lambda y: L.generalized_kl_divergence(y, jnp.exp(floats(4, 3))),
    "hinge_loss": lambda y: L.hinge_loss(y, jnp.sign(floats(4, 3))),
    "huber_loss": lambda y: L.huber_loss(y, floats(4, 3)),
    "kl_divergence": lambda y: L.kl_divergence(jax.nn.log_softmax(y), softmax(floats(4, 3))),
    "kl_divergence_with_log_targets": lambda y: L.kl_divergence_with_log_targets(
        jax.nn.log_softmax(y), jax.nn.log_softmax(floats(4, 3))
    ),
    "l2_loss": lambda y: L.l2_loss(y, floats(4, 3)),
    "log_cosh": lambda y: L.log_cosh(y, floats(4, 3)),
    "make_fenchel_young_loss": lambda y: L.make_fenchel_young_loss(jax.nn.logsumexp)(
        y[0], softmax(floats(3))
    ),
    "multiclass_generalized_dice_loss": lambda y: L.multiclass_generalized_dice_loss(
        y[None, None], jnp.eye(3)[jnp.array([0, 2, 1, 0])][None, None]
    ),
    "multiclass_hinge_loss": lambda y: L.multiclass_hinge_loss(y, jnp.array([0, 2, 1, 0])),
    "multiclass_perceptron_loss": lambda y: L.multiclass_perceptron_loss(y, jnp.array([0, 2, 1, 0])),
    "multiclass_sparsemax_loss": lambda y: L.multiclass_sparsemax_loss(y, jnp.array([0, 2, 1, 0])),
    "ntxent": lambda y: L.ntxent(y, jnp.array([0, 0, 1, 1])),
    "perceptron_loss": lambda y: L.perceptron_loss(y, jnp.sign(floats(4, 3))),
    "poly_loss_cross_entropy": lambda y: L.poly_loss_cross_entropy(y, softmax(floats(4, 3))),
    "ranking_softmax_loss": lambda y: L.ranking_softmax_loss(y, jnp.abs(floats(4, 3))),
    "safe_softmax_cross_entropy": lambda y: L.safe_softmax_cross_entropy(y, softmax(floats(4, 3))),
    "sigmoid_binary_cross_entropy": lambda y: L.sigmoid_binary_cross_entropy(y, softmax(floats(4, 3))),
    "sigmoid_focal_loss": lambda y: L.sigmoid_focal_loss(y, (floats(4, 3) > 0) * 1.0, alpha=0.3),
    "smooth_labels": lambda y: L.softmax_cross_entropy(y, L.smooth_labels(jnp.eye(4)[:, :3], 0.1)),
    "softmax_cross_entropy": lambda y: L.softmax_cross_entropy(y, softmax(floats(4, 3))),
    "softmax_cross_entropy_with_integer_labels": lambda y: L.softmax_cross_entropy_with_integer_labels(
        y, jnp.array([0, 2, 1, 0])
    ),
    "sparsemax_loss": lambda y: L.sparsemax_loss(y, (floats(4, 3) > 0) * 1),
    "squared_error": lambda y: L.squared_error(y, floats(4, 3)),
    "triplet_margin_loss": lambda y: L.triplet_margin_loss(y, floats(4, 3), jnp.sin(floats(4, 3))),
}


def _of(loss):
    net = gf.mlp([3, 4, 3], "tanh")
    params = net.init(jax.random.key(1))
    return Layer(lambda p, x: loss(jax.vmap(net.apply, (None, 0))(p, x)), params, floats(4, 3))


LAYERS = {f"optax {name}": lambda loss=loss: _of(loss) for name, loss in LOSSES.items()}


def public_losses():
    return sorted(name for name, _ in inspect.getmembers(L, inspect.isfunction) if not name.startswith("_"))
