"""gradfn: networks as pure functions over plain dicts of arrays, with every gradient visible.

`import gradfn` imports nothing else; a name is imported when it is first used, from the module that `__init__.pyi`
gives. So the command line can handle Ctrl-C while jax is still being imported.
"""

from __future__ import annotations

import lazy_loader

# The version is stated here alone: pyproject.toml reads it, and it is that of a checkout also where an older one is
# installed.
__version__ = "0.1.0"

_import, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

TYPE_CHECKING = False  # typing's own takes longer to import than all else here

if TYPE_CHECKING:
    from typing import Any


def __getattr__(name: str) -> Any:
    if name in __all__:
        return _import(name)
    from gradfn._missing import missing

    raise missing(name, __all__)
