"""The versions of what an outcome rests on."""

from __future__ import annotations

import functools
import importlib.metadata
import platform

PACKAGES = ("jax", "jaxlib", "optax", "numpy")


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of what a run's outcome rests on.

    >>> from gradfn.versions import versions
    >>> sorted(versions())
    ['gradfn', 'jax', 'jaxlib', 'numpy', 'optax', 'platform', 'python']
    """
    import gradfn

    ours = {
        "gradfn": gradfn.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    return ours | {name: importlib.metadata.version(name) for name in PACKAGES}
