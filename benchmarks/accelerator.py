"""The correctness and the speed of gradfn on an accelerator.

    python -m benchmarks.accelerator                     # all sections, in under six minutes on one GPU
    python -m benchmarks.accelerator --only gpt pytorch
    python -m benchmarks.accelerator --reduced           # small shapes, to try the script itself on a CPU

The sections run in this order, each in its own process, so that each has the whole device memory and a crash or a
timeout affects one section only. Every row is printed and written to the JSON file as soon as it is measured.

- `correctness`: values, gradients, statistics, per-example norms, the origin of a NaN and a resumed run on the
  default device, compared with the CPU, with float32 products at the highest precision.
- `gpt`: a training step of GPT-2 124M in bfloat16, 1,024 tokens per sequence, AdamW: `gf.train_step`, raw JAX, and
  raw JAX with cuDNN's fused attention, all without donated buffers.
- `pytorch`: the same step in PyTorch, `torch.compile` and `scaled_dot_product_attention`.
- `overhead`: `gf.inspect` with five statistics, per-example norms and a Hessian-vector product, each relative to
  `jax.value_and_grad` of the same loss.
- `mlp`: an epoch of 784-16-10 at batch 32, `gf.fit` and by hand.

MFU is the fraction of the device's peak bfloat16 rate that 6 N + 12 L T d floating-point operations per token take,
with N parameters, L layers, T tokens per sequence and width d (Chowdhery et al., *PaLM*, 2022, appendix B).
"""

import argparse
import contextlib
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich import box
from rich.console import Console
from rich.table import Table

import gradfn as gf
from benchmarks import fit_mnist, harness
from gradfn.inspection.summaries import summarize

MINUTES = 5.75
RATE, BETAS, DECAY = 3e-4, (0.9, 0.95), 0.1
FIVE = ("mean", "rms", "max", "zeros", "nonfinite")
# Dense bfloat16 operations per second from the vendors' data sheets, keyed by a part of the device name in jax.
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L4": 121e12, "TPU v5 lite": 197e12, "TPU v4": 275e12}
# A relative difference in float32 that the order of summation explains.
BOUND = 1e-4

Row = dict[str, Any]
Emit = Callable[..., None]  # (name, **figures)
Params = dict[str, Any]


class Shapes(NamedTuple):
    """The sizes of all benchmarks."""

    config: gf.GPTConfig
    batches: tuple[int, ...]  # the first that fits in memory is used
    rounds: int
    steps: int  # in one call
    images: int
    compile: bool  # whether PyTorch compiles


# 50,304 is GPT-2's vocabulary size rounded up to a multiple of 128, as in nanoGPT.
FULL = Shapes(gf.GPTConfig(vocab=50_304, compute="bfloat16"), (16, 8, 4, 2), 5, 4, 50_000, True)
REDUCED = Shapes(
    gf.GPTConfig(vocab=128, context=16, n_layers=1, n_heads=2, width=16, compute="bfloat16"),
    (2,),
    2,
    1,
    640,
    False,
)


# Correctness -----------------------------------------------------------------------------------------------------


def losses() -> Iterator[tuple[str, Callable, Params, Any]]:
    """Yield name, loss of one example, parameters and a batch of eight for one net of each kind."""
    key = jax.random.key(0)
    pixels = jax.random.normal(jax.random.key(1), (8, 784))
    labels = jnp.arange(8) % 10
    text = jax.random.randint(jax.random.key(2), (8, 17), 0, 65)
    config = gf.GPTConfig(vocab=65, context=16, n_layers=2, n_heads=2, width=32)
    mlp, cnn, gpt = gf.mlp([784, 16, 10]), gf.cnn(channels=(8, 16), hidden=(32,)), gf.gpt(config)
    yield "mlp", gf.classification_loss(mlp), mlp.init(key), (pixels, labels)
    yield "cnn", gf.classification_loss(cnn), cnn.init(key), (pixels, labels)
    yield "gpt", gf.next_token_loss(gpt), gpt.init(key), (text[:, :-1], text[:, 1:])


