"""The speed of a training step of a small GPT, compared with raw JAX, other frameworks and PyTorch.

    python -m benchmarks.gpt_step                  # freed blocks up to 64 MB are kept, as gf.train_step sets it
    python -m benchmarks.gpt_step --malloc kept    # all freed memory is kept: see KEPT
    python -m benchmarks.gpt_step --malloc glibc   # only blocks up to 32 MB, as glibc itself does
    python -m benchmarks.gpt_step --compile        # instead, the time of first calls for two depths

nanoGPT's CPU configuration: 4 layers, 4 heads, width 128, 64 tokens, batch size 12, 65 symbols, no biases, a tied head,
exact GELU, AdamW. All contenders start from the same parameters and take the same steps on one batch. One call is ten
steps; at the end the loss of each is printed, which must agree if all did the same work. Two more tables compare gradfn
with PyTorch, and its scanned blocks with unrolled ones.
"""

import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradfn as gf
from benchmarks import harness
from benchmarks.paused import paused

CONFIG = gf.GPTConfig(vocab=65, context=64, n_layers=4, n_heads=4, width=128, bias=False, feed="gelu_exact")
BATCH = 12
RATE, BETAS, DECAY = 1e-3, (0.9, 0.99), 0.1
STEPS = 10  # in one call
BASELINE = "raw JAX, flat"
FIT = "gradfn, gf.fit"  # it takes several steps in one compiled call
# With these settings glibc keeps freed memory, instead of returning it and requesting it again at every step.
KEPT = {
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "2147483647",
    "MALLOC_TOP_PAD_": "268435456",
    "MALLOC_ARENA_MAX": "1",
}
# By the value of --malloc, the environment. gf.train_step leaves glibc alone where the user has set any tunable.
MALLOC = {"default": {}, "kept": KEPT, "glibc": {"GLIBC_TUNABLES": "glibc.malloc.check=0"}}
# How many times PyTorch's time a step of gradfn may take, and of unrolled blocks' one of scanned blocks.
OF_PYTORCH = {"gradfn": 1.0, "gradfn, scanned": 1.0, FIT: 1.0}
OF_UNROLLED = {"gradfn, scanned": 1.02}
Params = dict[str, Any]


class Task(NamedTuple):
    """The model, its initial parameters, and a batch."""

    config: gf.GPTConfig  # unrolled
    start: Params  # of gf.gpt(config)
    tokens: np.ndarray  # [batch, T] int32
    targets: np.ndarray  # [batch, T] int32

    @property
    def blocks(self) -> list[Params]:
        """The parameters of each block."""
        return [self.start["blocks"][str(i)] for i in range(self.config.n_layers)]


Step = Callable[[], Any]  # takes a step and returns the loss before it, possibly without waiting


def adamw() -> optax.GradientTransformation:
    """Return the optimizer, with weight decay on all parameters, which every framework can express in one line."""
    return optax.adamw(RATE, *BETAS, weight_decay=DECAY)


def gradfn_step(task: Task, scan: bool) -> Step:
    """Return a step of gf.gpt with gf.train_step."""
    config = gf.GPTConfig(**{**vars(task.config), "scan": scan})
    params = gf.stack_blocks(task.start) if scan else task.start
    step = gf.train_step(gf.batch_mean(gf.next_token_loss(gf.gpt(config))), adamw())
    now = [gf.train_state(params, adamw(), jax.random.key(0))]
    batch = jnp.asarray(task.tokens), jnp.asarray(task.targets)

    def run() -> jax.Array:
        now[0], metrics = step(now[0], batch)
        return metrics["loss"]

    return run


def gradfn_fit(task: Task, every: int) -> Step:
    """Return a function that takes `every` steps of gf.fit and returns the mean of their losses."""
    batch = jnp.asarray(task.tokens), jnp.asarray(task.targets)
    data = jax.tree_util.Partial(lambda batch, key: batch, batch)
    loss = gf.batch_mean(gf.next_token_loss(gf.gpt(task.config)))

    def train(pause: Callable[[float], None]) -> None:
        def stop(history: Sequence[Any]) -> bool:
            pause(history[-1]["loss"])
            return False

        gf.fit(loss, task.start, data, adamw(), 10**9, eval_every=every, stop=stop, progress=False)

    return paused(train)


def layer_norm(x: jax.Array, gain: jax.Array) -> jax.Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5) * gain


