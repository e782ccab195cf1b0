"""Which form of attention is traced: the choice that a transform of gradfn, or a user, makes for the code inside.

Attention has forms that compute the same output (`gradfn/layers/_attend.py`). The plain one has the matrix of all
probabilities, which inspection shows; the others never hold it. Fused kernels have a backward rule of their own, which
cannot be differentiated again. So the transform that traces a function decides, although the function does not know
about the transform. The choice is a context, not an argument, because it has to reach layers inside any function of
the user's; and it is one of jax's contexts, not a Python variable, because those are part of the keys of jax's caches:
a function that the user has already compiled with another form is traced again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import jax

Form = Literal["plain", "blocks"]

# The number of queries and of keys from which the other forms take less time than the plain one.
LONG = 512

# None: the fastest form for the device and the shapes.
requested = jax.make_user_context(None)


@contextlib.contextmanager
def attention_form(form: Form | None) -> Iterator[None]:
    """Choose how attention is computed in functions that are traced (compiled, differentiated) inside the block.

    Only needed for forward mode and second derivatives of your own (`jax.jvp`, `jax.hessian`) on a GPU or TPU, where
    long sequences are computed by a kernel that has neither, and for `jax.export` on a GPU, which refuses cuDNN's: use
    `"blocks"` there. The transforms of gradfn choose on their own.

    Args:
        form: `"plain"`, which holds the matrix of all probabilities, and which inspection uses; `"blocks"`, which
            computes long sequences (from 512 queries and keys) for 128 queries at a time, and again in the backward
            pass; None, the default, also for a kernel: cuDNN's on GPUs, in half precision, or on a single TPU that of
            `jax.experimental.pallas`.

    Raises:
        ValueError: an unknown form.

    >>> import jax, jax.numpy as jnp, gradfn as gf
    >>> x = jnp.ones([600, 1, 2])
    >>> with gf.layers.attention_form("plain"):
    ...     text = str(jax.make_jaxpr(gf.layers.attend)(x, x, x))
    >>> "f32[1,600,600]" in text, "f32[1,600,600]" in str(jax.make_jaxpr(gf.layers.attend)(x, x, x))
    (True, False)
    """
    if form not in ("plain", "blocks", None):
        raise ValueError(f"attention_form: form must be 'plain', 'blocks' or None, got {form!r}")
    with requested(form):
        yield


@contextlib.contextmanager
def differentiable_attention() -> Iterator[None]:
    """Trace attention in a form that has derivatives of every order, unless a form is already requested."""
    with requested(requested.value or "blocks"):
        yield
