"""MNIST from a folder, the cache, or a verified download; and other data sets in the same four files."""

import os
from pathlib import Path

import numpy as np

from gradfn.data._checks import integer
from gradfn.data.dataset import DataError, Dataset, Examples
from gradfn.data.idx import read, sha256
from gradfn.files import cache_folder
from gradfn.timings import phase

MIRROR = "https://ossci-datasets.s3.amazonaws.com/mnist/"

# sha256 of the decompressed files, which does not depend on how they were compressed.
SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
# Bytes of the decompressed files.
SIZES = {
    "train-images-idx3-ubyte": 47_040_016,
    "train-labels-idx1-ubyte": 60_008,
    "t10k-images-idx3-ubyte": 7_840_016,
    "t10k-labels-idx1-ubyte": 10_008,
}
CLASSES = tuple("0123456789")


@phase("data")
def mnist(
    path: str | os.PathLike[str] | None = None, mirror: str = MIRROR, validation: int = 10_000
) -> Dataset:
    """Load MNIST: 70,000 handwritten digits of 28x28 pixels, verified by their checksums.

    The four standard files (`train-images-idx3-ubyte.gz`, `train-labels-idx1-ubyte.gz`, `t10k-...`, or decompressed
    without `.gz`) are read from one folder, the first of these that is set: `path`, the environment variable
    GRADFN_MNIST, the cache folder (`$XDG_CACHE_HOME/gradfn/mnist`, else `~/.cache/gradfn/mnist`). Files missing from
    the cache folder are downloaded once.

    The contents of every file must have MNIST's sha256. `idx_folder` reads other data in such files (Fashion-MNIST,
    a part of MNIST).

    Args:
        path: the folder with the four files; nothing is ever downloaded into it.
        mirror: http(s) address of the folder to download the `.gz` files from.
        validation: the number of training images for validation, taken from the end of the 60,000. The default
            gives the 50,000/10,000/10,000 split of M. Nielsen, Neural Networks and Deep Learning, 2015.

    Returns:
        A `Dataset`: images [N, 784] float32 from 0 (background) to 1 (stroke), in row-major order; labels [N] int32.

    Raises:
        DataError: a file is missing, damaged, swapped with another or not MNIST's, or cannot be downloaded: the
            mirror cannot be reached, sends more bytes than expected, or fewer than 10,000 bytes per second.
        ValueError: `validation` is not in [0, 59,999].

    The data: Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, Gradient-based learning applied to document
    recognition, Proceedings of the IEEE 86, 1998.

    >>> import gradfn as gf
    >>> data = gf.data.mnist()  # doctest: +SKIP
    >>> gf.data.mnist("no/such/folder")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    gradfn.data.dataset.DataError: no/such/folder: there is no such folder; ...
    """
    given = path if path is not None else os.environ.get("GRADFN_MNIST") or None
    if given is not None:
        folder = Path(given).expanduser()
        return load(folder, validation, "MNIST", SHA256)
    folder = cache_folder("mnist")
    download_missing(folder, mirror)
    try:
        return load(folder, validation, "MNIST", SHA256)
    except DataError as error:
        raise DataError(f"{error}. Delete that file; the next call downloads it again") from error


def idx_folder(path: str | os.PathLike[str], validation: int = 0) -> Dataset:
    """Load a data set in four files named like MNIST's: Fashion-MNIST, KMNIST, a part of MNIST.

    The structure is checked (headers, lengths, one image per label, labels 0 to 9), the contents cannot be.

    Args:
        path: the folder with the four files, `.gz` or decompressed.
        validation: the number of training images for validation, taken from the end.

    Returns:
        A `Dataset` like `mnist`'s, images [N, height*width], named after the folder.

    Raises:
        DataError: a file is missing, truncated or does not match the others; ValueError: bad `validation`.

    >>> import gradfn as gf
    >>> fashion = gf.data.idx_folder("~/data/fashion-mnist")  # doctest: +SKIP
    >>> gf.data.idx_folder("no/such/folder")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    gradfn.data.dataset.DataError: no/such/folder: there is no such folder; ...
    """
    folder = Path(path).expanduser()
    return load(folder, validation, f"IDX files in {folder}", {})


