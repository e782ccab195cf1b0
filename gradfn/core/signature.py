"""What a transform returns describes itself: `help(gf.curvature.hvp(loss))` shows its own name and arguments.

`functools.wraps(loss)` would show those of the loss, which are others.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, Signature
from typing import TypeVar

import jax

F = TypeVar("F", bound=Callable)
POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)


def transform_of(f: Callable, name: str, own: int = 1) -> Callable[[F], F]:
    """Return a decorator that gives a function made of `f` a name and the arguments that it takes.

    These are the decorated function's own; what `f` takes after its first `own` arguments stands in them instead
    of `*args` and `**kwargs`.

    >>> @transform_of(lambda params, image, label: ..., "inspect")
    ... def inspected(params, /, *args, key=None, **kwargs): ...
    >>> inspected.__name__, str(inspect.signature(inspected))
    ('inspect', '(params, /, image, label, *, key=None)')
    """

    def decorate(function: F) -> F:
        function.__name__ = function.__qualname__ = name
        function.__signature__ = _merged(inspect.signature(function), signature_of(f), own)  # type: ignore[attr-defined]
        return function

    return decorate


def signature_of(f: Callable) -> Signature:
    """Return the signature of a function: `(*args, **kwargs)` if Python does not know it, as of some builtins."""
    try:
        return inspect.signature(f)
    except (TypeError, ValueError):
        return inspect.signature(lambda *args, **kwargs: None)


def keys_for(
    f: Callable, args: Sequence[object], key: jax.Array | None, kwargs: Mapping[str, object]
) -> tuple[jax.Array, dict[str, object]]:
    """Return a random key for a method, and the keywords for the function that it is applied to.

    A function with a parameter `key` that `args` do not fill gets half of the key; `jax.random.key(0)` if None.
    """
    if key is None:
        return jax.random.key(0), dict(kwargs)
    signature = signature_of(f)
    if "key" not in signature.parameters or "key" in signature.bind_partial(*args).arguments:
        return key, dict(kwargs)
    own, theirs = jax.random.split(key)
    return own, {**kwargs, "key": theirs}


def _merged(own: Signature, theirs: Signature, n: int) -> Signature:
    mine = own.parameters.values()
    kinds = {parameter.kind for parameter in mine}
    named = [p for p in theirs.parameters.values() if p.kind in POSITIONAL][n:]
    others = [p for p in theirs.parameters.values() if p.kind not in POSITIONAL]
    if Parameter.VAR_KEYWORD not in kinds:
        named = [p.replace(kind=Parameter.POSITIONAL_ONLY) for p in named]
        others = [p for p in others if p.kind is Parameter.VAR_POSITIONAL]
    if Parameter.VAR_POSITIONAL not in kinds:
        named = [
            p.replace(kind=Parameter.KEYWORD_ONLY) for p in named if p.kind is not Parameter.POSITIONAL_ONLY
        ]
        others = [p for p in others if p.kind is not Parameter.VAR_POSITIONAL]
    fixed = [p for p in mine if p.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)]
    # The decorated function handles these, and passes them to `f` if necessary.
    keywords = {p.name for p in fixed if p.kind is Parameter.KEYWORD_ONLY}
    merged = [*fixed, *(p for p in (*named, *others) if p.name not in keywords)]
    try:
        return own.replace(parameters=sorted(merged, key=lambda p: p.kind))
    except ValueError:  # two arguments of one name
        return own
