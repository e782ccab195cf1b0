"""Language models of the GPT kind: GPT-2, and Llama with RoPE, RMS norm, SwiGLU and grouped queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from gradfn.core.names import scope, tap
from gradfn.core.net import Net, fold
from gradfn.core.params import Param, Params, Spec
from gradfn.layers._attention import attention, kv_cache
from gradfn.layers._dense import dense
from gradfn.layers._dropout import dropout
from gradfn.layers._embed import embed, sinusoidal
from gradfn.layers._feed_forward import feed_forward, swiglu
from gradfn.layers.norms import layer_norm, rms_norm
from gradfn.nets._generate import LanguageModel
from gradfn.nets.transformer import block, cast, draw_like_gpt2, stack_blocks, stack_of


@dataclass(frozen=True)
class GPTConfig:
    """What a GPT is made of. The defaults are GPT-2's smallest model.

    Llama's choices are `positions="rope", norm="rms", feed="swiglu", bias=False`, a `hidden` and `n_kv_heads`.

    Attributes:
        vocab: number of tokens.
        context: the longest sequence, in tokens.
        n_layers: blocks.
        n_heads: attention heads.
        width: features of a position.
        n_kv_heads: heads of keys and values; None for as many as `n_heads`.
        head_size: features of a head; None for `width / n_heads`.
        hidden: nodes of the feed-forward layers; None for `4 * width`.
        positions: `"learned"` vectors, fixed `"sinusoidal"` ones, or `"rope"` in each attention.
        norm: `"layer"` or `"rms"`.
        feed: `"swiglu"`, or a feed-forward layer's activation: `"gelu"` (the tanh form, GPT-2's), `"gelu_exact"`.
        bias: whether products and layer norms have biases.
        tied: whether the head's matrix is the embedding's.
        dropout: share of the embedding's and the blocks' outputs that training drops.
        norm_epsilon: added to variances.
        rope_base: of the angles of RoPE.
        scan: blocks stacked under `lax.scan`: time to compile does not grow with depth, steps are a little slower.
        remat: compute the insides of blocks again in the backward pass: less memory, more time.
        compute: the dtype to compute in, such as `"bfloat16"`; None for that of the parameters.

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
    norm: Literal["layer", "rms"] = "layer"
    feed: str = "gelu"
    bias: bool = True
    tied: bool = True
    dropout: float = 0.0
    norm_epsilon: float = 1e-5
    rope_base: float = 10_000.0
    scan: bool = False
    remat: bool = False
    compute: str | None = None

    def __post_init__(self) -> None:
        for name in ("vocab", "context", "n_layers", "n_heads", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"GPTConfig: {name} is 1 or more, came {getattr(self, name)}")
        for name, known in (("positions", ("learned", "sinusoidal", "rope")), ("norm", ("layer", "rms"))):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"GPTConfig: {name} is one of {', '.join(known)}; came {getattr(self, name)!r}"
                )


def gpt(config: GPTConfig) -> LanguageModel:
    """Return a language model: from tokens so far, the logits of each next token.

    Radford et al., *Language Models are Unsupervised Multitask Learners*, 2019; Touvron et al., *LLaMA*, 2023.
    Its values are named: `embedded`; in each block `attention_norm`, `queries`, `keys`, `values`, `probabilities`,
    `mixed`, `attention_out`, `residual_mid`, `feed_norm`, `hidden`, `feed_out`, `residual`; at the end
    `final_norm` and `logits`. With more than one unrolled block the scope stands in front:
    `blocks/0/residual`.

    Args:
        config: see `gf.GPTConfig`.

    Returns:
        A net of one sequence, from integers `[T]` to logits `[T, vocab]` in the parameters' dtype; `gf.generate`
        goes on from where it ends. With dropout it takes `key=`.

    Raises:
        ValueError: a config that makes no net, or a sequence longer than the context.
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
    norms = (_norm(config), _norm(config))
    block_spec, run_block = block(_attention(config), _feed(config), norms, config.dropout)
    block_spec = draw_like_gpt2(block_spec, config.n_layers)
    blocks_spec, run_blocks = stack_of(block_spec, run_block, config.n_layers, config.scan, config.remat)

    spec: Spec = {"embed": _bare(embedding), "blocks": blocks_spec, "final_norm": final_norm.spec}
    if config.positions == "learned":
        spec["positions"] = _bare(learned)
    if not config.tied:
        spec["head"] = head.spec
    spec = draw_like_gpt2(spec, config.n_layers)

    def run(params: Params, tokens: jax.Array, key: Any, cache: Any, start: Any) -> tuple[jax.Array, Any]:
        tokens = jnp.asarray(tokens)
        if tokens.ndim != 1 or len(tokens) > config.context:
            raise ValueError(_wrong_tokens(config, tokens.shape))
        answer_dtype = params["embed"]["W"].dtype
        params = cast(params, dtype)
        with scope("embed"):
            x = embedding.apply(params["embed"], tokens)  # [T, width]
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
            x = tap(final_norm.apply(params["final_norm"], x), "final_norm")
        with scope("head"):
            z = head.apply(params["embed" if config.tied else "head"], x)
        return tap(z.astype(answer_dtype), "logits"), cache

    def apply(params: Params, tokens: jax.Array) -> jax.Array:
        return run(params, tokens, None, None, 0)[0]

    def noisy_apply(params: Params, tokens: jax.Array, key: jax.Array | None = None) -> jax.Array:
        return run(params, tokens, key, None, 0)[0]

    def start(params: Params) -> Any:
        kv_heads = config.n_kv_heads or config.n_heads
        size = config.head_size or config.width // config.n_heads
        empty = kv_cache(config.context, kv_heads, size, dtype or params["embed"]["W"].dtype)
        caches = {str(i): jax.tree.map(jnp.copy, empty) for i in range(config.n_layers)}
        memory = {"blocks": caches, "length": jnp.zeros([], jnp.int32)}
        return stack_blocks(memory) if config.scan else memory

    def step(params: Params, tokens: jax.Array, memory: Any) -> tuple[jax.Array, Any]:
        logits, caches = run(params, tokens, None, memory["blocks"], memory["length"])
        return logits, {"blocks": caches, "length": memory["length"] + len(tokens)}

    return LanguageModel(spec, noisy_apply if config.dropout else apply, start, step, config.context)


def _attention(config: GPTConfig) -> Net:
    return attention(
        config.width,
        config.n_heads,
        config.n_kv_heads,
        config.head_size,
        causal=True,
        bias=config.bias,
        rope_base=config.rope_base if config.positions == "rope" else None,
    )


def _feed(config: GPTConfig) -> Net:
    hidden = config.hidden or 4 * config.width
    if config.feed == "swiglu":
        return swiglu(config.width, hidden, config.bias)
    return feed_forward(config.width, hidden, config.feed, config.bias)


def _norm(config: GPTConfig) -> Net:
    if config.norm == "rms":
        return rms_norm(config.width, config.norm_epsilon)
    return layer_norm(config.width, config.bias, config.norm_epsilon)


def _bare(layer: Net) -> Spec:
    """Return a layer's spec without the initialisers that it has by itself."""
    return jax.tree.map(lambda param: Param(param.shape), layer.spec)


def _wrong_tokens(config: GPTConfig, came: tuple[int, ...]) -> str:
    message = f"gpt: expected one sequence of tokens [T], T at most {config.context}, came {list(came)}"
    return (
        f"{message}. For a batch: jax.vmap(net.apply, (None, 0))(params, tokens)"
        if len(came) > 1
        else message
    )
