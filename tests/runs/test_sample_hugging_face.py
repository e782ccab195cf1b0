"""`gradfn sample` on Hugging Face folders: text that equals that of transformers, and one line for each mistake."""

import dataclasses
import json
import sys

import jax
import numpy as np
import pytest

import gradfn as gf
from gradfn.cli import main
from gradfn.runs import hugging_face, sample

tokenizers = pytest.importorskip("tokenizers")
from tokenizers import decoders, models, pre_tokenizers, processors, trainers  # noqa: E402

TEXT = (
    "to be or not to be that is the question whether tis nobler in the mind to suffer the slings and arrows "
)
GPT2 = gf.GPTConfig(vocab=300, context=32, n_layers=2, n_heads=2, width=16)
LLAMA = gf.GPTConfig(
    vocab=300,
    context=4096,
    n_layers=2,
    n_heads=2,
    width=16,
    hidden=32,
    positions="rope",
    norm="rms",
    feed="swiglu",
    bias=False,
    tied=False,
    norm_epsilon=1e-6,
)


def tokenizer_of(config):
    """Return a byte-level tokenizer, which fills the vocabulary of a model and ends with `</s>`."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    library.train_from_iterator(
        [TEXT],
        trainers.BpeTrainer(
            vocab_size=config.vocab - 1,
            special_tokens=["<s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    names = [f"<{i}>" for i in range(library.get_vocab_size(), config.vocab - 1)]
    library.add_tokens(names)
    library.add_special_tokens(["</s>"])
    library.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    return library


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def folder(request, tmp_path_factory):
    """Return a folder of a random model, whose logits differ more than at initialization."""
    config = {"gpt2": GPT2, "llama": LLAMA}[request.param]
    where = tmp_path_factory.mktemp(request.param)
    params = jax.tree.map(lambda p: 3 * p, gf.gpt(config).init(jax.random.key(1)))
    gf.save_pretrained(where, config, params)
    tokenizer_of(config).save(str(where / "tokenizer.json"))
    (where / "generation_config.json").write_text(json.dumps({"eos_token_id": config.vocab - 1}))
    return where


def written(capsys, *words):
    assert main(["sample", *map(str, words)]) == 0
    return capsys.readouterr()


def test_the_text_is_that_of_generate(folder, capsys):
    config, params = gf.load_pretrained(folder)
    coder = gf.data.huggingface(folder)
    prompt = coder.encode("to be")
    new = gf.generate(gf.gpt(config), params, prompt, 20, temperature=0, stop=config.vocab - 1)
    expected = coder.decode([*prompt, *new])
    out, err = written(capsys, folder, "--prompt", "to be", "--n", 20, "--temperature", 0)
    assert out == f"{expected}\n"
    assert "tokens, the first 2 in" in err
    assert err.count("\n") == 1
    # Another prompt and seed for each line of a file.
    (folder / "prompts.txt").write_text("to be\n\nthe mind\n")
    words = ("--n", 8, "--top-p", 0.9, "--min-p", 0.01, "--seed", 3)
    out, err = written(capsys, folder, "--prompts", folder / "prompts.txt", *words)
    texts = out.removesuffix("\n").split(f"\n{'-' * 8}\n")
    options = {"temperature": 0.8, "top_p": 0.9, "min_p": 0.01, "stop": config.vocab - 1}
    for i, (prompt, text) in enumerate(zip(["to be", "the mind"], texts, strict=True)):
        tokens = coder.encode(prompt)
        new = gf.generate(gf.gpt(config), params, tokens, 8, seed=3 + i, **options)
        assert text == prompt + coder.decode(new, after=tokens)


def test_a_text_ends_at_stop_strings_and_at_the_end_token(folder, capsys):
    config, params = gf.load_pretrained(folder)
    coder = gf.data.huggingface(folder)
    prompt = coder.encode("to be")
    new = gf.generate(gf.gpt(config), params, prompt, 20, temperature=0)
    text = coder.decode(new, after=prompt)
    words = (folder, "--prompt", "to be", "--n", 20, "--temperature", 0)
    stop = text[3:5]
    expected = f"to be{text[: text.index(stop)]}\n"
    assert written(capsys, *words, "--stop", stop, "never").out == expected
    (folder / "one.txt").write_text("to be")
    of_file = (folder, "--prompts", folder / "one.txt", *words[3:])
    assert written(capsys, *of_file, "--stop", stop).out == expected
    # The fourth token ends the text, and is not part of it.
    end, at = int(new[3]), int(np.argmax(new == new[3]))
    generation = folder / "generation_config.json"
    before = generation.read_text()
    try:
        generation.write_text(json.dumps({"eos_token_id": [config.vocab + 7, end]}))
        for command in (words, of_file):
            assert written(capsys, *command).out == f"to be{coder.decode(new[:at], after=prompt)}\n"
        generation.unlink()
        assert written(capsys, *words).out == f"to be{text}\n"
    finally:
        generation.write_text(before)


def test_a_text_without_a_prompt_continues_the_first_token(folder, capsys):
    config, params = gf.load_pretrained(folder)
    new = gf.generate(gf.gpt(config), params, [0], 5, temperature=0)
    out, _ = written(capsys, folder, "--n", 5, "--temperature", 0, "--dtype", "float32")
    assert out == f"{gf.data.huggingface(folder).decode(new)}\n"
    assert sample.load_model(folder, "bfloat16").params["embed"]["W"].dtype == "bfloat16"


def test_a_long_context_is_shortened_to_the_text():
    model = sample.Model(gf.gpt(LLAMA), {}, gf.data.utf8_bytes(), False, config=LLAMA)
    assert [sample._with_context(model, n).net.context for n in (1, 64, 65, 10_000)] == [64, 64, 128, 4096]
    learned = dataclasses.replace(LLAMA, positions="learned")
    model = sample.Model(gf.gpt(learned), {}, gf.data.utf8_bytes(), False, config=learned)
    assert sample._with_context(model, 65).net.context == 4096


def test_loading_a_large_model_is_announced(folder, capsys, monkeypatch):
    monkeypatch.setattr(hugging_face, "LARGE", 1)
    err = written(capsys, folder, "--n", 1).err
    assert f"{folder}: loading 0.0 GB of weights" in err
    assert "parameters in" in err


def test_a_mistake_gets_one_line_and_exit_code_2(folder, tmp_path, monkeypatch, capsys):
    def fails(message, *words, **files):
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_bytes(content)
        assert main(["sample", str(tmp_path), "--n", "2", *words]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1

    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    whole = (folder / "tokenizer.json").read_bytes()
    fails("expected tokenizer.json, which tokenizer.save_pretrained")
    fails("not a tokenizer that tokenizers", tokenizer=whole[:-50])
    larger = tokenizers.Tokenizer.from_buffer(whole)
    larger.add_special_tokens(["<pad>"])
    fails(
        "generate: expected tokens in [0, 300), got 300",
        "--prompt",
        "a<pad>",
        tokenizer=larger.to_str().encode(),
    )
    larger.add_tokens(["more"])
    fails(
        "tokenizer.json has the token 301, but the model's vocab_size is 300",
        tokenizer=larger.to_str().encode(),
    )
    plain = tokenizers.Tokenizer.from_buffer(whole)
    plain.post_processor = processors.ByteLevel()
    fails("a prompt with at least one token is needed", tokenizer=plain.to_str().encode())
    fails("prompt and prompts cannot be used together", "--prompt", "a", "--prompts", "b", tokenizer=whole)
    fails("there is no such file", "--prompts", str(tmp_path / "none"))
    (tmp_path / "empty.txt").write_text("\n")
    fails("expected one prompt per line, got an empty file", "--prompts", str(tmp_path / "empty.txt"))
    fails("top_p must be in (0, 1], got 0.0", "--prompt", "a", "--top-p", "0")
    fails("top_p must be a finite number from 0 to 1, got 2.0", "--top-p", "2")
    fails("--dtype: expected one of float32, bfloat16, float16, got int8", "--dtype", "int8")
    fails("stop must be strings of at least one character", "--stop", "")
    fails("config.json", config=b"{")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    fails("pip install 'gradfn[tokenizers]'")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_greedy_text_is_that_of_the_pipeline_of_transformers(kind, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 299}
    if kind == "gpt2":
        config = transformers.GPT2Config(**sizes, n_positions=64, n_embd=16, n_layer=2, n_head=2)
        kind_of = transformers.GPT2LMHeadModel
    else:
        config = transformers.LlamaConfig(
            **sizes, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
        )
        kind_of = transformers.LlamaForCausalLM
    torch.manual_seed(0)
    model = kind_of(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter *= 5
    model.save_pretrained(tmp_path)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer_of(GPT2),
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(tmp_path)
    written_by_them = transformers.pipeline("text-generation", str(tmp_path), device="cpu")
    for prompt in ("to be", "whether tis nobler"):
        [expected] = written_by_them(prompt, max_new_tokens=20, do_sample=False, add_special_tokens=True)
        out, _ = written(capsys, tmp_path, "--prompt", prompt, "--n", 20, "--temperature", 0)
        assert out == expected["generated_text"] + "\n"
        assert len(out) > len(prompt) + 10