def load(folder: Path, validation: int, name: str, sums: dict[str, str]) -> Dataset:
    """Read the four files of a folder, verify them against `sums` if given, and split off the validation part."""
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder; name the one with {', '.join(SHA256)} (.gz)")
    (x, y), train_shape = load_part(folder, "train", sums)
    test, test_shape = load_part(folder, "t10k", sums)
    if train_shape != test_shape:
        raise DataError(f"{folder}: training images are {train_shape} pixels, test images {test_shape}")
    kept = len(y) - integer("validation", validation, 0, len(y) - 1)
    return Dataset((x[:kept], y[:kept]), (x[kept:], y[kept:]), test, name, train_shape, CLASSES)


def load_part(folder: Path, part: str, sums: dict[str, str]) -> tuple[Examples, tuple[int, int]]:
    """Read the images and labels of one part, `train` or `t10k`; return them and the shape of an image."""
    image_file = find(folder, f"{part}-images-idx3-ubyte")
    label_file = find(folder, f"{part}-labels-idx1-ubyte")
    limit = max(SIZES.values()) if sums else None  # the largest of all, so that swapped files are recognized
    images, labels = read(image_file, str(image_file), limit), read(label_file, str(label_file), limit)
    for file, array, ndim, what in ((image_file, images, 3, "images"), (label_file, labels, 1, "labels")):
        if array.ndim != ndim:
            raise DataError(
                f"{file}: expected {what} with {ndim} dimension(s), got shape {list(array.shape)}. Was it swapped "
                "with another file?"
            )
    if len(images) != len(labels):
        raise DataError(
            f"{image_file}: expected {len(labels):,} images, as many as labels in {label_file.name}, got "
            f"{len(images):,}. Was one swapped with another file?"
        )
    if labels.max() >= len(CLASSES):
        first = int(np.argmax(labels >= len(CLASSES)))
        raise DataError(f"{label_file}: labels must be from 0 to 9, got {labels[first]} at index {first:,}")
    if sums:
        check_sum(image_file, f"{part}-images-idx3-ubyte", images, sums)
        check_sum(label_file, f"{part}-labels-idx1-ubyte", labels, sums)
    count, height, width = images.shape
    try:
        x = images.reshape(count, height * width) / np.float32(255)  # [N, H, W] uint8 -> [N, H*W] float32
    except MemoryError as error:
        raise DataError(f"{image_file}: the images do not fit in memory as float32") from error
    return (x, labels.astype(np.int32)), (height, width)


def check_sum(file: str | Path, name: str, array: np.ndarray, sums: dict[str, str]) -> None:
    """Raise a DataError unless the sha256 of a file's contents is `sums[name]`."""
    actual = sha256(array)
    if actual == sums[name]:
        return
    if other := next((other for other, known in sums.items() if known == actual), None):
        raise DataError(
            f"{file}: expected MNIST's {name}, got its {other}. The files were swapped: rename them"
        )
    raise DataError(
        f"{file}: damaged or not MNIST: expected sha256 {sums[name]}, got {actual}. "
        "Download it again (for other data in such files: gf.data.idx_folder)"
    )


def find(folder: Path, name: str) -> Path:
    """Return the file called `name`, compressed or not."""
    for file in (folder / f"{name}.gz", folder / name):
        if file.exists():
            return file
    raise DataError(f"{folder / name}.gz: there is no such file, nor {name} without .gz")


def download_missing(folder: Path, mirror: str) -> None:
    """Download the files that are missing from the folder, and verify each before it gets its name."""
    missing = [name for name in SHA256 if not any((folder / f).exists() for f in (name, f"{name}.gz"))]
    if not missing:
        return
    if not mirror.startswith(("http://", "https://")):
        raise ValueError(f"mirror must be an address that starts with https:// or http://, got {mirror!r}")
    from gradfn.data.download import Wanted, download  # urllib's network parts are slow to import

    names = {f"{mirror.rstrip('/')}/{name}.gz": name for name in missing}

    def check(address: str, file: Path) -> None:
        check_sum(address, names[address], read(file, address, max(SIZES.values())), SHA256)

    # An upper bound for any compressor: gzip grows incompressible data by less than one percent.
    limits = {name: size + size // 100 + 1000 for name, size in SIZES.items()}
    download(
        {address: Wanted(folder / f"{name}.gz", limits[name]) for address, name in names.items()},
        check,
        otherwise="Try another mirror=..., or pass a folder with the files as path=... or GRADFN_MNIST",
    )
