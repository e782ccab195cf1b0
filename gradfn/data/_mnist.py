"""MNIST from a folder, the cache, or one checked download; and other data in the same four files."""

import os
from pathlib import Path

import numpy as np

from gradfn.data._checks import whole
from gradfn.data.dataset import DataError, Dataset, Examples
from gradfn.data.idx import read, sha256

MIRROR = "https://ossci-datasets.s3.amazonaws.com/mnist/"

# sha256 of the decompressed files: the same whoever compressed them, and however.
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


def mnist(
    path: str | os.PathLike[str] | None = None, mirror: str = MIRROR, validation: int = 10_000
) -> Dataset:
    """Load MNIST: 70,000 handwritten digits of 28x28 pixels, checked to be exactly that.

    The four standard files (`train-images-idx3-ubyte.gz`, `train-labels-idx1-ubyte.gz`, `t10k-...`;
    decompressed ones without `.gz` do too) are looked for in one place, the first of these that is set:
    `path`, the environment variable GRADFN_MNIST, the cache folder (`$XDG_CACHE_HOME/gradfn/mnist`, else
    `~/.cache/gradfn/mnist`). Only what is missing from the cache folder is downloaded, once.

    Every file's contents must have MNIST's sha256, wherever they came from. Other data in such files
    (Fashion-MNIST, a part of MNIST) is what `idx_folder` reads.

    Args:
        path: the folder with the four files; nothing is ever downloaded into it.
        mirror: http(s) address of the folder to download the `.gz` files from.
        validation: how many of the 60,000 training images, the last ones, to keep for validation. The default
            gives the 50,000/10,000/10,000 split of M. Nielsen, Neural Networks and Deep Learning, 2015.

    Returns:
        A `Dataset`: images [N, 784] float32 from 0 (paper) to 1 (ink), row after row; labels [N] int32.

    Raises:
        DataError: a file is missing, damaged, swapped with another or not MNIST's, or cannot be downloaded: the
            mirror is not reached, sends more than the file can have, or less than 10,000 bytes a second;
        ValueError: `validation` is not in 0 ... 59,999.

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
    folder = cache_folder()
    download_missing(folder, mirror)
    try:
        return load(folder, validation, "MNIST", SHA256)
    except DataError as error:
        raise DataError(f"{error}. Delete that file, and the next call downloads it anew.") from error


def idx_folder(path: str | os.PathLike[str], validation: int = 0) -> Dataset:
    """Load any data kept in four files named like MNIST's: Fashion-MNIST, KMNIST, a part of MNIST.

    Structure is checked (headers, lengths, an image for each label, labels 0 to 9), contents cannot be.

    Args:
        path: the folder with the four files, `.gz` or decompressed.
        validation: how many training images, the last ones, to keep for validation.

    Returns:
        A `Dataset` as `mnist` gives, images [N, height*width], named after the folder.

    Raises:
        DataError: a file is missing, cut off or does not fit the others; ValueError: bad `validation`.

    >>> import gradfn as gf
    >>> fashion = gf.data.idx_folder("~/data/fashion-mnist")  # doctest: +SKIP
    >>> gf.data.idx_folder("no/such/folder")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    gradfn.data.dataset.DataError: no/such/folder: there is no such folder; ...
    """
    folder = Path(path).expanduser()
    return load(folder, validation, f"IDX files in {folder}", {})


def load(folder: Path, validation: int, name: str, sums: dict[str, str]) -> Dataset:
    """Read the four files of a folder, compare them with `sums` where given, and split off the validation."""
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder; name the one with {', '.join(SHA256)} (.gz)")
    (x, y), train_shape = load_part(folder, "train", sums)
    test, test_shape = load_part(folder, "t10k", sums)
    if train_shape != test_shape:
        raise DataError(f"{folder}: training images are {train_shape} pixels, test images {test_shape}")
    kept = len(y) - whole("validation", validation, 0, len(y) - 1)
    return Dataset((x[:kept], y[:kept]), (x[kept:], y[kept:]), test, name, train_shape, CLASSES)


def load_part(folder: Path, part: str, sums: dict[str, str]) -> tuple[Examples, tuple[int, int]]:
    """Read images and labels of one part, "train" or "t10k"; return them and the shape of an image."""
    image_file = find(folder, f"{part}-images-idx3-ubyte")
    label_file = find(folder, f"{part}-labels-idx1-ubyte")
    limit = max(SIZES.values()) if sums else None  # the largest, to tell when files were swapped
    images, labels = read(image_file, str(image_file), limit), read(label_file, str(label_file), limit)
    for file, array, ndim, what in ((image_file, images, 3, "images"), (label_file, labels, 1, "labels")):
        if array.ndim != ndim:
            raise DataError(
                f"{file}: holds an array of shape {list(array.shape)}, but {what} have {ndim} dimension(s): "
                "was it swapped with another file?"
            )
    if len(images) != len(labels):
        raise DataError(
            f"{image_file}: holds {len(images):,} images, but {label_file.name} {len(labels):,} labels: "
            "they do not belong together; was one swapped with another file?"
        )
    if labels.max() >= len(CLASSES):
        first = int(np.argmax(labels >= len(CLASSES)))
        raise DataError(
            f"{label_file}: labels must be 0 to 9, but number {first:,} (from 0) is {labels[first]}"
        )
    if sums:
        check_sum(image_file, f"{part}-images-idx3-ubyte", images, sums)
        check_sum(label_file, f"{part}-labels-idx1-ubyte", labels, sums)
    count, height, width = images.shape
    try:
        x = images.reshape(count, height * width) / np.float32(255)  # [N, H, W] uint8 -> [N, H*W] float32
    except MemoryError as error:
        raise DataError(f"{image_file}: its images do not fit in memory as float32") from error
    return (x, labels.astype(np.int32)), (height, width)


def check_sum(file: str | Path, name: str, array: np.ndarray, sums: dict[str, str]) -> None:
    """Raise a DataError unless a file's array is byte for byte what `sums` has under `name`."""
    actual = sha256(array)
    if actual == sums[name]:
        return
    if other := next((other for other, known in sums.items() if known == actual), None):
        raise DataError(f"{file}: holds MNIST's {other}, not its {name}: the files were swapped; rename them")
    raise DataError(
        f"{file}: damaged, or not MNIST: the sha256 of its contents is {actual}, expected {sums[name]}. "
        "Fetch it again (other data in such files: gradfn.data.idx_folder)"
    )