def difference(found: Any, expected: Any) -> float:
    """Return the largest difference between two trees, each leaf relative to its largest magnitude."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    worst = 0.0
    for one, other in pairs:
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        if other.size:
            scale = max(float(np.abs(other).max()), 1e-6)
            worst = max(worst, float(np.abs(one - other).max()) / scale)
    return worst


def on(device: jax.Device, f: Callable, *args: Any) -> Any:
    """Return the result of a jitted function on a device."""
    return jax.jit(f)(*jax.device_put(args, device))


def correctness(shapes: Shapes, emit: Emit) -> None:
    """Compare the default device with the CPU."""
    device, cpu = jax.devices()[0], jax.devices("cpu")[0]

    with jax.default_matmul_precision("highest"):
        for name, loss, params, batch in losses():
            expected = on(cpu, everything_of(loss), params, batch)
            found = on(device, everything_of(loss), params, batch)
            for what, value in expected.items():
                error = difference(found[what], value)
                emit(f"{name}: {what}", difference=error, bound=BOUND, ok=error <= BOUND)
        _, _, params, batch = next(losses())
        compare_origins(params, batch, device, cpu, emit)
    compare_magnitudes(device, emit)
    compare_resumed(emit)


def everything_of(loss: Callable) -> Callable:
    """Return a function that computes all compared results in one program."""
    mean = gf.batch_mean(loss)

    def of(params: Params, batch: Any) -> Row:
        inspection = gf.inspect(mean, input_grads=False)(params, batch)
        statistics = [s.values for s in (*inspection.stats.values(), *inspection.grad_stats.values())]
        return {
            "value and gradients": jax.value_and_grad(mean)(params, batch),
            "inspect": (inspection.value, inspection.grads, statistics),
            "per-example norms": gf.per_example.norms(loss)(params, batch),
        }

    return of


def compare_magnitudes(device: jax.Device, emit: Emit) -> None:
    """Compare root mean squares of values whose squares overflow or underflow in float32 with numpy in float64."""
    x = np.random.default_rng(0).standard_normal(100_000)
    scales = [10.0**exponent for exponent in range(-30, 31, 5)]
    values = [(scale * x).astype(np.float32) for scale in scales]
    expected = [np.sqrt(np.mean(np.square(value.astype(np.float64)))) for value in values]
    found = on(device, lambda values: [summarize(value, ("rms",)).rms for value in values], values)
    error = max(
        difference([one / scale], [other / scale])
        for one, other, scale in zip(found, expected, scales, strict=True)
    )
    emit("rms from 1e-30 to 1e30", difference=error, bound=BOUND, ok=error <= BOUND)


def compare_origins(params: Params, batch: Any, device: jax.Device, cpu: jax.Device, emit: Emit) -> None:
    """Check that a deliberate logarithm of zero is found at the same equation."""

    def loss(params: Params, batch: Any) -> jax.Array:
        x, _ = batch
        hidden = jax.nn.relu(x @ params["W1"].T + params["b1"])  # [batch, 16]
        return jnp.log(hidden).sum()

    def found(device: jax.Device) -> list[Any]:
        report = gf.nan_origin(loss)(*jax.device_put((params, batch), device))
        # The report includes ranges of operands, which differ by rounding.
        return [event and event[:-2] for event in (report.nan, report.inf)]

    events, expected = found(device), found(cpu)
    emit("nan_origin", ok=events == expected and any(event and event[1] == "log" for event in events))


def compare_resumed(emit: Emit) -> None:
    """Check that an interrupted and resumed run ends like an uninterrupted one."""
    try:
        import tensorboardX  # noqa: F401
    except ImportError:
        emit("resume", skipped="tensorboardX is not installed")
        return
    _, of_one, params, (x, y) = next(losses())
    loss = gf.batch_mean(of_one)
    data = jnp.tile(x, (8, 1)), jnp.tile(y, 8)
    settings = {"steps": 24, "batch_size": 8, "eval_every": 4, "progress": False, "checkpoint_seconds": 0.0}
    whole = gf.fit(loss, params, data, optax.adam(1e-3), **settings)
    calls = iter(range(100))

    def interrupt(params: Params) -> dict[str, float]:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return {}

    with tempfile.TemporaryDirectory() as folder:
        with contextlib.suppress(KeyboardInterrupt):
            gf.fit(loss, params, data, optax.adam(1e-3), **settings, folder=folder, evaluate=interrupt)
        resumed = gf.fit(loss, params, data, optax.adam(1e-3), **settings, folder=folder, resume=True)
    error = difference(resumed.params, whole.params)
    emit("resume", difference=error, bound=0.0, ok=error == 0.0)


# A step of GPT-2 ---------------------------------------------------------------------------------------------------


def decayed(params: Params) -> Any:
    """Return which parameters decay: those with two axes, as in nanoGPT."""
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)


def adamw() -> optax.GradientTransformation:
    return optax.adamw(RATE, *BETAS, weight_decay=DECAY, mask=decayed)


def text_of(config: gf.GPTConfig, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Return random tokens and targets `[batch, T]`."""
    tokens = np.random.default_rng(0).integers(0, config.vocab, (batch, config.context + 1), np.int32)
    return tokens[:, :-1], tokens[:, 1:]


