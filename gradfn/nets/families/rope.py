"""The fields of `config.json` about RoPE, under the names of all versions of `transformers`."""

from __future__ import annotations

import math
import reprlib
from typing import Any, get_args

from gradfn.files import FileError
from gradfn.layers._rope import Kind, RopeScaling
from gradfn.nets._gpt import GPTConfig
from gradfn.nets.families.fields import Fields

# The settings of each kind beside its factor and its original context.
SETTINGS: dict[str, tuple[str, ...]] = {
    "linear": (),
    "dynamic": (),
    "yarn": ("beta_fast", "beta_slow", "attention_factor", "truncate"),
    "llama3": ("low_freq_factor", "high_freq_factor"),
}
EXTRA = ("mscale", "mscale_all_dim")  # of YaRN: the attention factor is computed from them


def read_rope(fields: Fields, base: float = 10_000.0) -> dict[str, Any]:
    """Return `rope_base` and `rope_scaling` of a config."""
    dicts = {
        name: fields.take(name, None, (dict, type(None))) or {}
        for name in ("rope_scaling", "rope_parameters")
    }
    theta = fields.take("rope_theta", base)
    for given in dicts.values():
        theta = given.get("rope_theta", theta)
    both = [_named(given, theta) for given in dicts.values() if given]
    if len(both) == 2 and both[0] != both[1]:
        raise FileError(
            f"{fields.file}: rope_scaling: differs from rope_parameters, got "
            f"{reprlib.repr(dicts['rope_scaling'])} and {reprlib.repr(dicts['rope_parameters'])}"
        )
    name = "rope_scaling" if dicts["rope_scaling"] else "rope_parameters"
    scaling = _read_scaling(fields, name, dicts[name])
    return {"rope_base": fields.positive("rope_theta", theta), "rope_scaling": scaling}


def _named(given: dict[str, Any], theta: Any) -> dict[str, Any]:
    """Return the settings that say something, under their newer names."""
    kind = given.get("rope_type", given.get("type", "default"))
    rest = {
        key: value for key, value in given.items() if key not in ("type", "finetuned") and value is not None
    }
    return {"rope_theta": theta, **rest, "rope_type": kind}


def _read_scaling(fields: Fields, name: str, given: dict[str, Any]) -> RopeScaling | None:
    settings = _named(given, None)
    kind = settings.pop("rope_type")
    del settings["rope_theta"]
    if settings.get("partial_rotary_factor") == 1:
        del settings["partial_rotary_factor"]
    if kind == "default" and all(value == 1 for value in settings.values()):
        return None
    known = SETTINGS.get(kind) if isinstance(kind, str) else None
    allowed = {
        "factor",
        "original_max_position_embeddings",
        *(known or ()),
        *(EXTRA if kind == "yarn" else ()),
    }
    if known is None or not settings.keys() <= allowed:
        kinds = ", ".join(map(repr, ("default", *get_args(Kind))))
        raise FileError(
            f"{fields.file}: {name}: gf.gpt does rope_type {kinds} with their own settings only, got "
            f"{reprlib.repr(given)}"
        )
    absent = {"factor", *(known if kind == "llama3" else ())} - settings.keys()
    if absent:
        raise FileError(f"{fields.file}: {name}: {kind} needs {min(absent)}, got {reprlib.repr(given)}")
    numbers: dict[str, Any] = {
        key: value if key == "truncate" else fields.positive(f"{name}: {key}", value)
        for key, value in settings.items()
    }
    # transformers computes dynamic scaling from the context, wherever else the original one is.
    context = fields.known("max_position_embeddings")
    original = numbers.pop("original_max_position_embeddings", context)
    if kind == "dynamic" and original != context:
        raise FileError(
            f"{fields.file}: {name}: dynamic scaling starts at max_position_embeddings {context}, got {original}"
        )
    extra = [numbers.pop(key, None) for key in EXTRA]
    if all(extra) and "attention_factor" not in numbers:
        log = 0.1 * math.log(max(numbers["factor"], 1))
        numbers["attention_factor"] = (log * extra[0] + 1) / (log * extra[1] + 1)
    try:
        return RopeScaling(kind, original_context=None if kind == "linear" else int(original), **numbers)
    except (ValueError, TypeError) as error:
        raise FileError(f"{fields.file}: {name}: {error}") from error


def write_rope(config: GPTConfig) -> dict[str, Any]:
    """Return the inverse of `read_rope`, for old and new versions of transformers."""
    scaling = config.rope_scaling
    if scaling is None:
        parameters: dict[str, Any] = {"rope_type": "default"}
    else:
        parameters = {"rope_type": scaling.kind, "factor": scaling.factor}
        parameters |= {name: getattr(scaling, name) for name in SETTINGS[scaling.kind]}
        if scaling.kind in ("yarn", "llama3"):
            parameters["original_max_position_embeddings"] = scaling.original_context
        parameters = {name: value for name, value in parameters.items() if value is not None}
    written: dict[str, Any] = {"rope_theta": config.rope_base}  # where older versions look
    if scaling is not None:
        written["rope_scaling"] = parameters  # too
        if scaling.kind == "dynamic":
            written["max_position_embeddings"] = scaling.original_context
    return written | {"rope_parameters": {"rope_theta": config.rope_base, **parameters}}
