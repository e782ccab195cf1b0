"""Weights in Hugging Face's format, compared with `transformers` and PyTorch on small random models."""

import contextlib
import dataclasses
import json
import os
import struct
import time
import tracemalloc

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import gradfn as gf

TOKENS = np.array([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])
GPT2 = gf.GPTConfig(vocab=13, context=16, n_layers=2, n_heads=2, width=8)
LLAMA = gf.GPTConfig(
    13, 16, 2, 4, 16, 2, None, 24, positions="rope", norm="rms", feed="swiglu", bias=False, tied=False
)
QWEN2 = dataclasses.replace(LLAMA, attention_bias="qkv")


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch", reason="needs PyTorch: pip install torch")
    return pytest.importorskip("transformers", reason="needs transformers: pip install transformers")


def their_model(transformers, kind, **changes):
    import torch

    torch.manual_seed(0)
    if kind == "gpt2":
        sizes = {"vocab_size": 13, "n_positions": 16, "n_embd": 8, "n_layer": 2, "n_head": 2}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes | changes))
    else:
        sizes = {"vocab_size": 13, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | changes))
    for parameter in model.parameters():  # not the symmetric initial values
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


CASES = {
    "gpt2": ("gpt2", {}),
    "gpt2, own head, exact gelu, own width": (
        "gpt2",
        {"tie_word_embeddings": False, "activation_function": "gelu", "n_inner": 12},
    ),
    "llama": ("llama", {}),
    "llama, tied, biases, own head size": (
        "llama",
        {
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
            "head_dim": 6,
            "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"},
        },
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_logits_loss_gradients_and_generation_equal_transformers(name, transformers, tmp_path):
    import torch

    kind, changes = CASES[name]
    model = their_model(transformers, kind, **changes)
    model.save_pretrained(tmp_path / "model")
    config, params = gf.load_pretrained(tmp_path / "model")
    net = gf.gpt(config)

    answer = model(torch.tensor(TOKENS), labels=torch.tensor(TOKENS))
    logits = jax.jit(jax.vmap(net.apply, (None, 0)))(params, TOKENS)
    np.testing.assert_allclose(logits, answer.logits.detach(), rtol=1e-4, atol=1e-5)

    loss = gf.batch_mean(gf.next_token_loss(net))
    value, grads = jax.jit(jax.value_and_grad(loss))(params, (TOKENS[:, :-1], TOKENS[:, 1:]))
    np.testing.assert_allclose(value, answer.loss.item(), rtol=1e-5)

    # Convert their gradients like weights: write them into a model, save it, and load it.
    answer.loss.backward()
    for parameter in model.parameters():
        parameter.data = parameter.grad
    model.save_pretrained(tmp_path / "gradients")
    _, their_grads = gf.load_pretrained(tmp_path / "gradients")
    assert gf.shapes(their_grads) == gf.shapes(grads)
    for (path, ours), theirs in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(their_grads)):
        assert np.abs(theirs).max() > 0, path
        # The bias of keys shifts all scores of a query equally: its gradient is only rounding error.
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6, err_msg=str(path))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_greedy_generation_equals_transformers(kind, transformers, tmp_path):
    import torch

    model = their_model(transformers, kind)
    model.save_pretrained(tmp_path)
    config, params = gf.load_pretrained(tmp_path)
    scanned = dataclasses.replace(config, scan=True)
    prompt = TOKENS[:1, :4]
    theirs = model.generate(
        torch.tensor(prompt), max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0
    )
    for net, its_params in ((gf.gpt(config), params), (gf.gpt(scanned), gf.stack_blocks(params))):
        ours = gf.generate(net, its_params, prompt[0], 12, temperature=0)
        np.testing.assert_array_equal(ours, theirs[0, 4:])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("config", [GPT2, dataclasses.replace(GPT2, bias=False, tied=False), LLAMA])