def raw_loss(config: gf.GPTConfig, fused_attention: bool, params: Params, batch: Any) -> jax.Array:
    """Return GPT-2's loss of a batch, by hand: products in bfloat16; norms, softmax and loss in float32."""
    tokens, targets = batch
    half = jnp.dtype(config.compute)
    n, length = tokens.shape
    causal = jnp.tril(jnp.ones((length, length), bool))

    def linear(x: jax.Array, p: Params) -> jax.Array:
        return x @ p["W"].astype(half).T + p["b"].astype(half)

    def norm(x: jax.Array, p: Params) -> jax.Array:
        x = x.astype(jnp.float32)
        x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + config.norm_epsilon)
        return (x * p["gain"] + p["b"]).astype(half)

    def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        if fused_attention:
            return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
        scores = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32)
        scores = jnp.where(causal, scores * q.shape[-1] ** -0.5, jnp.finfo(jnp.float32).min)
        return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores).astype(half), v)

    x = (params["embed"]["W"][tokens] + params["positions"]["W"][:length]).astype(half)  # [n, T, width]
    for i in range(config.n_layers):
        p = params["blocks"][str(i)]
        h = norm(x, p["attention_norm"])
        # [n, T, width] -> [n, T, heads, size]
        q, k, v = (
            linear(h, p["attention"][name]).reshape(n, length, config.n_heads, -1)
            for name in ("query", "key", "value")
        )
        x = x + linear(attention(q, k, v).reshape(x.shape), p["attention"]["out"])
        h = jax.nn.gelu(linear(norm(x, p["feed_norm"]), p["feed"]["up"]))
        x = x + linear(h, p["feed"]["down"])
    logits = norm(x, params["final_norm"]) @ params["embed"]["W"].astype(half).T  # [n, T, vocab]
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets).mean()


def raw_step(loss: Callable) -> Callable:
    """Return the training step `(params, state, batch) -> (params, state, loss)` by hand."""
    optimizer = adamw()

    @jax.jit
    def step(params: Params, state: Any, batch: Any) -> tuple[Params, Any, jax.Array]:
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def gradfn_contender(shapes: Shapes, batch: Any) -> tuple[Any, Callable[[], jax.Array]]:
    """Return the compiled `gf.train_step`, and a function that takes a step and returns the loss."""
    net = gf.gpt(shapes.config)
    step = gf.train_step(gf.batch_mean(gf.next_token_loss(net)), adamw())
    now = [gf.train_state(net.init(jax.random.key(0)), adamw(), jax.random.key(0))]
    compiled = step.lower(now[0], batch).compile()

    def run() -> jax.Array:
        now[0], metrics = compiled(now[0], batch)
        return metrics["loss"]

    return compiled, run


def raw_contender(shapes: Shapes, batch: Any, fused_attention: bool) -> tuple[Any, Callable[[], jax.Array]]:
    """Return the compiled step by hand, and a function that takes a step and returns the loss."""
    params = gf.gpt(shapes.config).init(jax.random.key(0))
    now = [(params, adamw().init(params))]
    step = raw_step(functools.partial(raw_loss, shapes.config, fused_attention))
    compiled = step.lower(*now[0], batch).compile()

    def run() -> jax.Array:
        *state, value = compiled(*now[0], batch)
        now[0] = tuple(state)
        return value

    return compiled, run


def gpt(shapes: Shapes, emit: Emit) -> None:
    """Compare a training step of gradfn with raw JAX."""
    makers = {"gradfn": gradfn_contender, "raw JAX": functools.partial(raw_contender, fused_attention=False)}
    if jax.default_backend() == "gpu":
        makers["raw JAX, cuDNN attention"] = functools.partial(raw_contender, fused_attention=True)
    for batch_size in shapes.batches:
        batch = jax.device_put(text_of(shapes.config, batch_size))
        compiled, runs, firsts = {}, {}, {}
        for name, make in makers.items():
            began = time.perf_counter()
            try:
                compiled[name], runs[name] = make(shapes, batch)
                float(runs[name]())
                firsts[name] = time.perf_counter() - began
            except Exception as error:
                runs.pop(name, None)
                if "RESOURCE_EXHAUSTED" not in str(error):
                    emit(name, skipped=first_line(error))
        if "gradfn" in runs:
            break
    else:
        raise MemoryError(
            f"gpt: expected a batch that fits in memory, got out of memory at batch size {batch_size}"
        )
    timings = harness.race({name: stepping(run, shapes.steps) for name, run in runs.items()}, shapes.rounds)
    for name, run in runs.items():
        seconds = float(np.median(timings[name].wall))
        figures = step_figures(shapes.config, batch_size, seconds)
        emit(name, **figures, peak_gb=peak_gb(compiled[name]), first_call_s=firsts[name], loss=float(run()))


