"""What makes a family of models: how `transformers` describes one in `config.json` and names its tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gradfn.nets._gpt import GPTConfig
from gradfn.nets.families.fields import Fields

# Fields of a config that say how a net is computed, not what it computes.
COMPUTED = ("scan", "remat", "compute", "dropout")
# Fields that every family has.
COMMON = ("vocab", "context", "n_layers", "n_heads", "width", "hidden", "bias", "tied", "norm_epsilon")


class Entry(NamedTuple):
    """Where a file's tensor lies in our tree: one leaf, or several that share the tensor's rows."""

    name: str
    paths: tuple[str, ...]
    # GPT-2 keeps its matrices as [in, out].
    transposed: bool = False
    # The leaves take turns, `heads` times: 1 for all rows of one leaf after those of another. GPT-NeoX keeps queries,
    # keys and values as [heads, 3, size, in].
    heads: int = 1

    def shape(self, parts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """Return the shape of the tensor from those of the leaves."""
        stacked = (sum(part[0] for part in parts), *parts[0][1:])
        return stacked[::-1] if self.transposed else stacked

    def split(self, tensor: np.ndarray, parts: Sequence[tuple[int, ...]]) -> Iterator[np.ndarray]:
        """Return the leaves of these shapes, one after another, as views of the tensor where it is possible."""
        tensor = tensor.T if self.transposed else tensor
        in_turns = tensor.reshape(self.heads, -1, *tensor.shape[1:])  # [heads, rows of a turn, ...]
        end = 0
        for part in parts:
            start, end = end, end + part[0] // self.heads
            yield in_turns[:, start:end].reshape(part)

    def join(self, leaves: Sequence[np.ndarray]) -> np.ndarray:
        """Return the tensor of these leaves."""
        in_turns = [leaf.reshape(self.heads, -1, *leaf.shape[1:]) for leaf in leaves]
        tensor = np.concatenate(in_turns, 1).reshape(-1, *leaves[0].shape[1:])
        return tensor.T if self.transposed else tensor


@dataclasses.dataclass(frozen=True)
class Family:
    """How `transformers` writes the models of one kind.

    Attributes:
        name: the `model_type`.
        architecture: the class of its language model.
        prefix: what the names of all tensors but the head's start with.
        embedding: the tensor that a tied head shares.
        buffers: a regular expression of what older files contain beside the parameters.
        fixed: fields of `GPTConfig` that have one value in all of its models.
        free: fields that may have any value, beside `COMMON`. All others must have their defaults.
        read: the config that a `config.json` describes.
        write: the inverse of `read`; it raises a ValueError for what the family does not have.
        entries: which tensor is which parameter.
        head: the name of the head's tensor.
        always_biased: whether its files contain biases, zeros if need be, also where `config.bias` is false.
    """

    name: str
    architecture: str
    prefix: str
    embedding: str
    buffers: str
    fixed: Mapping[str, Any]
    free: tuple[str, ...]
    read: Callable[[Fields], GPTConfig]
    write: Callable[[GPTConfig], dict[str, Any]]
    entries: Callable[[GPTConfig], list[Entry]]
    head: str = "lm_head.weight"
    always_biased: bool = False

    def fields(self, config: GPTConfig) -> dict[str, Any]:
        """Return the `config.json` of a config.

        Raises:
            ValueError: the family cannot express the config; the message names the field.
        """
        for field in dataclasses.fields(config):
            if field.name in (*COMMON, *COMPUTED, *self.free):
                continue
            expected, actual = self.fixed.get(field.name, field.default), getattr(config, field.name)
            if actual != expected:
                raise ValueError(f"{self.name} has {field.name} {expected!r}, got {actual!r}")
        described = {"architectures": [self.architecture], "model_type": self.name}
        return self.write(config) | described


def normalized(config: GPTConfig) -> GPTConfig:
    """Return a config with None for each size, and for attention's biases, where they equal their defaults."""
    defaults = {
        "n_kv_heads": config.n_heads,
        "head_size": config.width // config.n_heads,
        "hidden": 4 * config.width,
        "attention_bias": config.bias,
    }
    same: dict[str, Any] = {
        name: None for name, default in defaults.items() if getattr(config, name) == default
    }
    return dataclasses.replace(config, **same)


def choose(families: Mapping[str, Family], config: GPTConfig, name: str | None) -> Family:
    """Return the family to write a config as: the named one, or the first that can express it.

    Raises:
        ValueError: none can.
    """
    if name is not None and name not in families:
        raise ValueError(f"save_pretrained: family must be one of {', '.join(families)}; got {name!r}")
    reasons = []
    for family in families.values() if name is None else [families[name]]:
        try:
            family.fields(config)
        except ValueError as error:
            reasons.append(str(error))
        else:
            return family
    raise ValueError(f"save_pretrained: no family has all features of the config: {'; '.join(reasons)}")
