"""Decoder-only language models: GPT-2, and Llama with RoPE, RMS norm, SwiGLU and grouped-query attention."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from gradfn.core.axes import with_axes
from gradfn.core.names import scope, tap
from gradfn.core.net import Net, fold
from gradfn.core.params import Params, Spec
from gradfn.layers._attention import attention, kv_cache
from gradfn.layers._dense import dense
from gradfn.layers._dropout import dropout
from gradfn.layers._embed import embed, sinusoidal
from gradfn.layers._feed_forward import feed_forward, geglu, swiglu
from gradfn.layers._rope import RopeScaling
from gradfn.layers.norms import layer_norm, rms_norm
from gradfn.nets._description import described
from gradfn.nets._generate import LanguageModel
from gradfn.nets.transformer import block, cast, gpt2_init, stack_blocks, stack_of


@dataclass(frozen=True)
class GPTConfig:
    """The architecture of a GPT. The defaults are GPT-2's smallest model.

    For Llama set `positions="rope", norm="rms", feed="swiglu", bias=False`, `hidden` and `n_kv_heads`.

    Attributes:
        vocab: the vocabulary size (`vocab_size`).
        context: the longest sequence, in tokens (`block_size`).
        n_layers: the number of blocks (`n_layer`).
        n_heads: attention heads (`n_head`).
        width: features per position (`d_model`, `n_embd`).
        n_kv_heads: heads of keys and values; None for `n_heads`.
        head_size: features per head; None for `width / n_heads`.
        hidden: hidden nodes of the feed-forward layers (`d_ff`); None for `4 * width`.
        positions: `"learned"` vectors, fixed `"sinusoidal"` vectors, or `"rope"` in each attention layer.
        norm: `"layer"`, `"rms"`, or `"rms_unit_offset"`, whose parameters are the gains minus 1 (Gemma).
        feed: `"swiglu"`, `"geglu"`, or the activation of plain feed-forward layers: `"gelu"` (GPT-2's tanh form),
            `"gelu_exact"`.
        bias: whether dense layers and layer norms have biases.
        tied: whether the head shares the embedding's matrix.
        dropout: the fraction of the embedding's and the blocks' outputs that training drops.
        norm_epsilon: added to variances.
        rope_base: the base of RoPE's frequencies.
        scan: stack the blocks under `lax.scan`: compile time does not grow with depth. From 5 blocks on steps take
            about 15 % longer on CPUs, and less memory; up to 4 are unrolled when they are compiled, for sequences
            of less than 512 tokens.
        remat: recompute the insides of blocks in the backward pass: less memory, more time.
        compute: the dtype to compute in, such as `"bfloat16"`; None for that of the parameters.
        attention_bias: whether attention's projections have biases, or only those of queries, keys and values
            (`"qkv"`); None for `bias`.
        qk_norm: normalize each head's queries and keys (`gf.layers.rms_norm`) before RoPE.
        rope_scaling: how RoPE's frequencies change for sequences longer than those of training (`gf.RopeScaling`);
            None for no change.
        rope_fraction: the fraction of each head's features that RoPE rotates, the first ones.
        rope_base_local: the base of RoPE in layers with a window, where `rope_scaling` does not apply; None for
            the frequencies of the other layers.
        window: the number of keys that a query attends to, its own position and those before it; None for all.
        global_layers: indices of the layers that have no window. Those from `n_layers` up are ignored.
        score_cap: attention scores pass through `cap * tanh(score / cap)` before the mask; None for no cap.
        logit_cap: the same for the logits.
        attention_scale: multiplies the products of queries and keys; None for `head_size**-0.5`.
        embed_scale: multiplies the embedding's output; None for 1.
        norms_after: normalize the outputs of attention and of feed-forward layers, too, before they are added to the
            residual stream (Gemma).
        parallel: both read the same residual stream, and their outputs are added together (GPT-NeoX).

    >>> import gradfn as gf
    >>> gf.count(gf.gpt(gf.GPTConfig()).spec)  # GPT-2 small
    124439808
    """

    vocab: int = 50257
    context: int = 1024
    n_layers: int = 12
    n_heads: int = 12
    width: int = 768
    n_kv_heads: int | None = None
    head_size: int | None = None
    hidden: int | None = None
    positions: Literal["learned", "sinusoidal", "rope"] = "learned"
    norm: Literal["layer", "rms", "rms_unit_offset"] = "layer"
    feed: str = "gelu"
    bias: bool = True
    tied: bool = True
    dropout: float = 0.0
    norm_epsilon: float = 1e-5
    rope_base: float = 10_000.0
    scan: bool = False
    remat: bool = False
    compute: str | None = None
    attention_bias: bool | Literal["qkv"] | None = None
    qk_norm: bool = False
    rope_scaling: RopeScaling | None = None
    rope_fraction: float = 1.0
    rope_base_local: float | None = None
    window: int | None = None
    global_layers: tuple[int, ...] = ()
    score_cap: float | None = None
    logit_cap: float | None = None
    attention_scale: float | None = None
    embed_scale: float | None = None
    norms_after: bool = False
    parallel: bool = False

    def __post_init__(self) -> None:
        for name in ("vocab", "context", "n_layers", "n_heads", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"GPTConfig: {name} must be an integer >= 1, got {getattr(self, name)}")
        for name, known in (
            ("positions", ("learned", "sinusoidal", "rope")),
            ("norm", ("layer", "rms", "rms_unit_offset")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"GPTConfig: {name} must be one of {', '.join(known)}; got {getattr(self, name)!r}"
                )
        for name in ("rope_base_local", "score_cap", "logit_cap", "attention_scale", "embed_scale"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"GPTConfig: {name} must be a number above 0 or None, got {value!r}")
        if self.attention_bias not in (None, False, True, "qkv"):
            raise ValueError(
                f"GPTConfig: attention_bias must be True, False, 'qkv' or None, got {self.attention_bias!r}"
            )
        if not 0 < self.rope_fraction <= 1:
            raise ValueError(f"GPTConfig: rope_fraction must be in (0, 1], got {self.rope_fraction!r}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"GPTConfig: window must be an integer >= 1 or None, got {self.window!r}")
        # From JSON they come as a list and a dict.
        object.__setattr__(self, "global_layers", tuple(self.global_layers))
        if isinstance(self.rope_scaling, Mapping):
            object.__setattr__(self, "rope_scaling", RopeScaling(**self.rope_scaling))
        if not all(isinstance(i, int) and i >= 0 for i in self.global_layers):
            raise ValueError(f"GPTConfig: global_layers must be integers >= 0, got {self.global_layers}")
        for name, needed, fits in (
            ("rope_scaling", 'positions="rope"', self.positions == "rope"),
            ("rope_fraction", 'positions="rope"', self.positions == "rope"),
            ("rope_base_local", 'positions="rope" and a window', self.positions == "rope" and self.window),
            ("global_layers", "a window", self.window),
            ("norms_after", "parallel=False", not self.parallel),
        ):
            if getattr(self, name) != _DEFAULTS[name] and not fits:
                raise ValueError(f"GPTConfig: {name}={getattr(self, name)!r} needs {needed}")


_DEFAULTS: Mapping[str, Any] = {field.name: field.default for field in fields(GPTConfig)}


def gpt(config: GPTConfig) -> LanguageModel:
    """Return a language model: from a sequence of tokens, the logits of each next token.

    Radford et al., *Language Models are Unsupervised Multitask Learners*, 2019; Touvron et al., *LLaMA*, 2023.
    Its values are named: `embedded`; in each block `attention_norm`, `queries`, `keys`, `values`, `probabilities`,
    `mixed`, `attention_out`, `residual_mid` (not in parallel blocks), `feed_norm`, `hidden`, `feed_out`,
    `residual`; at the end `final_norm` and `logits`. With several unrolled blocks the names start with the scope:
    `blocks/0/residual`.

    Args:
        config: see `gf.GPTConfig`.

    Returns:
        A net of one sequence, from integers `[T]` to logits `[T, vocab_size]` in the parameters' dtype, for
        `gf.generate` too. With dropout it takes `key=`.

    Raises:
        ValueError: sizes in the config that do not fit together, or a sequence longer than the context.
        ParameterError: parameters of other shapes.

    >>> import jax, jax.numpy as jnp, gradfn as gf
    >>> net = gf.gpt(gf.GPTConfig(vocab=65, context=64, n_layers=4, n_heads=4, width=128))
    >>> net.apply(net.init(jax.random.key(0)), jnp.array([7, 1, 3])).shape
    (3, 65)
    """
    dtype = None if config.compute is None else jnp.dtype(config.compute)
    embedding, head = embed(config.vocab, config.width), dense(config.width, config.vocab, bias=False)
    learned = embed(config.context, config.width)
    final_norm, drop = _norm(config), dropout(config.dropout)
    names = ("attention_norm", "feed_norm") + (
        ("attention_out_norm", "feed_out_norm") if config.norms_after else ()
    )
    norms = {name: _norm(config) for name in names}
    block_spec, run_block = block(_attention(config), _feed(config), norms, config.dropout, config.parallel)
    block_spec = gpt2_init(block_spec, config.n_layers)
    local = None if config.window is None else [i not in config.global_layers for i in range(config.n_layers)]
    blocks_spec, run_blocks = stack_of(
        block_spec, run_block, config.n_layers, config.scan, config.remat, local
    )

    spec: Spec = {"embed": _bare(embedding), "blocks": blocks_spec, "final_norm": final_norm.spec}
    if config.positions == "learned":
        spec["positions"] = with_axes(_bare(learned), "positions", "embed")
    if not config.tied:
        spec["head"] = with_axes(head.spec, "vocab", "embed")
    spec = gpt2_init(spec, config.n_layers)

    def read(
        params: Params, tokens: jax.Array, key: Any, cache: PyTree, start: PyTree
    ) -> tuple[jax.Array, PyTree]:
        tokens = jnp.asarray(tokens)
        if tokens.ndim != 1 or len(tokens) > config.context:
            raise ValueError(_wrong_tokens(config, tokens.shape))
        params = cast(params, dtype)
        with scope("embed"):
            x = embedding.apply(params["embed"], tokens)  # [T, width]
            x = x if config.embed_scale is None else x * config.embed_scale
        positions = start + jnp.arange(len(tokens))
        if config.positions == "learned":
            with scope("positions"):
                x = x + learned.apply(params["positions"], positions)
        elif config.positions == "sinusoidal":
            x = x + sinusoidal(config.context, config.width).astype(x.dtype)[positions]
        x = tap(drop.apply({}, x, key=fold(key, 0)), "embedded")
        with scope("blocks"):
            x, cache = run_blocks(params["blocks"], x, fold(key, 1), cache, start)
        with scope("final_norm"):
            return tap(final_norm.apply(params["final_norm"], x), "final_norm"), cache

    def logits_of(params: Params, x: jax.Array) -> jax.Array:
        output_dtype = params["embed"]["W"].dtype
        with scope("head"):
            z = head.apply(cast(params["embed" if config.tied else "head"], dtype), x)
        z = z.astype(output_dtype)
        if config.logit_cap is not None:
            z = config.logit_cap * jnp.tanh(z / config.logit_cap)
        return tap(z, "logits")

    def hidden(params: Params, tokens: jax.Array, key: jax.Array | None = None) -> jax.Array:
        return read(params, tokens, key, None, 0)[0]

    def apply(params: Params, tokens: jax.Array) -> jax.Array:
        return logits_of(params, hidden(params, tokens))

    def apply_with_dropout(params: Params, tokens: jax.Array, key: jax.Array | None = None) -> jax.Array:
        return logits_of(params, hidden(params, tokens, key))

    def start(params: Params) -> PyTree:
        kv_heads = config.n_kv_heads or config.n_heads
        size = config.head_size or config.width // config.n_heads
        empty = kv_cache(config.context, kv_heads, size, dtype or params["embed"]["W"].dtype)
        caches = {str(i): jax.tree.map(jnp.copy, empty) for i in range(config.n_layers)}
        state = {"blocks": caches, "length": jnp.zeros([], jnp.int32)}
        return stack_blocks(state) if config.scan else state

    def step(params: Params, tokens: jax.Array, state: PyTree) -> tuple[jax.Array, PyTree]:
        x, caches = read(params, tokens, None, state["blocks"], state["length"])
        return logits_of(params, x), {"blocks": caches, "length": state["length"] + len(tokens)}

    forward = apply_with_dropout if config.dropout else apply
    description = described("gpt", vars(config))
    in_parts = config.rope_scaling is None or config.rope_scaling.kind != "dynamic"
    return LanguageModel(
        spec, forward, start, step, config.context, hidden, logits_of, in_parts, description=description
    )


def _attention(config: GPTConfig) -> Net:
    return attention(
        config.width,
        config.n_heads,
        config.n_kv_heads,
        config.head_size,
        causal=True,
        bias=config.bias if config.attention_bias is None else config.attention_bias,
        rope_base=config.rope_base if config.positions == "rope" else None,
        rope_scaling=config.rope_scaling,
        qk_norm=_rms_norm(config, config.head_size or config.width // config.n_heads)
        if config.qk_norm
        else None,
        rope_fraction=config.rope_fraction,
        rope_base_local=config.rope_base_local,
        window=config.window,
        score_cap=config.score_cap,
        scale=config.attention_scale,
    )


def _feed(config: GPTConfig) -> Net:
    hidden = config.hidden or 4 * config.width
    if config.feed in ("swiglu", "geglu"):
        gated = swiglu if config.feed == "swiglu" else geglu
        return gated(config.width, hidden, config.bias)
    return feed_forward(config.width, hidden, config.feed, config.bias)


def _norm(config: GPTConfig) -> Net:
    if config.norm == "layer":
        return layer_norm(config.width, config.bias, config.norm_epsilon)
    return _rms_norm(config, config.width)


def _rms_norm(config: GPTConfig, n: int) -> Net:
    return rms_norm(n, config.norm_epsilon, config.norm == "rms_unit_offset")


def _bare(layer: Net) -> Spec:
    """Return a layer's spec without its own initializers."""
    return jax.tree.map(lambda param: replace(param, init=None), layer.spec)


def _wrong_tokens(config: GPTConfig, actual: tuple[int, ...]) -> str:
    message = f"gpt: expected one sequence of tokens [T], T <= {config.context}, got shape {list(actual)}"
    hint = ". For a batch: jax.vmap(net.apply, (None, 0))(params, tokens)"
    return message + hint if len(actual) > 1 else message
