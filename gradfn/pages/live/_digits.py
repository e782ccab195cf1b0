"""The digit network in the page of its run: to draw on, to cut, and to step backwards through."""

from __future__ import annotations

from gradfn.pages.charts import short
from gradfn.pages.live._half import is_close
from gradfn.pages.live.arrays import as_json, encoded
from gradfn.pages.live.part import Live
from gradfn.runs.described_net import too_large
from gradfn.runs.digit_net import DigitNet
from gradfn.runs.kept import Kept

TOO_LARGE = "The network is too large to run in the page."


def digits(run: Kept, room: int) -> Live | str | None:
    """Return the digit network of a run: see `gradfn.pages.live.KINDS`."""
    if run.net is None:
        return TOO_LARGE if run.net_left_out else None
    return live_digits(run.net, room)


def live_digits(net: DigitNet, room: int) -> Live | str:
    """Return a digit network as a part of the page of at most `room` bytes, or a sentence why it is not."""
    n_layers = sum(1 for name in net.params if name.startswith("W"))
    sizes = [net.params["W1"].shape[1], *(len(net.params[f"W{i}"]) for i in range(1, n_layers + 1))]
    about = {
        "sizes": short("-".join(map(str, sizes))),
        "data": short(net.about["data"]),
        "small": net.spline is not None,
        "samples": len(net.labels),
    }
    loss = "classification_loss" if net.about["loss"] == "cross-entropy" else "quadratic_loss"
    settings = net.about["activation"], net.about["output"], loss
    for dtype in ("float32", "float16"):
        if dtype == "float16" and not is_close(net.params, *settings, net.samples, net.labels):
            break
        content = as_json(described(net, dtype))
        if len(content) <= room:
            return Live("digits", "Network", about | {"half": dtype == "float16"}, content)
    return too_large(sum(array.size for array in net.params.values()), room)


def described(net: DigitNet, dtype: str = "float32") -> dict[str, object]:
    """Return the network as JSON, its parameters in a dtype."""
    in_page = {name: encoded(array, dtype) for name, array in net.params.items()}
    others = {"samples": net.samples} | ({} if net.spline is None else {"spline": net.spline})
    in_page |= {name: encoded(array, "float32") for name, array in others.items()}
    return net.about | {"labels": net.labels.tolist(), "arrays": in_page}
