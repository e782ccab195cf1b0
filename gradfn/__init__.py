"""gradfn: networks as pure functions over plain dicts of arrays, with every gradient visible."""

__version__ = "0.1.0"