def stepping(run: Callable[[], Any], n: int) -> harness.Contender:
    """Return the contender that runs `n` times and waits for the last result."""

    def steps() -> float:
        out = None
        for _ in range(n):
            out = run()
        jax.block_until_ready(out)
        return n

    return steps


def step_figures(config: gf.GPTConfig, batch_size: int, seconds: float) -> Row:
    """Return throughput and MFU of a step."""
    tokens = batch_size * config.context
    figures = {"batch": batch_size, "ms": 1e3 * seconds, "tokens_per_s": tokens / seconds}
    peak = next((rate for name, rate in PEAK.items() if name in device_kind()), None)
    if peak:
        n = gf.count(gf.gpt(config).spec)
        flops = 6 * n + 12 * config.n_layers * config.context * config.width  # per token
        figures["mfu"] = flops * tokens / seconds / peak
    return figures


def device_kind() -> str:
    """Return the name of the measured device; in PyTorch's process only PyTorch can see it."""
    return os.environ.get("BENCHMARK_DEVICE_KIND") or jax.devices()[0].device_kind


def peak_gb(compiled: Any) -> float | None:
    """Return the memory that XLA plans for a compiled program with its arguments and results, in GB."""
    plan = compiled.memory_analysis()
    if plan is None:
        return None
    total = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes
    return (total - plan.alias_size_in_bytes) / 1e9


def first_line(error: BaseException) -> str:
    return (
        f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}" if str(error) else repr(error)
    )


