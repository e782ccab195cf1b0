"""Data sets as numpy arrays: handwritten digits, MNIST, a regression set, splits, shuffled batches."""

from gradfn.data.batches import batches, epoch_order
from gradfn.data.dataset import DataError, Dataset
from gradfn.data.diabetes import diabetes
from gradfn.data.digits import digits
from gradfn.data.idx import read_idx
from gradfn.data.mnist import idx_folder, mnist
from gradfn.data.split import split

__all__ = [
    "DataError",
    "Dataset",
    "batches",
    "diabetes",
    "digits",
    "epoch_order",
    "idx_folder",
    "mnist",
    "read_idx",
    "split",
]
