"""`gf.report(folder)`: the page of a run, from Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gradfn.pages.page import write_report
from gradfn.runs.about import abouts


def report(
    folder: str | Path,
    other: str | Path | None = None,
    out: str | Path | None = None,
    *,
    examples: tuple[Any, Any] | None = None,
) -> Path:
    """Write the page of a run, or of two side by side: one HTML file of at most 5 MB that works offline.

    It shows the losses and metrics, the gradient of each parameter over training (where `inspect_every` was set), the
    noise scale, the parameters and the versions. A network of `gf.mlp`, `gf.cnn` or `gf.gpt` runs in it, forward and
    backward, if its loss is gradfn's own, such as `gf.batch_mean(gf.regression_loss(net))`.

    Args:
        folder: of the run: that of `gf.fit(..., folder=folder)`, or of an experiment; or an experiment's name for its
            latest run.
        other: a second run, to compare.
        out: the file; by default `report.html` in the run's folder, or `against-<other>.html` in the first one's.
        examples: `(x, y)`, some examples as the loss takes them, for the page to show and to compute with: inputs
            `[n, ...]` and targets `[n, ...]`. They are stored in the page alone.

    Returns:
        The file.

    Raises:
        RunError: there is no such run; or `out` cannot be written, or is an existing file that is not a page of
            gradfn.
        FileError: a file of the run cannot be read; it names the file.
        ValueError: examples that are not arrays of numbers of one length, or that do not fit the network, or for a
            run whose network does not take any.
        ImportError: jinja2 is not installed.

    >>> import tempfile, jax, jax.numpy as jnp, optax, gradfn as gf
    >>> folder, net = tempfile.mkdtemp(), gf.mlp([2, 8, 1], "tanh")
    >>> x = jax.random.normal(jax.random.key(0), [100, 2])
    >>> loss, start = gf.batch_mean(gf.regression_loss(net)), net.init(jax.random.key(1))
    >>> fitted = gf.fit(loss, start, (x, jnp.sin(x[:, 0])), optax.adam(0.01), 50, folder=folder, progress=False)
    >>> gf.report(folder, examples=(x[:5], jnp.sin(x[:5, 0]))).name
    'report.html'
    """
    runs = [folder] if other is None else [folder, other]
    x, y = examples or (None, None)
    arrays = None if examples is None else (np.asarray(x), np.asarray(y))
    return write_report(runs, out, abouts(), examples=arrays)
