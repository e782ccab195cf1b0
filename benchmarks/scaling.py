"""Memory and communication of a training step on many devices, without the devices: compiled ahead of time.

    python -m benchmarks.scaling                                        # 124M parameters on 1, 8 and 64 devices
    python -m benchmarks.scaling --models 8B --devices 64 --rules FSDP  # minutes, and 4 GB of memory

The program of `gf.fit` is compiled from shapes and shardings alone, for devices that XLA simulates on the CPU; no array
exists. Each line has the memory of one device, as a formula estimates it and as XLA's `memory_analysis` reports it, and
the bytes of the arrays that the collectives of one step return on a device, read from the compiled text; the body of a
loop counts once per iteration. Parameters and the two moments of AdamW are float32; products are in bfloat16.
"""

import argparse
import json
import math
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import gradfn as gf
from benchmarks import harness
from gradfn.train.chunk import chunks as fit_programs
from gradfn.train.source import Source

DEVICES = 64
FLAG = "--xla_force_host_platform_device_count"
COMMON = {"scan": True, "remat": True, "compute": "bfloat16"}
LLAMA = {"positions": "rope", "norm": "rms", "feed": "swiglu", "bias": False, "tied": False, "rope_base": 5e5}
# name: (architecture, sequences per device of the axis `data`, chunks of the loss); 50,304 tokens divide by 64
MODELS: dict[str, tuple[dict[str, Any], int, int]] = {
    "tiny": ({"vocab": 64, "context": 16, "n_layers": 2, "n_heads": 4, "width": 32}, 2, 2),
    "124M": ({"vocab": 50304}, 8, 8),
    "1.5B": ({"vocab": 50304, "n_layers": 48, "n_heads": 25, "width": 1600}, 4, 8),
    "8B": (
        LLAMA
        | {"vocab": 128256, "context": 8192, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8}
        | {"width": 4096, "hidden": 14336},
        1,
        16,
    ),
}
RULES = {
    "DATA_PARALLEL": gf.train.DATA_PARALLEL,
    "FSDP": gf.train.FSDP,
    "FSDP_TENSOR_PARALLEL": gf.train.FSDP_TENSOR_PARALLEL,
}
# Devices over which FSDP_TENSOR_PARALLEL splits heads and hidden nodes.
TENSOR = 4
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
}


class Traffic(NamedTuple):
    """How often a kind of collective runs in one step, and the bytes of what it returns on one device."""

    count: int
    bytes: int


class Case(NamedTuple):
    """What was compiled, and what it takes on each device, in bytes."""

    model: str
    devices: int
    rules: str
    tokens: int  # of one step, on all devices
    formula: dict[str, int]
    state: int  # the arguments, as XLA counts them
    temporaries: int
    collectives: dict[str, Traffic]
    seconds: float  # to compile


def mesh_of(devices: int, rules: str) -> Mesh:
    """Return a mesh of the first devices."""
    model = min(TENSOR, devices) if rules == "FSDP_TENSOR_PARALLEL" else 1
    shape, auto = (devices // model, model), (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh(shape, ("data", "model"), axis_types=auto, devices=jax.devices()[:devices])


def compile_case(model: str, devices: int, rules: str) -> Case:
    """Compile a step of a model and measure it."""
    sizes, sequences, chunks = MODELS[model]
    config, mesh = gf.GPTConfig(**COMMON, **sizes), mesh_of(devices, rules)
    net, optimizer = gf.gpt(config), optax.adamw(1e-4)
    shardings = gf.train.shardings(net, mesh, RULES[rules])
    batch = sequences * mesh.shape["data"]
    everywhere, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))

    params = jax.tree.map(shape_on, net.spec, shardings)
    state = jax.eval_shape(lambda params: gf.train_state(params, optimizer, jax.random.key(0)), params)
    moments = optax.tree_map_params(
        optimizer, lambda _, each: each, state.opt_state, shardings, transform_non_params=lambda _: everywhere
    )
    state = jax.tree.map(
        shape_on, state, state._replace(params=shardings, opt_state=moments, step=everywhere, key=everywhere)
    )
    tokens = jax.ShapeDtypeStruct((batch, config.context), jnp.int32, sharding=split)

    # What `gf.fit` compiles: steps in a loop, which reuse the memory of the state.
    loss = gf.batch_mean(gf.next_token_loss(net, chunks))
    source = Source(batch, None, None, None, lambda epoch: None, lambda arrays, order, row, key: order)
    advance: Any = fit_programs(loss, optimizer, source, state).advance
    start = time.perf_counter()
    compiled = advance.func.lower(*advance.args, state, (tokens, tokens), 0, 0).compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    return Case(
        model,
        devices,
        rules,
        batch * config.context,
        formula(config, mesh, shardings, net.spec, sequences, chunks),
        memory.argument_size_in_bytes,
        # What is returned lies where the arguments lay, except for the metrics.
        memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        collectives(compiled.as_text()),
        seconds,
    )


