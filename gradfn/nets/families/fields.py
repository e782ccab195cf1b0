"""The fields of a `config.json`: each is read or refused, or known to change no result."""

from __future__ import annotations

import math
import reprlib
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

from jaxtyping import PyTree

from gradfn.files import FileError, read_json

MOST = 2**31 - 1  # of each size in a config


def shown(name: str) -> str:
    """Return a name from a file in a form that is safe to show in an error: on one line, and not too long."""
    return name if name.isprintable() and len(name) <= 200 else f"{name!r:.200}"


def _read_json(file: Path) -> dict[str, Any]:
    if not file.exists():
        raise FileNotFoundError(f"{file}: not there")
    return read_json(file, dict[str, Any])


class Fields:
    """The fields of a `config.json`, each taken once; what is left at the end must be known to do nothing."""

    def __init__(self, file: Path) -> None:
        self.file, self.left = file, _read_json(file)
        self.taken: dict[str, Any] = {}

    def default(self, **values: PyTree) -> None:
        """Say what absent fields stand for in this family."""
        self.left = values | self.left

    def choice(self, name: str, choices: Collection[str], default: str | None = None) -> str:
        """Take a string that is one of some."""
        value = self.left.pop(name, default)
        if not isinstance(value, str) or value not in choices:
            expected = ", ".join(map(repr, choices))
            raise FileError(f"{self.file}: {name}: expected one of {expected}; got {reprlib.repr(value)}")
        return value

    def take(self, name: str, default: Any = None, kind: type | tuple[type, ...] = object) -> PyTree:
        """Take a value of some type. Where the default is False, null stands for it too."""
        value = self.taken[name] = self.left.pop(name, default)
        if value is None and default is False:
            value = False
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and int in kinds):
            names = " or ".join(k.__name__ for k in kinds)
            raise FileError(f"{self.file}: {name}: expected {names}, got {reprlib.repr(value)}")
        return value

    def known(self, name: str) -> PyTree:
        """Return a value, whether it has been taken or not."""
        return self.taken.get(name, self.left.get(name))

    def size(self, name: str, default: int | None) -> PyTree:
        """Take an integer that counts something; it may be null where the default is None."""
        value = self.take(name, default, int if default is not None else (int, type(None)))
        if value is not None and not 1 <= value <= MOST:
            raise FileError(f"{self.file}: {name}: expected 1 to {MOST:,}, got {reprlib.repr(value)}")
        return value

    def positive(self, name: str, value: PyTree) -> float:
        """Return a field's value as a float."""
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise FileError(f"{self.file}: {name}: expected a number above 0, got {reprlib.repr(value)}")
        return float(value)

    def expect(self, **values: PyTree) -> None:
        """Refuse other values than the one that `gf.gpt` stands for; a field that is absent has it."""
        for name, value in values.items():
            actual = self.left.pop(name, value)
            if actual != value and not (actual is None and not value):
                raise FileError(
                    f"{self.file}: {name}: gf.gpt does {value!r} only, got {reprlib.repr(actual)}"
                )

    def end(self) -> None:
        """Refuse fields that nobody took and that say something, but for those of training, text and book-keeping.

        What is null, false or empty asks for nothing: it is named in a warning and passed over.
        """
        unknown = sorted(set(self.left) - WITHOUT_EFFECT)
        for name in unknown:
            value = self.left[name]
            if value is not None and value is not False and value not in ("", [], {}):
                raise FileError(f"{self.file}: {shown(name)}: not supported, got {reprlib.repr(value)}")
        if unknown:
            listed = ", ".join(f"{shown(name)} {self.left[name]!r}" for name in unknown)
            warnings.warn(f"{self.file}: ignored what gradfn does not know: {listed:.500}", stacklevel=3)


# Fields that change neither logits nor gradients without dropout, whatever they say.
WITHOUT_EFFECT = {
    *(
        "_name_or_path",
        "architectures",
        "transformers_version",
        "dtype",
        "torch_dtype",
        "id2label",
        "label2id",
    ),
    *(
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "sep_token_id",
        "unk_token_id",
        "decoder_start_token_id",
    ),
    *("initializer_range", "use_cache", "return_dict", "output_attentions", "output_hidden_states"),
    *("gradient_checkpointing", "problem_type", "num_labels", "finetuning_task", "task_specific_params"),
    *(
        "hidden_dropout",
        "classifier_dropout",
        "resid_pdrop",
        "embd_pdrop",
        "attn_pdrop",
        "attention_dropout",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "chunk_size_feed_forward",
        "n_ctx",
    ),
    *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels"),
    *("summary_first_dropout", "pretraining_tp", "attn_implementation", "_attn_implementation"),
    *("_attn_implementation_autoset", "_commit_hash", "_num_labels", "n_special", "predict_special_tokens"),
    *("output_past", "is_decoder", "is_llama_config", "torchscript", "use_bfloat16", "tie_encoder_decoder"),
    *("tf_legacy_loss", "transformers.js_config", "tokenizer_class", "prefix"),
    # Of generation
    *("do_sample", "max_length", "min_length", "temperature", "top_k", "top_p", "typical_p", "num_beams"),
    *("num_beam_groups", "diversity_penalty", "length_penalty", "repetition_penalty", "early_stopping"),
    *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences"),
    *("output_scores", "return_dict_in_generate", "remove_invalid_values", "suppress_tokens"),
    *("begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "max_new_tokens"),
    *("exponential_decay_length_penalty", "cache_implementation"),
}