def find(folder: Path, name: str) -> Path:
    """Return the file called `name`, compressed or not."""
    for file in (folder / f"{name}.gz", folder / name):
        if file.exists():
            return file
    raise DataError(f"{folder / name}.gz: there is no such file, nor {name} without .gz; put it there")


def cache_folder() -> Path:
    """Return where downloads are kept, by the XDG base directory specification."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The specification says to ignore a relative path.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "gradfn" / "mnist"


def download_missing(folder: Path, mirror: str) -> None:
    """Bring those of the four files that the folder lacks from the mirror, each checked before it is kept."""
    missing = [name for name in SHA256 if not any((folder / f).exists() for f in (name, f"{name}.gz"))]
    if not missing:
        return
    if not mirror.startswith(("http://", "https://")):
        raise ValueError(f"mirror must be an address that starts with https:// or http://, got {mirror!r}")
    from gradfn.data.download import Wanted, download  # urllib's network parts are slow to import

    names = {f"{mirror.rstrip('/')}/{name}.gz": name for name in missing}

    def check(address: str, file: Path) -> None:
        check_sum(address, names[address], read(file, address, max(SIZES.values())), SHA256)

    # Whoever compressed them: what gzip cannot make smaller, it makes larger by less than a hundredth.
    limits = {name: size + size // 100 + 1000 for name, size in SIZES.items()}
    download(
        {address: Wanted(folder / f"{name}.gz", limits[name]) for address, name in names.items()},
        check,
        otherwise="Try another mirror=..., or name a folder with the files by path=... or GRADFN_MNIST.",
    )
