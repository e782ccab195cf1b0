"""Activation patching of a GPT-2-sized model at every layer and position, or head, against TransformerLens.

    python -m benchmarks.circuits                       # 12 layers, 12 heads, width 768, 16 tokens
    python -m benchmarks.circuits --tokens 32 --rounds 5

Both patch the same random weights, and their results are compared before anything is timed. TransformerLens runs the
model once per patch, through the hooks of its bridge to Hugging Face's GPT-2 in eager mode (its
`get_act_patch_resid_pre` and `get_act_patch_attn_head_out_all_pos`). `circuits.patch_sweep` is compiled once; its
first call, with the compilation, is reported on its own, and how many patched runs of TransformerLens take as long.
The vocabulary is small, so that blocks dominate. PyTorch gets as many threads as there are CPUs.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

import gradfn as gf
from benchmarks import harness
from gradfn.jaxpr import Site

OURS, THEIRS = "gradfn", "TransformerLens"
# Relative to the largest effect of a patch.
TOLERANCE = 1e-3
# A third of the time.
AIM = 1 / 3


class Sweep(NamedTuple):
    """What to patch, and under which name TransformerLens does so."""

    over: str
    sites: Callable[[Site], bool]
    theirs: str


def is_stream(site: Site) -> bool:
    """Tell whether a site is the residual stream before or behind a block."""
    return site.name == "embedded" or site.name.endswith("/residual")


SWEEPS = (
    Sweep("layer x position", is_stream, "get_act_patch_resid_pre"),
    Sweep("layer x head", lambda site: site.name.endswith("/mixed"), "get_act_patch_attn_head_out_all_pos"),
)


class Task(NamedTuple):
    """A model and a pair of inputs."""

    config: gf.GPTConfig
    params: Any
    clean: np.ndarray
    corrupt: np.ndarray


def task_of(config: gf.GPTConfig) -> Task:
    """Return a model with random weights and two random sequences."""
    params = gf.gpt(config).init(jax.random.key(0))
    rng = np.random.default_rng(0)
    clean, corrupt = rng.integers(0, config.vocab, [2, config.context])
    return Task(config, params, clean, corrupt)


def metric(logits: Any) -> Any:
    """Return a difference of two logits at the last position; `logits` are `[T, vocab]`, of jax or PyTorch."""
    return logits[-1, 3] - logits[-1, 5]


def ours(task: Task, sweep: Sweep) -> Callable[[], np.ndarray]:
    """Return the sweep as a function of nothing: the metrics, compiled in the first call."""
    net = gf.gpt(task.config)
    # TransformerLens patches the stream before each block.
    last = f"blocks/{task.config.n_layers - 1}/residual"

    @jax.jit
    def patched(params: Any, clean: jax.Array, corrupt: jax.Array) -> jax.Array:
        return gf.circuits.patch_sweep(
            net.apply,
            (params, clean),
            (params, corrupt),
            metric,
            over=sweep.over,
            sites=lambda site: sweep.sites(site) and site.name != last,
        ).metric

    return lambda: np.asarray(patched(task.params, task.clean, task.corrupt))


def theirs(task: Task) -> Callable[[Sweep], Callable[[], np.ndarray]]:
    """Return, for each sweep, what TransformerLens does for it.

    Raises:
        ImportError: torch, transformers or transformer_lens is not installed.
    """
    # No part of this needs the network.
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    import transformers
    from transformer_lens import patching
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    torch.set_num_threads(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as folder:
        gf.save_pretrained(folder, task.config, task.params)
        model = transformers.GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager").eval()
    bridge = build_bridge_from_module(model, "GPT2LMHeadModel", hf_config=model.config).eval()
    clean, corrupt = (torch.tensor(tokens)[None] for tokens in (task.clean, task.corrupt))
    # Without its progress bar.
    patching.tqdm = lambda rows: rows

    def of(sweep: Sweep) -> Callable[[], np.ndarray]:
        run = getattr(patching, sweep.theirs)

        def patched() -> np.ndarray:
            with torch.no_grad():
                _, cache = bridge.run_with_cache(clean)
                return run(bridge, corrupt, cache, lambda logits: metric(logits[0])).numpy()

        return patched

    return of


def contender(run: Callable[[], np.ndarray]) -> harness.Contender:
    """Return a function that runs a sweep and returns the number of patched runs in it."""
    return lambda: float(run().size)


def compare(task: Task, sweep: Sweep, runs: dict[str, Callable[[], np.ndarray]]) -> None:
    """Raise a SystemExit if the contenders' results differ."""
    results = {name: run() for name, run in runs.items()}
    expected = results[OURS]
    baseline = float(metric(gf.gpt(task.config).apply(task.params, task.corrupt)))
    size = np.abs(expected - baseline).max()
    for name, result in results.items():
        if result.shape != expected.shape or not np.abs(result - expected).max() <= TOLERANCE * size:
            raise SystemExit(f"{sweep.over}: {name} and {OURS} disagree: {result} and {expected}")


def main(arguments: list[str] | None = None) -> None:
    parser = harness.arguments((__doc__ or "").partition("\n")[0], rounds=5)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=16, help="length of the sequences (%(default)s)")
    parser.add_argument("--vocab", type=int, default=5000)
    parser.add_argument(
        "--only", nargs="+", choices=[sweep.over for sweep in SWEEPS], help="only these sweeps"
    )
    options = parser.parse_args(arguments)
    task = task_of(gf.GPTConfig(options.vocab, options.tokens, options.layers))
    makers, skipped = harness.available(lambda _: theirs(task), [THEIRS])
    packages = (*harness.PACKAGES, "torch", "transformers", "transformer-lens")
    if skipped:
        skipped[THEIRS] += ": pip install torch transformers transformer-lens"
    for sweep in SWEEPS:
        if options.only and sweep.over not in options.only:
            continue
        runs = {OURS: ours(task, sweep)} | {name: make(sweep) for name, make in makers.items()}
        began = time.perf_counter()
        runs[OURS]()
        first = time.perf_counter() - began
        compare(task, sweep, runs)
        contenders = {name: contender(run) for name, run in runs.items()}
        timings = harness.race(contenders, options.rounds, warmup=1)
        title = f"Patching {sweep.over}, {options.layers} layers, {options.tokens} tokens"
        settings = {"skipped": skipped, "packages": packages, "json_file": options.json}
        baseline = THEIRS if THEIRS in runs else OURS
        aims = {OURS: AIM} if THEIRS in runs else {}
        harness.report(title, timings, baseline, "patched runs", aims=aims, **settings)
        figures = {"first call, s": first}
        if THEIRS in runs:
            figures["worth, patched runs of TransformerLens"] = first / statistics.median(
                timings[THEIRS].wall
            )
        harness.report_figures(f"{title}: compilation", {OURS: figures}, **settings)


if __name__ == "__main__":
    main()
