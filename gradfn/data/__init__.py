"""Data sets as numpy arrays: digits, MNIST, a regression set and texts; with splits, batches and windows."""

from typing import TYPE_CHECKING

from gradfn._missing import namespace
from gradfn.data._batches import batches, epoch_order
from gradfn.data._diabetes import diabetes
from gradfn.data._digits import digits
from gradfn.data._huggingface import huggingface
from gradfn.data._mnist import idx_folder, mnist
from gradfn.data._split import split
from gradfn.data._stop import stop_at
from gradfn.data._text import Lines, Text, lines, python_topics, text, tokenize
from gradfn.data._tokenizer import Tokenizer, characters, tiktoken, tokenizer, tokenizer_from, utf8_bytes
from gradfn.data._windows import fixed_windows, host_windows, windows
from gradfn.data.dataset import DataError, Dataset
from gradfn.data.file_tokens import FileTokens
from gradfn.data.idx import read_idx

__all__ = [
    "DataError",
    "Dataset",
    "FileTokens",
    "Lines",
    "Text",
    "Tokenizer",
    "batches",
    "characters",
    "diabetes",
    "digits",
    "epoch_order",
    "fixed_windows",
    "host_windows",
    "huggingface",
    "idx_folder",
    "lines",
    "mnist",
    "python_topics",
    "read_idx",
    "split",
    "stop_at",
    "text",
    "tiktoken",
    "tokenize",
    "tokenizer",
    "tokenizer_from",
    "utf8_bytes",
    "windows",
]

if not TYPE_CHECKING:
    __getattr__, __dir__ = namespace(__name__, __all__)