def raw_loss(
    params: Params, tokens: jax.Array, targets: jax.Array, *, heads: int, flat: bool, scan: bool
) -> jax.Array:
    """Return the loss of a batch, written by hand."""
    batch, length = tokens.shape
    mask = jnp.tril(jnp.ones([length, length], bool))

    def block(x: jax.Array, p: Params) -> jax.Array:
        h = layer_norm(x, p["attention_norm"])
        if "qkv" in p:
            parts = jnp.split(h @ p["qkv"].T, 3, -1)  # [..., 3 width] -> three of [..., width]
        else:
            parts = [h @ p[name].T for name in ("query", "key", "value")]
        # [..., width] -> [batch, T, heads, size]
        q, k, v = (z.reshape(batch, length, heads, -1) for z in parts)
        scores = jnp.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
        weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), -1)
        mixed = jnp.einsum("bhts,bshd->bthd", weights, v).reshape(x.shape)
        x = x + mixed @ p["out"].T
        z = layer_norm(x, p["feed_norm"]) @ p["up"].T  # [..., 4 width]
        return x + (0.5 * z * (1 + jax.lax.erf(z * 0.5**0.5))) @ p["down"].T

    x = params["embed"][tokens] + params["positions"][:length]  # [batch, T, width]
    if flat:
        x = x.reshape(batch * length, -1)
    if scan:
        x, _ = jax.lax.scan(lambda x, p: (block(x, p), None), x, params["blocks"])
    else:
        for p in params["blocks"]:
            x = block(x, p)
    logits = layer_norm(x, params["final_norm"]) @ params["embed"].T  # [..., vocab]
    labels = targets.reshape(logits.shape[:-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def fused(block: Params) -> Params:
    """Return a block's parameters by short names, with one matrix for queries, keys and values."""
    attention, feed = block["attention"], block["feed"]
    return {
        "attention_norm": block["attention_norm"]["gain"],
        "qkv": jnp.concatenate([attention[name]["W"] for name in ("query", "key", "value")]),
        "out": attention["out"]["W"],
        "feed_norm": block["feed_norm"]["gain"],
        "up": feed["up"]["W"],
        "down": feed["down"]["W"],
    }


def separate(block: Params) -> Params:
    """Return a block's parameters by short names, with separate matrices for queries, keys and values."""
    names = ("query", "key", "value")
    return {name: leaf for name, leaf in fused(block).items() if name != "qkv"} | {
        name: block["attention"][name]["W"] for name in names
    }


def raw_params(task: Task, scan: bool, named: Callable[[Params], Params] = fused) -> Params:
    """Return the initial parameters as `raw_loss` expects them."""
    blocks = [named(block) for block in task.blocks]
    return {
        "embed": task.start["embed"]["W"],
        "positions": task.start["positions"]["W"],
        "blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks) if scan else blocks,
        "final_norm": task.start["final_norm"]["gain"],
    }


def raw_step(task: Task, flat: bool, scan: bool, named: Callable[[Params], Params] = fused) -> Step:
    """Return a step in raw JAX; flat, unrolled and fused it is the fastest that we could write."""
    params = raw_params(task, scan, named)
    loss = partial(raw_loss, heads=task.config.n_heads, flat=flat, scan=scan)
    optimizer = adamw()

    @jax.jit
    def step(
        params: Params, state: Any, tokens: jax.Array, targets: jax.Array
    ) -> tuple[Params, Any, jax.Array]:
        value, grads = jax.value_and_grad(loss)(params, tokens, targets)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    now = [(params, optimizer.init(params))]
    batch = jnp.asarray(task.tokens), jnp.asarray(task.targets)

    def run() -> jax.Array:
        *after, value = step(*now[0], *batch)
        now[0] = tuple(after)
        return value

    return run


def pytorch(task: Task) -> Step:
    """Return a step of nanoGPT's architecture in PyTorch, eager."""
    import torch
    from torch import nn
    from torch.nn import functional

    width, heads = task.config.width, task.config.n_heads

    def tensor(leaf: Any) -> Any:
        return torch.from_numpy(np.array(leaf))

    def linear(W: Any) -> Any:
        layer = nn.Linear(W.shape[1], W.shape[0], bias=False)
        layer.weight = nn.Parameter(tensor(W))
        return layer

    def norm(gain: Any) -> Any:
        layer = nn.LayerNorm(width, bias=False)
        layer.weight = nn.Parameter(tensor(gain))
        return layer

    class Block(nn.Module):
        def __init__(self, p: Params) -> None:
            super().__init__()
            self.norm1, self.norm2 = norm(p["attention_norm"]), norm(p["feed_norm"])
            self.qkv, self.out = linear(p["qkv"]), linear(p["out"])
            self.up, self.down = linear(p["up"]), linear(p["down"])

        def forward(self, x: Any) -> Any:
            batch, length, _ = x.shape
            # [batch, T, width] -> [batch, heads, T, size]
            split = self.qkv(self.norm1(x)).split(width, dim=2)
            q, k, v = (z.view(batch, length, heads, -1).transpose(1, 2) for z in split)
            mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(mixed.transpose(1, 2).contiguous().view(batch, length, width))
            return x + self.down(functional.gelu(self.up(self.norm2(x))))

    class GPT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding.from_pretrained(tensor(task.start["embed"]["W"]), freeze=False)
            self.positions = nn.Embedding.from_pretrained(tensor(task.start["positions"]["W"]), freeze=False)
            self.blocks = nn.ModuleList(Block(fused(block)) for block in task.blocks)
            self.norm = norm(task.start["final_norm"]["gain"])

        def forward(self, tokens: Any, targets: Any) -> Any:
            x = self.embed(tokens) + self.positions(torch.arange(tokens.shape[1]))
            for block in self.blocks:
                x = block(x)
            logits = functional.linear(self.norm(x), self.embed.weight)
            return functional.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))

    model = GPT()
    optimizer = torch.optim.AdamW(model.parameters(), RATE, BETAS, weight_decay=DECAY)
    tokens, targets = tensor(task.tokens).long(), tensor(task.targets).long()

    def run() -> Any:
        loss = model(tokens, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return run


def flax_nnx(task: Task) -> Step:
    """Return a jitted step in Flax NNX with its own layers, as in its documentation."""
    return nnx_step(task.config, task.start, adamw(), (jnp.asarray(task.tokens), jnp.asarray(task.targets)))


def nnx_step(
    config: gf.GPTConfig, start: Params, optimizer: optax.GradientTransformation, batch: Any
) -> Step:
    """Return a jitted step of an unrolled GPT with layer norms and a tied head in Flax NNX.

    Args:
        config: of the GPT.
        start: the initial parameters of `gf.gpt(config)`.
        optimizer: from optax.
        batch: tokens and targets, each `[batch, T]`.
    """
    from flax import nnx

    rngs, width, heads = nnx.Rngs(0), config.width, config.n_heads
    half = None if config.compute is None else jnp.dtype(config.compute)
    of_all = {"use_bias": config.bias, "dtype": half, "rngs": rngs}
    linear = partial(nnx.Linear, **of_all)
    norm = partial(nnx.LayerNorm, width, epsilon=config.norm_epsilon, **of_all)

    class Block(nnx.Module):
        def __init__(self) -> None:
            self.norm1, self.norm2 = norm(), norm()
            self.attention = nnx.MultiHeadAttention(heads, width, decode=False, **of_all)
            self.up, self.down = linear(width, 4 * width), linear(4 * width, width)

        def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
            x = x + self.attention(self.norm1(x), mask=mask)
            h = nnx.gelu(self.up(self.norm2(x)), approximate=config.feed == "gelu")
            return x + self.down(h)

    class GPT(nnx.Module):
        def __init__(self) -> None:
            self.embed = nnx.Embed(config.vocab, width, dtype=half, rngs=rngs)
            self.positions = nnx.Embed(config.context, width, dtype=half, rngs=rngs)
            self.blocks = nnx.List([Block() for _ in range(config.n_layers)])
            self.norm = norm()

        def __call__(self, tokens: jax.Array) -> jax.Array:
            mask = nnx.make_causal_mask(tokens)
            x = self.embed(tokens) + self.positions(jnp.arange(tokens.shape[1]))
            for block in self.blocks:
                x = block(x, mask)
            return self.embed.attend(self.norm(x))

    def fill(layer: Any, p: Params, kernel: tuple[int, ...] = (), bias: tuple[int, ...] = ()) -> None:
        if "gain" in p:
            layer.scale[...] = p["gain"]
        else:
            matrix = p["W"].T  # [out, in] -> [in, out]
            layer.kernel[...] = matrix.reshape(kernel or matrix.shape)
        if "b" in p:
            layer.bias[...] = p["b"].reshape(bias or p["b"].shape)

    model, size = GPT(), width // heads
    model.embed.embedding[...] = start["embed"]["W"]
    model.positions.embedding[...] = start["positions"]["W"]
    fill(model.norm, start["final_norm"])
    for i, block in enumerate(model.blocks):
        p = start["blocks"][str(i)]
        for name in ("query", "key", "value"):
            layer = getattr(block.attention, name)
            fill(layer, p["attention"][name], (width, heads, size), (heads, size))
        fill(block.attention.out, p["attention"]["out"], (heads, size, width))
        for layer, name in ((block.up, "up"), (block.down, "down")):
            fill(layer, p["feed"][name])
        for layer, name in ((block.norm1, "attention_norm"), (block.norm2, "feed_norm")):
            fill(layer, p[name])
    optimizer = nnx.Optimizer(model, optimizer, wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any, tokens: jax.Array, targets: jax.Array) -> jax.Array:
        def loss(model: Any) -> jax.Array:
            logits = model(tokens).astype(jnp.float32)
            return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    return lambda: step(model, optimizer, *batch)


def equinox(task: Task) -> Step:
    """Return a jitted step in Equinox with its own layers, one sequence under vmap, as in its documentation."""
    import equinox as eqx

    config, key = task.config, jax.random.key(0)
    width = config.width

    def linear(W: jax.Array) -> Any:
        layer = eqx.nn.Linear(W.shape[1], W.shape[0], use_bias=False, key=key)
        return eqx.tree_at(lambda layer: layer.weight, layer, W)

    def norm() -> Any:
        return eqx.nn.LayerNorm(width, use_bias=False)

    class Block(eqx.Module):
        norm1: Any
        norm2: Any
        attention: Any
        up: Any
        down: Any

        def __init__(self, p: Params) -> None:
            self.norm1, self.norm2 = norm(), norm()
            attention = eqx.nn.MultiheadAttention(config.n_heads, width, key=key)
            self.attention = eqx.tree_at(
                lambda a: (a.query_proj, a.key_proj, a.value_proj, a.output_proj),
                attention,
                tuple(linear(p["attention"][name]["W"]) for name in ("query", "key", "value", "out")),
            )
            self.up, self.down = linear(p["feed"]["up"]["W"]), linear(p["feed"]["down"]["W"])

        def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
            h = jax.vmap(self.norm1)(x)
            x = x + self.attention(h, h, h, mask)
            h = jax.vmap(self.up)(jax.vmap(self.norm2)(x))
            return x + jax.vmap(self.down)(jax.nn.gelu(h, approximate=False))

    class GPT(eqx.Module):
        embed: Any
        positions: Any
        blocks: list
        norm: Any

        def __init__(self) -> None:
            self.embed = eqx.nn.Embedding(weight=task.start["embed"]["W"])
            self.positions = eqx.nn.Embedding(weight=task.start["positions"]["W"])
            self.blocks = [Block(p) for p in task.blocks]
            self.norm = norm()

        def __call__(self, tokens: jax.Array) -> jax.Array:
            length = len(tokens)
            mask = jnp.tril(jnp.ones([length, length], bool))
            x = jax.vmap(self.embed)(tokens) + jax.vmap(self.positions)(jnp.arange(length))
            for block in self.blocks:
                x = block(x, mask)
            return jax.vmap(self.norm)(x) @ self.embed.weight.T

    optimizer = adamw()

    @eqx.filter_jit
    def step(model: Any, state: Any, tokens: jax.Array, targets: jax.Array) -> tuple[Any, Any, jax.Array]:
        def loss(model: Any) -> jax.Array:
            logits = jax.vmap(model)(tokens)  # [batch, T, vocab]
            return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

        value, grads = eqx.filter_value_and_grad(loss)(model)
        updates, state = optimizer.update(grads, state, eqx.filter(model, eqx.is_array))
        return eqx.apply_updates(model, updates), state, value

    model = GPT()
    now = [(model, optimizer.init(eqx.filter(model, eqx.is_array)))]
    batch = jnp.asarray(task.tokens), jnp.asarray(task.targets)

    def run() -> jax.Array:
        *after, value = step(*now[0], *batch)
        now[0] = tuple(after)
        return value

    return run


CONTENDERS: dict[str, Callable[[Task], Step]] = {
    BASELINE: partial(raw_step, flat=True, scan=False),
    "raw JAX, flat, separate q, k, v": partial(raw_step, flat=True, scan=False, named=separate),
    "raw JAX, flat, scanned": partial(raw_step, flat=True, scan=True),
    "raw JAX, 3-D": partial(raw_step, flat=False, scan=False),
    "gradfn": partial(gradfn_step, scan=False),
    "gradfn, scanned": partial(gradfn_step, scan=True),
    "Flax NNX": flax_nnx,
    "Equinox": equinox,
    "PyTorch": pytorch,
}


def task_of(config: gf.GPTConfig, batch: int) -> Task:
    """Return a task with initial parameters of gradfn and random tokens."""
    tokens = np.random.default_rng(0).integers(0, config.vocab, (batch, config.context + 1), np.int32)
    return Task(config, gf.gpt(config).init(jax.random.key(0)), tokens[:, :-1], tokens[:, 1:])


def steps(task: Task, names: Iterable[str]) -> tuple[dict[str, Step], dict[str, str]]:
    """Return the steps whose packages are installed, and why others are skipped."""
    return harness.available(lambda name: CONTENDERS[name](task), names)


def counted(step: Step, calls: int = STEPS) -> harness.Contender:
    """Return the contender that takes ten steps, waits for the last and returns their number."""

    def run() -> float:
        for _ in range(calls):
            loss = step()
        float(loss)
        return STEPS

    return run


def print_first_calls() -> None:
    """Print the time of gradfn's first step, including tracing and compilation, for two depths."""
    tiny = gf.GPTConfig(**{**vars(CONFIG), "n_layers": 1})
    float(gradfn_step(task_of(tiny, BATCH), scan=True)())  # the first call includes all imports
    for scan in (False, True):
        for n_layers in (4, 24):
            task = task_of(gf.GPTConfig(**{**vars(CONFIG), "n_layers": n_layers}), BATCH)
            step, start = gradfn_step(task, scan), time.perf_counter()
            float(step())
            form = "scanned" if scan else "unrolled"
            print(f"first call, {n_layers} layers {form}: {time.perf_counter() - start:.1f} s")


def wants(name: str, only: list[str] | None) -> bool:
    """Tell whether a contender takes part."""
    return not only or name in (*only, BASELINE)


def main() -> None:
    parser = harness.arguments(__doc__.partition("\n")[0], rounds=15)
    parser.add_argument(
        "--malloc", choices=MALLOC, default="default", help="which freed memory the process keeps"
    )
    parser.add_argument("--compile", action="store_true", help="only time gradfn's first calls")
    parser.add_argument(
        "--only", nargs="+", choices=[*CONTENDERS, FIT], help="compare only these with the baseline"
    )
    options = parser.parse_args()
    wanted = MALLOC[options.malloc]
    if not wanted.items() <= os.environ.items():  # glibc reads it before Python starts
        command = [sys.executable, "-m", "benchmarks.gpt_step", *sys.argv[1:]]
        os.execve(sys.executable, command, os.environ | wanted)
    if options.compile:
        print_first_calls()
        return
    task = task_of(CONFIG, BATCH)
    ready, skipped = steps(task, [name for name in CONTENDERS if wants(name, options.only)])
    contenders = {name: counted(step) for name, step in ready.items()}
    if wants(FIT, options.only):
        ready[FIT] = gradfn_fit(task, STEPS)
        contenders[FIT] = counted(ready[FIT], calls=1)
    timings = harness.race(contenders, options.rounds)

    def report(
        compared: str, timings: Mapping[str, harness.Timing], baseline: str, aims: dict[str, float]
    ) -> None:
        harness.report(
            f"A training step of a small GPT{compared}, malloc {options.malloc}",
            timings,
            baseline,
            "steps",
            aims={name: aim for name, aim in aims.items() if name in timings},
            skipped=skipped,
            packages=(*harness.PACKAGES, "torch", "equinox", "flax"),
            json_file=options.json,
        )

    report("", timings, BASELINE, {})
    for compared, baseline, aims in (
        (" and PyTorch's", "PyTorch", OF_PYTORCH),
        (", scanned and unrolled", "gradfn", OF_UNROLLED),
    ):
        some = {name: timings[name] for name in (baseline, *aims) if name in timings}
        if baseline in some and len(some) > 1:
            report(compared, some, baseline, aims)
    milliseconds = {name: 1000 * float(np.median(timing.wall)) for name, timing in timings.items()}
    print("ms per step:", ", ".join(f"{name} {value:.1f}" for name, value in milliseconds.items()))
    print("loss now:", ", ".join(f"{name} {float(step()):.4f}" for name, step in ready.items()))


if __name__ == "__main__":
    main()