def test_transformers_loads_saved_models(config, dtype, transformers, tmp_path):
    import torch

    config = dataclasses.replace(config, scan=True)
    net = gf.gpt(config)
    params = jax.jit(net.init)(jax.random.key(0))
    params = jax.tree.map(lambda leaf: (4 * leaf).astype(dtype), params)
    gf.save_pretrained(tmp_path, config, params)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    theirs = model(torch.tensor(TOKENS[:1])).logits[0].detach()
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    np.testing.assert_allclose(jax.jit(net.apply)(wide, TOKENS[0]), theirs, rtol=1e-4, atol=1e-5)


def saved(folder, config=GPT2, dtype=jnp.float32):
    spec, rng = gf.gpt(config).spec, np.random.default_rng(0)
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), dtype), spec)
    gf.save_pretrained(folder, config, params)
    return params


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("config", [GPT2, LLAMA])
def test_saving_and_loading_round_trips(config, dtype, tmp_path):
    params = saved(tmp_path, config, dtype)
    config_again, again = gf.load_pretrained(tmp_path, dtype=None)
    assert config_again == config
    chex.assert_trees_all_equal(again, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(again)} == {jnp.dtype(dtype)}
    assert {leaf.dtype for leaf in jax.tree.leaves(gf.load_pretrained(tmp_path)[1])} == {jnp.dtype("float32")}


@pytest.mark.parametrize("dtype", ["float32", None])
@pytest.mark.parametrize("config", [GPT2, LLAMA])
def test_reading_in_parts_changes_nothing(config, dtype, tmp_path, monkeypatch):
    params = saved(tmp_path, config, "bfloat16")
    monkeypatch.setattr("gradfn.nets.pretrained.PART", 100)
    _, again = gf.load_pretrained(tmp_path, dtype)
    chex.assert_trees_all_equal(again, jax.tree.map(lambda leaf: leaf.astype(dtype or leaf.dtype), params))


