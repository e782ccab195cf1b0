"""The convolutional network in the page of its run: to draw on, to cut, and to step backwards through."""

from __future__ import annotations

from gradfn.pages.charts import short
from gradfn.pages.live.arrays import as_json, encoded
from gradfn.pages.live.part import Live
from gradfn.runs.cnn_net import PAD_SIDE, CnnNet
from gradfn.runs.kept import Kept

LIMIT = 2_500_000  # bytes of the parameters and samples
PRODUCTS = 30_000_000  # of a forward pass: about a tenth of a second in a browser, forward and backward
FILTERS = 512  # of all convolutions: each is a button with a picture
TOO_LARGE = "The convolutional network is too large to run in the page."


def cnn(run: Kept, room: int) -> Live | str | None:
    """Return the convolutional network of a run: see `gradfn.pages.live.KINDS`."""
    if run.cnn is None:
        return TOO_LARGE if run.cnn_left_out else None
    return live_cnn(run.cnn, room)


def live_cnn(net: CnnNet, room: int) -> Live | str:
    """Return a convolutional network as a part of the page of at most `room` bytes, or a sentence why it is not."""
    n_bytes = sum(array.nbytes for array in (*net.params.values(), net.samples, net.labels))
    filters = [len(net.params[f"conv{i + 1}/b"]) for i in range(net.n_convs)]
    if n_bytes > LIMIT or net.products > PRODUCTS or sum(filters) > FILTERS:
        return TOO_LARGE
    content = as_json(described(net))
    if len(content) > room:
        return TOO_LARGE
    window = net.params["conv1/W"].shape[-1]
    about = {
        "filters": short(" and ".join(map(str, filters))),
        "window": f"{window}×{window}",
        "convolutions": net.n_convs,
        "data": short(net.about["data"]),
        "image": net.about["image"],
        "classes": net.classes,
        "samples": len(net.labels),
        # What is drawn has values from 0 to 1: images that are scaled otherwise would not look like it to the network.
        "pad": net.about["image"] == [PAD_SIDE, PAD_SIDE, 1]
        and (not net.samples.size or (net.samples.min() >= 0 and net.samples.max() <= 1)),
        "small": net.spline is not None,
    }
    return Live("cnn", "Network", about, content)


def described(net: CnnNet) -> dict[str, object]:
    """Return the network as JSON, its arrays in float32."""
    arrays = net.params | {"samples": net.samples} | ({} if net.spline is None else {"spline": net.spline})
    in_page = {name: encoded(array, "float32") for name, array in arrays.items()}
    return net.about | {"labels": net.labels.tolist(), "arrays": in_page}