def shape_on(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    """Return the shape of an array that would lie there."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def formula(
    config: gf.GPTConfig, mesh: Mesh, shardings: Any, spec: Any, sequences: int, chunks: int
) -> dict[str, int]:
    """Return an estimate of the memory of one device, in bytes.

    Args:
        config: of the net, whose blocks are recomputed in the backward pass.
        mesh: of all devices.
        shardings: of the parameters.
        spec: of the net.
        sequences: of a batch, per device of the axis `data`.
        chunks: of the positions, whose logits are computed one after the other.

    Returns:
        Bytes of `parameters`, of Adam's two moments (`optimizer`), of `gradients`; of what a device gathers at a time
        (`gathered`: one block, or the head, whole along `data`, with its gradient); and of `activations`: the residual
        stream before each block, what one block computes and its gradient, a chunk of logits and its gradient.
    """
    params, layouts = jax.tree.leaves(spec), jax.tree.leaves(shardings)
    own = [math.prod(layout.shard_shape(param.shape)) for param, layout in zip(params, layouts, strict=True)]
    stacked = [param.axes[0] == "layers" for param in params]
    # What is split over `data` is whole while it is computed with.
    whole = [
        size * mesh.shape["data"] if "data" in layout.spec else 0
        for size, layout in zip(own, layouts, strict=True)
    ]
    width = jnp.dtype(config.compute).itemsize
    block = sum(size for size, each in zip(whole, stacked, strict=True) if each) // config.n_layers
    # All chunks of logits read the head, and add to its gradient in float32.
    head = max(size for size, each in zip(whole, stacked, strict=True) if not each)
    tensor = mesh.shape["model"]
    hidden = (config.hidden or 4 * config.width) * (3 if config.feed == "swiglu" else 2)
    heads = 2 * config.width * (1 + (config.n_kv_heads or config.n_heads) / config.n_heads)
    inside = 4 * config.width + (heads + hidden) / tensor
    logits = config.vocab / tensor / chunks
    per_position = width * (config.n_layers * config.width + 2 * inside) + 2 * 4 * logits
    return {
        "parameters": 4 * sum(own),
        "optimizer": 8 * sum(own),
        "gradients": 4 * sum(own),
        "gathered": 2 * max(width * block, 4 * head),
        "activations": round(sequences * config.context * per_position),
    }


def collectives(text: str) -> dict[str, Traffic]:
    """Return the collectives of a compiled program by kind, read from its text.

    An instruction in the body of a loop counts once per iteration, where the compiler knows how many there are.
    """
    bodies, entry = _computations(text)
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()

    def visit(name: str, times: int) -> None:
        for line in bodies[name]:
            kind, size = _collective(line)
            if kind:
                counts[kind] += times
                sizes[kind] += times * size
            trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
            for called in _called(line):
                if called in bodies:
                    visit(called, times * (int(trips[1]) if trips else 1))

    visit(entry, 1)
    return {kind: Traffic(counts[kind], sizes[kind]) for kind in KINDS if counts[kind]}


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Return the lines of each computation of a program, and the name of the first one to run."""
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        opened = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if opened:
            name = opened[2]
            bodies[name] = []
            entry = name if opened[1] else entry
        elif name:
            bodies[name].append(line)
    return bodies, entry


def _called(line: str) -> Iterator[str]:
    for names in re.findall(
        r"(?:body|calls|to_apply|branch_computations|true_computation|false_computation)=(\{[^}]*\}|%?[\w.\-]+)",
        line,
    ):
        yield from re.findall(r"[\w.\-]+", names)


def _collective(line: str) -> tuple[str, int]:
    """Return the kind of a collective and the bytes of what it returns; an empty kind for any other instruction."""
    found = re.match(rf"\s*(?:ROOT )?%?[\w.\-]+ = (.*?) ({'|'.join(KINDS)})(-start)?\(", line)
    if not found:
        return "", 0
    shapes = re.findall(r"(\w+)\[([\d,]*)\]", found[1])
    sizes = [BYTES.get(dtype, 4) * math.prod(int(n) for n in dims.split(",") if n) for dtype, dims in shapes]
    # Started and finished apart, it returns its operands too: the result is the second half.
    return found[2], sum(sizes[len(sizes) // 2 :] if found[3] and len(sizes) > 1 else sizes)


def figures_of(case: Case) -> dict[str, float]:
    """Return memory and collectives in GB, and the seconds to compile."""
    formula = {f"{name}, GB": size / 1e9 for name, size in case.formula.items()}
    traffic = {f"{kind}, GB": size / 1e9 for kind, (_, size) in case.collectives.items()}
    return {
        **formula,
        "sum, GB": sum(formula.values()),
        "state (XLA), GB": case.state / 1e9,
        "temporary (XLA), GB": case.temporaries / 1e9,
        **traffic,
        "compile, s": case.seconds,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["124M"])
    parser.add_argument("--devices", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--json", metavar="FILE", help="also write all figures to this file")
    options = parser.parse_args(arguments)
    if len(jax.devices()) < max(options.devices):
        # jax reads this once, when it starts.
        flags = f"{os.environ.get('XLA_FLAGS', '')} {FLAG}={max(DEVICES, *options.devices)}"
        if FLAG in os.environ.get("XLA_FLAGS", ""):
            raise SystemExit(f"{max(options.devices)} devices are needed, and XLA_FLAGS has {FLAG}")
        command = [sys.executable, "-m", "benchmarks.scaling", *(arguments or sys.argv[1:])]
        os.execve(sys.executable, command, os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"})
    cases = []
    for model in options.models:
        for devices in options.devices:
            for rules in options.rules if devices > 1 else ["DATA_PARALLEL"]:
                cases.append(compile_case(model, devices, rules))
                print(json.dumps(cases[-1]._asdict()), flush=True)
    harness.report_figures(
        "One device, one step",
        {f"{case.model}, {case.devices}, {case.rules}": figures_of(case) for case in cases},
        json_file=options.json,
    )


if __name__ == "__main__":
    main()