def split(folder):
    """Split the file of a folder into two shards."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, of in shards.items():
        save_file({name: tensors[name] for name in of}, folder / file)
    where = {name: file for file, of in shards.items() for name in of}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def test_shards_are_merged(tmp_path):
    params = saved(tmp_path)
    split(tmp_path)
    chex.assert_trees_all_equal(gf.load_pretrained(tmp_path)[1], params)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.safetensors: not there, though the index names it"):
        gf.load_pretrained(tmp_path)


def test_a_shard_elsewhere_or_without_its_tensor_raises(tmp_path):
    saved(tmp_path)
    split(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["more"] = "a.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"more: missing, though model\.safetensors\.index\.json says it is here"
    ):
        gf.load_pretrained(tmp_path)
    index.write_text(json.dumps({"weight_map": {"x": "../secret.safetensors"}}))
    with pytest.raises(
        ValueError, match=r"expected the name of a file beside it, got '\.\./secret\.safetensors'"
    ):
        gf.load_pretrained(tmp_path)


def test_older_files_with_masks_without_prefix_and_with_the_tied_head_load(tmp_path):
    params = saved(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    bare |= {"h.0.attn.bias": np.ones([1, 1, 16, 16], np.uint8), "lm_head.weight": bare["wte.weight"]}
    save_file(bare, tmp_path / "model.safetensors")
    chex.assert_trees_all_equal(gf.load_pretrained(tmp_path)[1], params)
    save_file(bare | {"lm_head.weight": 2 * bare["wte.weight"]}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head\.weight: differs from transformer\.wte\.weight, though"):
        gf.load_pretrained(tmp_path)


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_a_tensor_of_another_shape_is_named(tmp_path):
    name = "transformer.h.1.mlp.c_fc.weight"
    saved(tmp_path)
    edit(tmp_path, lambda t: t.update({name: np.ascontiguousarray(t[name].T)}))
    with pytest.raises(
        ValueError, match=rf"{name}: expected \[8, 32\] of F16, BF16, F32, F64, got \[32, 8\] of F32"
    ):
        gf.load_pretrained(tmp_path)
    edit(tmp_path, lambda t: t.update({name: t[name].T.astype(np.int32)}))
    with pytest.raises(
        ValueError, match=rf"{name}: expected \[8, 32\] of F16, BF16, F32, F64, got \[8, 32\] of I32"
    ):
        gf.load_pretrained(tmp_path)
    edit(tmp_path, lambda t: t.update({"transformer.h.1.mlp.fc.weight": t.pop(name)}))
    with pytest.raises(
        ValueError, match=rf"{name}: missing \(1 of 28 are\)\. Left over is .*mlp\.fc\.weight"
    ):
        gf.load_pretrained(tmp_path)
    saved(tmp_path)
    edit(tmp_path, lambda t: t.update({"transformer.h.2.ln_1.weight": np.ones(8, np.float32)}))
    with pytest.raises(
        ValueError, match=r"transformer\.h\.2\.ln_1\.weight: no parameter of this model \(1 are"
    ):
        gf.load_pretrained(tmp_path)


def test_a_truncated_file_raises(tmp_path):
    saved(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for n in (0, 5, 100, len(whole) - 1):
        file.write_bytes(whole[:n])
        with pytest.raises(ValueError, match=r"model\.safetensors: not a readable safetensors file"):
            gf.load_pretrained(tmp_path)


def test_pickled_weights_are_not_read(tmp_path):
    saved(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin is pickled and never read"):
        gf.load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("config", "field", "value", "message"),
    [
        (GPT2, "scale_attn_by_inverse_layer_idx", True, "gf.gpt does False only, got True"),
        (GPT2, "activation_function", "mish", "expected one of 'gelu_new', .*; got 'mish'"),
        (GPT2, "sliding_window", 4, "not supported, got 4"),
        (GPT2, "n_embd", "8", "expected int, got '8'"),
        (GPT2, "n_layer", True, "expected int, got True"),
        (GPT2, "model_type", "bert", "expected one of 'gpt2', 'llama'.*; got 'bert'"),
        (LLAMA, "hidden_act", "gelu", "gf.gpt does 'silu' only, got 'gelu'"),
        (LLAMA, "rope_parameters", {"type": "linear"}, "linear needs factor"),
        (LLAMA, "rope_parameters", {"type": "linear", "factor": 0.5}, "RopeScaling: factor must be"),
        (LLAMA, "rope_parameters", {"type": "linear", "factor": "2"}, "factor: expected a number above 0"),
        (LLAMA, "rope_parameters", {"rope_type": "llama3", "factor": 8}, "llama3 needs high_freq_factor"),
        (
            LLAMA,
            "rope_parameters",
            {"rope_type": "longrope", "factor": 8},
            "gf.gpt does rope_type 'default',",
        ),
        (LLAMA, "rope_parameters", {"rope_type": "linear", "factor": 8, "alpha": 2}, "gf.gpt does rope_type"),
        (LLAMA, "rope_scaling", {"type": "linear", "factor": 2}, "differs from rope_parameters"),
        (QWEN2, "layer_types", ["full_attention"], "expected 2 of 'sliding_attention' or 'full_attention'"),
        (QWEN2, "layer_types", ["sliding_attention"] * 2, "'sliding_attention' needs use_sliding_window"),
        (LLAMA, "quantization_config", {"bits": 4}, "not supported, got {'bits': 4}"),
    ],
)
def test_a_field_that_is_not_supported_is_named(config, field, value, message, tmp_path):
    saved(tmp_path, config)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {field: value}))
    with pytest.raises(ValueError, match=f"{field}: {message}"):
        gf.load_pretrained(tmp_path)


# Fields beside the sizes in the configurations of well-known models on the hub.
SUMMARY = {
    **{"summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True},
    **{"summary_type": "cls_index", "summary_use_proj": True},
}
GPT2_COMMON = {
    **{"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1},
    **{"bos_token_id": 12, "embd_pdrop": 0.1, "eos_token_id": 12, "initializer_range": 0.02},
    **{"layer_norm_epsilon": 1e-05, "resid_pdrop": 0.1, "n_ctx": 16},
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
} | SUMMARY
LLAMA_COMMON = {
    **{"architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0},
    **{"bos_token_id": 0, "eos_token_id": 0, "hidden_act": "silu", "initializer_range": 0.041666666666666664},
    **{"pretraining_tp": 1, "rms_norm_eps": 1e-05, "torch_dtype": "bfloat16", "use_cache": True},
    "transformers_version": "4.40.1",
}
HUB = {
    "gpt2": ("gpt2", GPT2_COMMON),
    "distilgpt2": (
        "gpt2",
        GPT2_COMMON | {"_num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}},
    ),
    "gpt2-medium": ("gpt2", GPT2_COMMON | {"n_special": 0, "predict_special_tokens": True}),
    "gpt2-xl": ("gpt2", GPT2_COMMON | {"n_special": 0, "predict_special_tokens": True, "output_past": True}),
    "gpt2 written by an old version": (
        "gpt2",
        GPT2_COMMON
        | {"is_decoder": True, "torchscript": False, "use_bfloat16": False, "pruned_heads": {}, "top_k": 50}
        | {"num_beams": 1, "repetition_penalty": 1.0, "add_cross_attention": None, "finetuning_task": None},
    ),
    "SmolLM": (
        "llama",
        LLAMA_COMMON
        | {"rope_theta": 10000.0, "rope_scaling": None, "tie_word_embeddings": True, "_name_or_path": "x"},
    ),
    "SmolLM2": (
        "llama",
        LLAMA_COMMON
        | {"rope_theta": 100000, "rope_scaling": None, "tie_word_embeddings": True, "mlp_bias": False}
        | {"is_llama_config": True, "rope_interleaved": False, "pad_token_id": 2}
        | {"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}},
    ),
    "rope said to be the default": (
        "llama",
        LLAMA_COMMON
        | {"rope_scaling": {"rope_type": "default"}, "rope_theta": 500.0, "tie_word_embeddings": False}
        | {"mlp_bias": None, "head_dim": None},
    ),
    "rope said to be the default, with its base": (
        "llama",
        LLAMA_COMMON | {"rope_scaling": {"rope_type": "default", "rope_theta": 500.0}, "rope_theta": 500.0},
    ),
}
SIZES = {
    "gpt2": {
        "vocab_size": 13,
        "n_positions": 16,
        "n_embd": 8,
        "n_layer": 2,
        "n_head": 2,
        "model_type": "gpt2",
    },
    "llama": {
        **{"vocab_size": 13, "hidden_size": 12, "intermediate_size": 24, "num_hidden_layers": 2},
        **{"num_attention_heads": 3, "num_key_value_heads": 1, "max_position_embeddings": 16},
        "model_type": "llama",
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HUB)
def test_configurations_of_the_hub_load_and_give_their_logits(name, transformers, tmp_path):
    import torch

    kind, fields = HUB[name]
    fields = SIZES[kind] | fields
    # Their newest class does not accept null for a bool.
    their_fields = {key: value for key, value in fields.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(their_fields))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(tmp_path), dtype=torch.float32
    ).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    context = (
        pytest.warns(UserWarning, match="pruned_heads {}") if "old" in name else contextlib.nullcontext()
    )
    with context:
        config, params = gf.load_pretrained(tmp_path)
    ours = jax.jit(gf.gpt(config).apply)(params, TOKENS[0])
    theirs = model(torch.tensor(TOKENS[:1])).logits[0].detach()
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", HUB)
def test_fields_of_the_hub_without_effect_are_ignored(name, tmp_path):
    kind, fields = HUB[name]
    config = GPT2 if kind == "gpt2" else LLAMA
    saved(tmp_path, config)
    written = json.loads((tmp_path / "config.json").read_text())
    extra = {key: value for key, value in fields.items() if key not in ("rope_theta", "tie_word_embeddings")}
    if "rope_scaling" in extra:
        del written["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(written | extra))
    context = (
        pytest.warns(UserWarning, match="pruned_heads {}") if "old" in name else contextlib.nullcontext()
    )
    with context:
        loaded, _ = gf.load_pretrained(tmp_path)
    expected = (config.width, config.n_layers, config.feed, config.tied)
    assert (loaded.width, loaded.n_layers, loaded.feed, loaded.tied) == expected


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        (GPT2, "pruned_heads", {"0": [1]}),
        (GPT2, "reorder_and_upcast_attn", True),
        (GPT2, "use_rope", True),
        (GPT2, "auto_map", {"AutoModel": "x.Y"}),
        (LLAMA, "rope_interleaved", True),
        (LLAMA, "sliding_window", 4096),
        (LLAMA, "rope_scaling", {"rope_type": "default", "partial_rotary_factor": 0.5}),
        (LLAMA, "rope_scaling", {"type": "dynamic", "factor": 2.0}),
        (LLAMA, "embedding_multiplier", 12.0),
        (LLAMA, "partial_rotary_factor", 0),
    ],
)
def test_fields_that_change_results_raise(config, field, value, tmp_path):
    saved(tmp_path, config)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {field: value}))
    with pytest.raises(ValueError, match=f"{field}: "):
        gf.load_pretrained(tmp_path)


def test_unknown_empty_fields_give_a_warning(tmp_path):
    saved(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"logit_softcap": None, "new_thing": False}))
    with pytest.warns(
        UserWarning, match="ignored what gradfn does not know: logit_softcap None, new_thing False"
    ):
        gf.load_pretrained(tmp_path)


def test_saving_removes_old_shards(tmp_path):
    old = saved(tmp_path)
    split(tmp_path)
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").rename(
            tmp_path / f"model-0000{' ab'.index(name)}-of-00002.safetensors"
        )
    index = tmp_path / "model.safetensors.index.json"
    renamed = (
        index.read_text()
        .replace("a.safe", "model-00001-of-00002.safe")
        .replace("b.safe", "model-00002-of-00002.safe")
    )
    index.write_text(renamed)
    (tmp_path / "adapter.safetensors").write_text("mine")
    (tmp_path / "model-notes.safetensors").write_text("mine")
    chex.assert_trees_all_equal(gf.load_pretrained(tmp_path)[1], old)

    new = jax.tree.map(lambda leaf: leaf + 1, old)
    gf.save_pretrained(tmp_path, GPT2, new)
    chex.assert_trees_all_equal(gf.load_pretrained(tmp_path)[1], new)
    left = ["adapter.safetensors", "config.json", "model-notes.safetensors", "model.safetensors"]
    assert sorted(file.name for file in tmp_path.iterdir()) == left


def test_a_single_file_has_priority_over_an_index_as_in_transformers(tmp_path):
    saved(tmp_path / "old")
    split(tmp_path / "old")
    new = saved(tmp_path / "new", dataclasses.replace(GPT2, tied=True))
    new = jax.tree.map(lambda leaf: 2 * leaf, new)
    gf.save_pretrained(tmp_path / "new", GPT2, new)
    (tmp_path / "new" / "model.safetensors").rename(tmp_path / "old" / "model.safetensors")
    chex.assert_trees_all_equal(gf.load_pretrained(tmp_path / "old")[1], new)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("content", ["{}", '{"experiment": "gpt", "options": {}}', "[1]", "not JSON"])
def test_files_of_other_kinds_are_not_overwritten(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name}: already exists.* Name another folder"):
        saved(tmp_path)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(name, content)]


def test_a_missing_or_broken_config_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json: not there"):
        gf.load_pretrained(tmp_path)
    for text, message in (
        ("{", "config.json: Input data was truncated"),
        ("[]", "Expected `object`, got `array`"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            gf.load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            dataclasses.replace(GPT2, positions="sinusoidal"),
            "gpt2 has positions 'learned', got 'sinusoidal'",
        ),
        (dataclasses.replace(GPT2, n_kv_heads=1), "gpt2 has n_kv_heads None, got 1"),
        (dataclasses.replace(GPT2, feed="swiglu"), "gpt2 has no feed 'swiglu'"),
        (dataclasses.replace(LLAMA, norm="layer"), "llama has norm 'rms', got 'layer'"),
    ],
)
def test_a_config_that_transformers_cannot_express_raises(config, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        saved(tmp_path, config)


# Damaged and hostile folders


def change_config(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def expect_one_line(folder, message):
    began = time.monotonic()
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        gf.load_pretrained(folder)
    assert time.monotonic() - began < 2
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 700
    assert str(folder) in text


GPT2_SIZES = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner")
LLAMA_SIZES = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "intermediate_size", "max_position_embeddings"),
)


@pytest.mark.parametrize(
    ("config", "field"), [(GPT2, f) for f in GPT2_SIZES] + [(LLAMA, f) for f in LLAMA_SIZES]
)
def test_sizes_that_differ_from_the_files_raise_before_anything_is_built(config, field, tmp_path):
    saved(tmp_path, config)
    for value in (0, -1, 2**31, 10**30, 2.5, 8.0, "8", True, [8], {"a": 8}):
        change_config(tmp_path, **{field: value})
        expect_one_line(tmp_path, rf"config\.json: {field}: expected (int|1 to 2,147,483,647)")
    if field != "max_position_embeddings":  # no tensor of Llama depends on it
        change_config(tmp_path, **{field: 10**9})
        expect_one_line(tmp_path, r"000,?000|divide")


def test_far_more_layers_than_tensors_raise(tmp_path):
    saved(tmp_path)
    change_config(tmp_path, n_layer=10**9)
    message = r"config\.json: describes 1,000,000,000 layers of 12 tensors each, .* contain 28 tensors"
    expect_one_line(tmp_path, message)
    change_config(tmp_path, n_layer=3)
    expect_one_line(tmp_path, r"transformer\.h\.2\.ln_1\.weight: missing \(12 of 40 are\)")


@pytest.mark.parametrize("value", [None, True, 7, 0.5, ["gpt2"], {"gpt2": 1}, "", "a" * 5000, "\n\n"])
def test_another_model_type_raises(value, tmp_path):
    saved(tmp_path)
    change_config(tmp_path, model_type=value)
    expect_one_line(tmp_path, r"config\.json: model_type: expected one of 'gpt2', 'llama'.*; got ")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("rope_theta", value) for value in (0, -1.0, "10", True, [1], {})),
        *(("rope_parameters", {"rope_theta": value}) for value in ("x", {}, [2], 0, False)),
        *(("rms_norm_eps", value) for value in (0, "x", [], -1e-5, True)),
    ],
)
def test_a_field_that_is_not_a_positive_number_raises(field, value, tmp_path):
    saved(tmp_path, LLAMA)
    name = "rms_norm_eps" if field == "rms_norm_eps" else "rope_theta"
    if field == "rope_theta":
        change_config(tmp_path, rope_parameters=None)
    change_config(tmp_path, **{field: value})
    expect_one_line(tmp_path, rf"config\.json: {name}: expected a number above 0, got ")


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "a" * 5000, "/etc/passwd", "../b.safetensors", "a/b", "a\0b", "a\nb", 3, None, ["a"]],
)
def test_shards_must_be_beside_the_index(name, tmp_path):
    saved(tmp_path)
    split(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": name}}))
    expect_one_line(tmp_path, r"index\.json: (expected the name of a file|Expected `str`)")


@pytest.mark.parametrize(
    "content",
    [b"[" * 100_000, b'{"weight_map": ' * 100_000, b"\xff", b"", b"null", b'{"weight_map": 3}', b"{}"],
)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_damaged_json_is_named(name, content, tmp_path):
    saved(tmp_path)
    split(tmp_path)
    (tmp_path / name).write_bytes(content)
    expect_one_line(tmp_path, name.replace(".", r"\."))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "a.safetensors"])
@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_special_files_raise(name, kind, tmp_path):
    saved(tmp_path)
    split(tmp_path)
    file = tmp_path / name
    file.unlink()
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    else:
        file.mkdir()
    expect_one_line(tmp_path, f"{name}: is not a regular file")
    if name == "config.json":
        with pytest.raises(ValueError, match="already exists and is not the config"):
            saved(tmp_path)


@pytest.mark.parametrize(
    ("dtype", "bits"), [("F8_E4M3", 8), ("F8_E5M2", 8), ("F4", 4), ("C64", 64), ("U16", 16)]
)
def test_an_unsupported_dtype_is_named_with_its_tensor_and_file(dtype, bits, tmp_path):
    saved(tmp_path)
    file, name = tmp_path / "model.safetensors", "transformer.h.1.mlp.c_fc.weight"
    tensors = load_file(file)
    header, end, data = {}, 0, b""
    for key, tensor in tensors.items():
        body = bytes(tensor.size * bits // 8) if key == name else tensor.tobytes()
        of = dtype if key == name else "F32"
        header[key] = {"dtype": of, "shape": tensor.shape, "data_offsets": [end, end + len(body)]}
        end, data = end + len(body), data + body
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    message = rf"model\.safetensors: {name}: expected \[8, 32\] of .*, got \[8, 32\] of {dtype}"
    expect_one_line(tmp_path, message)


def test_long_names_and_names_with_line_breaks_are_shown_escaped(tmp_path):
    saved(tmp_path)
    for name in ("a" * 5000, "line\nline", "\x1b[31mred"):
        edit(tmp_path, lambda t, name=name: t.update({"transformer." + name: np.ones(3)}))
        expect_one_line(tmp_path, "no parameter of this model")
        edit(tmp_path, lambda t, name=name: t.pop("transformer." + name))
    change_config(tmp_path, **{"new\nfield": 3})
    expect_one_line(tmp_path, r"'new\\nfield': not supported, got 3")


BIG = gf.GPTConfig(vocab=100, context=16, n_layers=6, n_heads=2, width=64)


@pytest.mark.parametrize("scan", [False, True])
def test_weights_are_saved_and_loaded_one_tensor_at_a_time(scan, tmp_path):
    params = saved(tmp_path / "a", dataclasses.replace(BIG, scan=scan))
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    largest = 4 * 64 * 256  # of one matrix

    def peak(work):
        tracemalloc.start()
        work()
        at_most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return at_most

    assert total > 15 * largest
    saving = peak(lambda: gf.save_pretrained(tmp_path / "b", dataclasses.replace(BIG, scan=scan), params))
    assert saving < 5 * largest
    loading = peak(lambda: gf.load_pretrained(tmp_path / "b"))
    assert loading < total + 4 * largest
    assert (
        load_file(tmp_path / "a" / "model.safetensors").keys()
        == load_file(tmp_path / "b" / "model.safetensors").keys()
    )
    loaded = gf.load_pretrained(tmp_path / "b")[1]
    chex.assert_trees_all_equal(gf.stack_blocks(loaded) if scan else loaded, params)


def test_a_model_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    old = saved(tmp_path)
    written = (tmp_path / "config.json").read_bytes()
    new = jax.tree.map(lambda leaf: leaf + 1, old)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gradfn.nets.pretrained.write_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        gf.save_pretrained(tmp_path, dataclasses.replace(GPT2, norm_epsilon=1e-3), new)
    monkeypatch.undo()
    assert (tmp_path / "config.json").read_bytes() == written
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    chex.assert_trees_all_equal(gf.load_pretrained(tmp_path)[1], old)


def test_parameters_of_a_dtype_that_the_format_lacks_raise(tmp_path):
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float8_e4m3fn), saved(tmp_path / "a"))
    with pytest.raises(ValueError, match="a dtype that safetensors has, got float8_e4m3fn"):
        gf.save_pretrained(tmp_path / "b", GPT2, params)
    assert not (tmp_path / "b").exists()
