"""The error for a name that gradfn does not have, with the public names that it resembles."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from importlib.util import find_spec

# typing takes longer to import than all else here
TYPE_CHECKING = False

if TYPE_CHECKING:
    from typing import NoReturn


def missing(name: str, names: Iterable[str]) -> AttributeError:
    """Return the error for `gf.name`; it suggests names of gradfn and of its namespaces.

    >>> missing("hvp", ["curvature", "inspect"])
    AttributeError("module 'gradfn' has no attribute 'hvp'. Did you mean gf.curvature.hvp?")
    """
    full = {each: f"gf.{each}" for each in names}
    # `from gradfn import runs` looks for an attribute before it imports the module.
    is_module = name.isidentifier() and find_spec(f"gradfn.{name}")
    if not name.startswith("_") and not is_module:
        for space in [each for each in full if find_spec(f"gradfn.{each}")]:
            for each in import_module(f"gradfn.{space}").__all__:
                # Both hvp and curvature_hvp are close to gf.curvature.hvp.
                full.setdefault(each, f"gf.{space}.{each}")
                full.setdefault(f"{space}_{each}", f"gf.{space}.{each}")
    return _error("gradfn", name, full)


def namespace(module: str, names: Sequence[str]) -> tuple[Callable[[str], NoReturn], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` of a namespace: a hint for a misspelled name, and the public names alone."""

    def get(name: str) -> NoReturn:
        short = module.replace("gradfn", "gf")
        raise _error(module, name, {each: f"{short}.{each}" for each in names})

    return get, lambda: sorted(names)


def _error(module: str, name: str, full: dict[str, str]) -> AttributeError:
    """Return the error for `module.name`; `full` has the full name of each public name."""
    message = f"module {module!r} has no attribute {name!r}"
    if name.startswith("_"):
        return AttributeError(message)
    from difflib import get_close_matches

    close = dict.fromkeys(full[each] for each in get_close_matches(name, full, cutoff=0.75))
    return AttributeError(f"{message}. Did you mean {' or '.join(close)}?" if close else message)