def pytorch(shapes: Shapes, emit: Emit) -> None:
    """Time the same step in PyTorch."""
    try:
        import torch
    except ImportError:
        emit("PyTorch", skipped="torch is not installed")
        return
    from torch.nn import functional

    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    if cuda:
        os.environ["BENCHMARK_DEVICE_KIND"] = torch.cuda.get_device_name()
        torch.set_float32_matmul_precision("high")
    config = shapes.config
    start = gf.gpt(config).init(jax.random.key(0))

    def parameter(leaf: Any) -> Any:
        return torch.nn.Parameter(torch.from_numpy(np.array(leaf)).to(device))

    params = jax.tree.map(parameter, start)

    def linear(x: Any, p: Params) -> Any:
        return functional.linear(x, p["W"], p["b"])

    def norm(x: Any, p: Params) -> Any:
        return functional.layer_norm(x, x.shape[-1:], p["gain"], p["b"], config.norm_epsilon)

    def loss_of(tokens: Any, targets: Any) -> Any:
        n, length = tokens.shape
        x = functional.embedding(tokens, params["embed"]["W"]) + params["positions"]["W"][:length]
        for i in range(config.n_layers):
            p = params["blocks"][str(i)]
            h = norm(x, p["attention_norm"])
            # [n, T, width] -> [n, heads, T, size]
            q, k, v = (
                linear(h, p["attention"][name]).view(n, length, config.n_heads, -1).transpose(1, 2)
                for name in ("query", "key", "value")
            )
            mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + linear(mixed.transpose(1, 2).reshape(x.shape), p["attention"]["out"])
            h = functional.gelu(linear(norm(x, p["feed_norm"]), p["feed"]["up"]), approximate="tanh")
            x = x + linear(h, p["feed"]["down"])
        logits = functional.linear(norm(x, params["final_norm"]), params["embed"]["W"])
        return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    leaves = jax.tree.leaves(params)
    groups = [
        {"params": [leaf for leaf in leaves if leaf.ndim >= 2], "weight_decay": DECAY},
        {"params": [leaf for leaf in leaves if leaf.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=BETAS, fused=cuda)
    compute = torch.compile(loss_of) if shapes.compile else loss_of
    for batch_size in shapes.batches:
        tokens, targets = (
            torch.from_numpy(a.astype(np.int64)).to(device) for a in text_of(config, batch_size)
        )

        def run(tokens: Any = tokens, targets: Any = targets) -> Any:
            with torch.autocast(device, torch.bfloat16):
                value = compute(tokens, targets)
            value.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return value.detach()

        try:
            began = time.perf_counter()
            float(run())
            first = time.perf_counter() - began
            break
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()

    def steps() -> float:
        value = None
        for _ in range(shapes.steps):
            value = run()
        float(value)
        return shapes.steps

    seconds = float(np.median(harness.race({"PyTorch": steps}, shapes.rounds)["PyTorch"].wall))
    peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else None
    name = f"PyTorch {torch.__version__}" + (", compiled" if shapes.compile else ", eager")
    emit(
        name, **step_figures(config, batch_size, seconds), peak_gb=peak, first_call_s=first, loss=float(run())
    )


# The cost of inspection --------------------------------------------------------------------------------------


def overhead(shapes: Shapes, emit: Emit) -> None:
    """Compare inspection, norms and curvature with the plain gradient, one at a time to save memory."""
    net = gf.gpt(shapes.config)
    loss = gf.next_token_loss(net)
    mean = gf.batch_mean(loss)
    params = net.init(jax.random.key(0))
    plain = jax.value_and_grad(mean)
    inspected = gf.inspect(mean, stats=FIVE, input_grads=False)
    ways = {
        "inspect, five statistics": lambda params, batch: inspected(params, batch),
        "per-example norms": lambda params, batch: gf.per_example.norms(loss)(params, batch),
        "Hessian-vector product": lambda params, batch: gf.curvature.hvp(mean)(params, params, batch),
    }

    def ready(f: Callable, batch: Any) -> tuple[Any, Callable[[], Any], float]:
        began = time.perf_counter()
        compiled = jax.jit(f).lower(params, batch).compile()
        jax.block_until_ready(compiled(params, batch))
        return compiled, lambda: compiled(params, batch), time.perf_counter() - began

    plains: dict[int, Any] = {}
    for name, way in ways.items():
        for batch_size in shapes.batches:
            batch = jax.device_put(text_of(shapes.config, batch_size))
            try:
                if batch_size not in plains:
                    plains[batch_size] = ready(plain, batch)
                    compiled, _, first = plains[batch_size]
                    emit("gradient", batch=batch_size, peak_gb=peak_gb(compiled), first_call_s=first)
                compiled, run, first = ready(way, batch)
                contenders = {
                    "plain": stepping(plains[batch_size][1], shapes.steps),
                    name: stepping(run, shapes.steps),
                }
                timings = harness.race(contenders, shapes.rounds)
            except Exception as error:
                if "RESOURCE_EXHAUSTED" in str(error):
                    continue
                emit(name, skipped=first_line(error))
                break
            low, ratio, high = harness.quartiles(harness.divided(timings[name].wall, timings["plain"].wall))
            milliseconds = 1e3 * float(np.median(timings[name].wall))
            peak = peak_gb(compiled)
            figures = {
                "batch": batch_size,
                "ms": milliseconds,
                "over_gradient": ratio,
                "quartiles": [low, high],
            }
            emit(name, **figures, peak_gb=peak, first_call_s=first)
            break
        else:
            emit(name, skipped=f"no batch size of {shapes.batches} fits in memory")


def mlp(shapes: Shapes, emit: Emit) -> None:
    """Compare an epoch of the digit network."""
    x, y = fit_mnist.load(None)
    task = fit_mnist.starting_task(x[: shapes.images], y[: shapes.images])
    ready, _ = fit_mnist.trainers(task, ["gf.fit", "plain scan", fit_mnist.BASELINE, "jitted call per step"])
    contenders = {name: fit_mnist.counted(trainer.epoch, task.examples) for name, trainer in ready.items()}
    timings = harness.race(contenders, shapes.rounds, warmup=1)
    for name, timing in timings.items():
        emit(
            f"784-16-10: {name}", examples_per_s=1 / float(np.median(timing.wall)), first_call_s=timing.first
        )


SECTIONS = {"correctness": correctness, "gpt": gpt, "pytorch": pytorch, "overhead": overhead, "mlp": mlp}


# The command -------------------------------------------------------------------------------------------------------


def about() -> Row:
    """Return what the results depend on."""
    packages = (*harness.PACKAGES, "torch", "jax-cuda13-plugin", "jax-cuda12-plugin")
    kind = {"device": device_kind(), "platform": jax.default_backend(), "devices": jax.device_count()}
    return kind | harness.environment(packages)


def run_section(name: str, reduced: bool) -> None:
    """Run one section in this process, and print each row as a line of JSON."""
    shapes = REDUCED if reduced else FULL

    def emit(row: str, **figures: Any) -> None:
        print("ROW " + json.dumps({"section": name, "name": row} | figures), flush=True)

    if name == "about":
        emit("about", **about())
    else:
        SECTIONS[name](shapes, emit)


def rows_of(name: str, reduced: bool, seconds: float) -> Iterator[Row]:
    """Run one section in its own process; yield its rows as they arrive, and a last one if it ended early."""
    command = [sys.executable, "-m", "benchmarks.accelerator", "--section", name] + ["--reduced"] * reduced
    # PyTorch's process uses JAX for the initial parameters only, so JAX must not reserve device memory.
    environment = os.environ | ({"JAX_PLATFORMS": "cpu"} if name == "pytorch" else {})
    environment |= {
        "XLA_PYTHON_CLIENT_MEM_FRACTION": environment.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    }
    expired = threading.Event()
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        ) as process,
    ):

        def stop() -> None:
            expired.set()
            process.kill()

        timer = threading.Timer(max(seconds, 0.1), stop)
        timer.start()
        assert process.stdout
        for line in process.stdout:
            if line.startswith("ROW "):
                yield json.loads(line[4:])
        code = process.wait()
        timer.cancel()
        errors.seek(0)
        fault = fault_in(errors.read())
    if expired.is_set():
        yield {"section": name, "name": name, "skipped": "out of time"}
    elif code:
        yield {"section": name, "name": name, "skipped": f"failed: {fault}"}


