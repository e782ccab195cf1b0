"""The digit network in the page of its run: to draw on, to cut, and to step backwards through."""

from __future__ import annotations

from gradfn.pages.charts import short
from gradfn.pages.live.arrays import as_json, encoded
from gradfn.pages.live.part import Live
from gradfn.runs.digit_net import DigitNet
from gradfn.runs.kept import Kept

LIMIT = 2_500_000  # bytes of the parameters and samples
TOO_LARGE = "The network is too large to run in the page."


def digits(run: Kept, room: int) -> Live | str | None:
    """Return the digit network of a run: see `gradfn.pages.live.KINDS`."""
    net = run.net
    if net is None:
        return TOO_LARGE if run.net_left_out else None
    n_bytes = sum(array.nbytes for array in (*net.params.values(), net.samples, net.labels))
    content = as_json(described(net)) if n_bytes <= LIMIT else ""
    if not content or len(content) > room:
        return TOO_LARGE
    n_layers = sum(1 for name in net.params if name.startswith("W"))
    sizes = [net.params["W1"].shape[1], *(len(net.params[f"W{i}"]) for i in range(1, n_layers + 1))]
    about = {
        "sizes": short("-".join(map(str, sizes))),
        "data": short(net.about["data"]),
        "small": net.spline is not None,
    }
    return Live("digits", "Network", about, content)


def described(net: DigitNet) -> dict[str, object]:
    """Return the network as JSON, its arrays in float32."""
    arrays = net.params | {"samples": net.samples} | ({} if net.spline is None else {"spline": net.spline})
    in_page = {name: encoded(array, "float32") for name, array in arrays.items()}
    return net.about | {"labels": net.labels.tolist(), "arrays": in_page}
