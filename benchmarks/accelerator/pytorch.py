"""The training step of GPT-2 in PyTorch."""

import os
import time
from typing import Any

import jax
import numpy as np

import gradfn as gf
from benchmarks import harness
from benchmarks.accelerator import common
from benchmarks.accelerator.common import BETAS, DECAY, RATE, Emit, Params, Shapes


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
            torch.from_numpy(a.astype(np.int64)).to(device) for a in common.text_of(config, batch_size)
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
        name,
        **common.step_figures(config, batch_size, seconds),
        peak_gb=peak,
        first_call_s=first,
        loss=float(run()),
    )