def fault_in(errors: str) -> str:
    """Return the line of a traceback that names the error."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Exit)\b", line)]
    return (named or lines or ["no message"])[-1][:300]


def cells(row: Row) -> list[str]:
    """Return the cells of a table row."""
    if "skipped" in row:
        return [row["section"], row["name"], f"skipped: {row['skipped']}"]
    forms = {
        "ok": lambda ok: "right" if ok else "WRONG",
        "difference": "differs by {:.1e}".format,
        "bound": "at most {:.0e}".format,
        "batch": "batch {}".format,
        "ms": "{:.1f} ms".format,
        "over_gradient": "{:.3f} of the gradient's time".format,
        "quartiles": lambda pair: "[{:.3f} {:.3f}]".format(*pair),
        "tokens_per_s": "{:,.0f} tokens/s".format,
        "examples_per_s": "{:,.0f} examples/s".format,
        "mfu": "MFU {:.1%}".format,
        "peak_gb": "peak {:.2f} GB".format,
        "first_call_s": "first call {:.0f} s".format,
        "loss": "loss {:.3f}".format,
    }
    figures = [form(row[name]) for name, form in forms.items() if row.get(name) is not None]
    return [row["section"], row["name"], ", ".join(figures)]


def main(arguments: list[str] | None = None) -> int:
    """Run the sections in order; return the number of failed correctness checks."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="only these sections"
    )
    parser.add_argument("--minutes", type=float, default=MINUTES, help="time limit in minutes (%(default)s)")
    parser.add_argument("--reduced", action="store_true", help="small shapes, to try the script on a CPU")
    parser.add_argument(
        "--json", metavar="FILE", default="accelerator.json", help="the file to write (%(default)s)"
    )
    parser.add_argument("--section", choices=["about", *SECTIONS], help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.section:
        run_section(options.section, options.reduced)
        return 0
    end, rows = time.monotonic() + 60 * options.minutes, []
    console = Console(width=160)
    for name in ("about", *options.only):
        for row in rows_of(name, options.reduced, end - time.monotonic()):
            rows.append(row)
            Path(options.json).write_text(
                json.dumps({"reduced": options.reduced, "rows": rows}, indent=1) + "\n"
            )
            if name != "about":
                console.print("  ".join(cells(row)), highlight=False, markup=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    for column in ("section", "", "figures"):
        table.add_column(column, overflow="fold")
    for row in rows:
        if row["section"] != "about":
            table.add_row(*cells(row))
    console.print(table)
    known = {k: v for k, v in rows[0].items() if k not in ("section", "name")} if rows else {}
    console.print(
        ", ".join(f"{name} {value}" for name, value in known.items()), highlight=False, markup=False
    )
    return sum(row.get("ok") is False for row in rows)


if __name__ == "__main__":
    sys.exit(main())
