"""Damaged and hostile files of a GPT: reading them for the page ends in one line, which names the file."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save

import gradfn as gf
from gradfn import cli
from gradfn.pages.live._gpt import gpt
from gradfn.runs import language_net
from gradfn.runs.kept import read_run
from gradfn.runs.language_net import load_language_net
from gradfn.train import checkpoint
from tests.report.test_damaged import ANY_JSON, BAD_GPTS, BAD_TENSORS, GPT, LATIN, one_line, refused

MODEL = {
    "net": "gpt",
    "settings": GPT,
    "tokenizer": {"name": "characters", "symbols": "\nabc"},
    "lines": False,
    "samples": ["abc", "cab"],
}
BROKEN = [content for content in ANY_JSON if content != LATIN]  # which is JSON of something else
IGNORED = {"compute", "dropout", "unknown", "__class__"}  # the page does not depend on these settings


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Change to the parent of an undamaged run, and return the run's folder."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "fit"
    (folder / "kept").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n', encoding="utf-8")
    (folder / "model.json").write_text(json.dumps(MODEL), encoding="utf-8")
    shapes = jax.eval_shape(gf.gpt(gf.GPTConfig(**GPT)).init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)
    notes = {"settings": {"seed": 0}, "versions": {}, "finished": True}
    checkpoint.save(folder / "checkpoint.safetensors", {"params": params, "step": np.int32(9)}, notes)
    checkpoint.save(folder / "kept" / "0000000003.safetensors", {"params": params}, {"step": 3})
    return folder


def test_a_damaged_model_is_refused(folder, capsys):
    assert load_language_net(folder).step == 9
    wrong = [
        *(MODEL | {"settings": GPT | settings} for settings in BAD_GPTS if not settings.keys() & IGNORED),
        *(
            MODEL | {key: value}
            for key in ("settings", "lines", "samples", "quiet")
            for value in (3, "a", [3])
        ),
        *(
            MODEL | {"tokenizer": {"name": "characters", "symbols": text}}
            for text in ("", "aabc", "abcde", 3)
        ),
        *(MODEL | {"quiet": {"until": token}} for token in (-1, 4, "a", 10**30)),
        MODEL | {"tokenizer": {"name": "bytes"}},
        MODEL | {"tokenizer": {}},
        MODEL | {"settings": GPT | {"norm_epsilon": -1}},
        MODEL | {"settings": GPT | {"n_heads": 3}},
        MODEL | {"settings": GPT | {"n_heads": 2, "n_kv_heads": 3}},
    ]
    for content in (*BROKEN, *(json.dumps(each).encode() for each in wrong)):
        (folder / "model.json").write_bytes(content)
        refused(lambda: load_language_net(folder), "fit")
    one_line(capsys, ["report", "fit"], "fit")


def test_another_model_is_not_a_gpt(folder):
    for content in ({}, {"net": "mlp"}, {"net": "rnn", "settings": {}}, {"layers": 3}):
        (folder / "model.json").write_text(json.dumps(content), encoding="utf-8")
        assert load_language_net(folder) is None
    (folder / "model.json").unlink()
    assert load_language_net(folder) is None


def test_what_cannot_run_in_a_page_is_a_sentence(folder):
    (folder / "model.json").write_text(json.dumps(MODEL | {"tokenizer": {"name": "tiktoken:gpt2"}}))
    assert "its tokens are those of tiktoken:gpt2" in load_language_net(folder)
    assert cli.main(["report", "fit"]) == 0
    assert "its tokens are those of tiktoken:gpt2" in (folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["checkpoint.safetensors", "kept/0000000003.safetensors"])
def test_damaged_parameters_are_refused(folder, name, capsys):
    def read():
        return gpt(read_run("fit"), 10**7)

    assert read().about["shown"] == 1
    whole = {key: np.ones(shape, np.float32) for key, shape in _shapes(folder).items()}
    key = "params/blocks/1/feed/up/W"
    wrong = [
        {key: value for key, value in whole.items() if key != "params/final_norm/gain"},
        whole | {"params/more": np.ones(2, np.float32)},
        *(
            whole | {key: value}
            for value in (
                np.ones([3, 4], np.float32),
                np.ones([16, 4], np.int32),
                np.full([16, 4], np.nan, np.float32),
            )
        ),
    ]
    steps = [{"step": step} for step in (np.ones(3, np.int32), np.array(np.nan), np.array(np.inf))]
    if name == "checkpoint.safetensors":
        wrong += [whole | step for step in steps]
    metadata = {"notes": '{"settings": {}, "versions": {}, "finished": true}'}
    for content in (*BAD_TENSORS, *(save(arrays, metadata=metadata) for arrays in wrong)):
        (folder / name).write_bytes(content)
        refused(read, name.rpartition("/")[2])
    one_line(capsys, ["report", "fit"], name.rpartition("/")[2])
    (folder / name).unlink()
    (folder / name).symlink_to(folder.parent / "outside")
    refused(read, name.rpartition("/")[2])


def _shapes(folder):
    from gradfn.stored import newest, shapes

    return {name: shape for name, shape in shapes(newest(folder)).items() if name.startswith("params/")}


def test_parameters_that_overflow_leave_a_page(folder):
    """Its numbers are JSON: a loss that is not finite is null."""
    whole = {key: np.full(shape, 3e38, np.float32) for key, shape in _shapes(folder).items()}
    metadata = {"notes": '{"settings": {}, "versions": {}, "finished": true}'}
    (folder / "checkpoint.safetensors").write_bytes(save(whole, metadata=metadata))
    for samples in (MODEL["samples"], []):
        (folder / "model.json").write_text(json.dumps(MODEL | {"samples": samples}), encoding="utf-8")
        content = json.loads(gpt(read_run("fit"), 10**7).content, parse_constant=pytest.fail)
        assert content["dtype"] == "float32"
        assert content["checkpoints"][-1] == {"step": 0, "loss": None}


def test_a_net_that_the_page_does_not_compute_is_named(folder):
    """Every field of the config is one that the page has, one that changes nothing there, or refused."""
    changed = {
        "attention_bias": "qkv", "qk_norm": True, "rope_fraction": 0.5, "rope_base_local": 5.0, "window": 2,
        "rope_scaling": {"kind": "linear", "factor": 2.0}, "global_layers": [1], "score_cap": 2.0, "logit_cap": 2.0,
        "attention_scale": 0.3, "embed_scale": 2.0, "norms_after": True, "parallel": True,
    }  # fmt: skip
    fields = {field.name: field.default for field in dataclasses.fields(gf.GPTConfig)}
    assert fields.keys() == {
        *language_net.Architecture._fields,
        *changed,
        "dropout",
        "compute",
        "scan",
        "remat",
    }
    assert {name: default for name, default in fields.items() if name in changed} == {
        name: tuple(default) if isinstance(default, list) else default
        for name, default in language_net.NOT_IN_PAGE.items()
    }
    for name, value in {**changed, "norm": "rms_unit_offset", "feed": "geglu"}.items():
        model = MODEL | {"settings": GPT | {name: value}}
        (folder / "model.json").write_text(json.dumps(model), encoding="utf-8")
        assert load_language_net(folder).startswith(
            f"The GPT does not run in the page: the page does not compute {name}, which is "
        )
    defaults = {name: default for name, default in fields.items() if name in changed}
    (folder / "model.json").write_text(json.dumps(MODEL | {"settings": GPT | defaults}), encoding="utf-8")
    assert load_language_net(folder).step == 9
