"""The error for a name that gradfn does not have, with the names that it resembles."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from importlib import import_module

NAMESPACES = ("attribution", "curvature", "data", "layers", "per_example", "train")


def missing(name: str, names: Iterable[str]) -> AttributeError:
    """Return the error for `gf.name`: it suggests names of gradfn and of its namespaces.

    >>> missing("hessian_eig", ["inspect"])
    AttributeError("module 'gradfn' has no attribute 'hessian_eig'. Did you mean gf.curvature.hessian_eigs?")
    """
    message = f"module 'gradfn' has no attribute {name!r}"
    if name.startswith("_"):
        return AttributeError(message)
    full = {each: f"gf.{each}" for each in names}
    for space in NAMESPACES:
        for each in import_module(f"gradfn.{space}").__all__:
            # Both hvp and curvature_hvp are close to gf.curvature.hvp.
            full.setdefault(each, f"gf.{space}.{each}")
            full.setdefault(f"{space}_{each}", f"gf.{space}.{each}")
    close = dict.fromkeys(full[each] for each in get_close_matches(name, full, cutoff=0.75))
    return AttributeError(f"{message}. Did you mean {' or '.join(close)}?" if close else message)
