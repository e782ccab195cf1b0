"""Matplotlib figures that an evaluation returns."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator, Mapping
from typing import Any


def split_figures(evaluated: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, Any]]:
    """Return the scalars and the matplotlib figures that `evaluate` returned.

    Raises:
        TypeError: something is neither.
    """
    # A figure exists only where matplotlib was imported.
    module = sys.modules.get("matplotlib.figure")
    figures = {
        name: value for name, value in evaluated.items() if module and isinstance(value, module.Figure)
    }
    scalars = {}
    for name, value in evaluated.items():
        if name not in figures:
            try:
                scalars[name] = float(value)
            except (TypeError, ValueError) as error:
                raise TypeError(
                    f"fit: evaluate must return scalars and matplotlib figures, got a {type(value).__name__} as {name}"
                ) from error
    return scalars, figures


@contextlib.contextmanager
def closing(figures: Mapping[str, Any]) -> Iterator[None]:
    """Close figures after the block: those that pyplot made stay in its memory otherwise."""
    try:
        yield
    finally:
        if pyplot := sys.modules.get("matplotlib.pyplot"):
            for figure in figures.values():
                pyplot.close(figure)


def png(figure: Any) -> bytes:
    """Return a figure as a PNG file."""
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def image(figure: Any) -> Any:
    """Return a figure as an image of Pillow, which matplotlib depends on."""
    from PIL import Image

    return Image.open(io.BytesIO(png(figure)))
