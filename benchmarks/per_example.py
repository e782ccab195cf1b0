"""The cost of per-example norms and of the mean of clipped gradients, relative to the gradient of the batch.

    python -m benchmarks.per_example                # all nets, in JAX; PyTorch's libraries on the MLP
    python -m benchmarks.per_example --only MLP     # one of MLP, GPT-12, GPT-12-scanned, GPT-64, LSTM, CNN
    python -m benchmarks.per_example --malloc kept  # the process keeps freed memory (`gf.train.keep_freed_memory`)

The MLP is 784-256-256-10 at batch size 64; the GPT has 4 layers, 4 heads, width 128, 64 tokens, a tied head, at batch
sizes 12 and 64; the LSTM has 128 units over 64 tokens at batch size 32; the CNN has two layers of 8 and 16 channels
on 28x28 images at batch size 64. The baseline is the gradient of the batch alone,
`jax.value_and_grad(gf.batch_mean(loss))`. All others return it too, with the norm of every example's gradient; their
results are compared before the timing. Those that clip do it at a bound above all norms, in the same time as at
any other. A ratio of 0.9 means 1/0.9 of the baseline's time. Peak temporary memory is what XLA plans for the call.
Where it exceeds 32 MiB and the baseline's does not, as for the LSTM, glibc by default returns it to the system after
each call and the baseline's not, which takes half as long as the work: `--malloc kept` compares the work of gradfn's.

jax_privacy (DeepMind) clips the gradients of `vmap(grad)`; Opacus runs a second backward pass over weighted losses.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import gradfn as gf
from benchmarks import harness
from gradfn.train import keep_freed_memory

PLAIN, TORCH = "batch gradient", "PyTorch: batch gradient"
KEY = jax.random.key(0)
Case = tuple[Callable, Any, Any]  # the loss of one example, parameters, a batch


def classified(net: gf.Net, *shape: int) -> Case:
    images = jax.random.normal(KEY, shape), jnp.arange(shape[0]) % 10
    return gf.classification_loss(net), net.init(KEY), images


def read(net: gf.Net, batch: int, length: int = 64, vocab: int = 65) -> Case:
    text = jax.random.randint(KEY, (batch, length + 1), 0, vocab)
    return gf.next_token_loss(net), net.init(KEY), (text[:, :-1], text[:, 1:])


def gpt(**settings: Any) -> gf.Net:
    sizes: dict[str, Any] = {"vocab": 65, "context": 64, "n_layers": 4, "n_heads": 4, "width": 128}
    return gf.gpt(gf.GPTConfig(**sizes, bias=False, feed="gelu_exact", **settings))


NORMS, CLIPPED = "gf.per_example.norms", "gf.per_example.clipped_grads"
# How many times the time of the batch gradient they may take.
AIMS = {
    "MLP": {CLIPPED: 1.05},
    "GPT-12": {CLIPPED: 1.10},
    "GPT-64": {CLIPPED: 1.10},
    "LSTM": {NORMS: 1.05, CLIPPED: 1.15},
}
# They compute all gradients, which takes 100 times as long for the MLP.
SLOW = ("vmap(grad)", "jax_privacy", "PyTorch: torch.func")
# Above all norms.
BOUND = 1e9
CASES: dict[str, Callable[[], Case]] = {
    "MLP": lambda: classified(gf.mlp([784, 256, 256, 10], "relu"), 64, 784),
    "GPT-12": lambda: read(gpt(), 12),
    "GPT-12-scanned": lambda: read(gpt(scan=True), 12),
    "GPT-64": lambda: read(gpt(), 64),
    "LSTM": lambda: read(gf.rnn(65, 128, "lstm"), 32),
    "CNN": lambda: classified(gf.cnn(channels=[8, 16]), 64, 28, 28, 1),
}


def norms(loss: Callable) -> Callable:
    """Return gradient and norms by `gf.per_example.norms`."""

    def run(params: Any, batch: Any) -> Any:
        result = gf.per_example.norms(loss)(params, batch)
        return result.grads, result.total

    return run


def clipped(loss: Callable) -> Callable:
    """Return the same by `gf.per_example.clipped_grads`."""

    def run(params: Any, batch: Any) -> Any:
        result = gf.per_example.clipped_grads(loss, BOUND)(params, batch)
        return result.grads, result.total

    return run


def jax_privacy(loss: Callable) -> Callable:
    """Return the same by `jax_privacy.clipping.clipped_grad`."""
    from jax_privacy import clipping

    def run(params: Any, batch: Any) -> Any:
        grads_of = clipping.clipped_grad(
            loss,
            l2_clip_norm=BOUND,
            normalize_by=len(jax.tree.leaves(batch)[0]),
            keep_batch_dim=False,
            return_grad_norms=True,
        )
        grads, aux = grads_of(params, batch)
        return grads, aux.grad_norms

    return run


def every_gradient(loss: Callable) -> Callable:
    """Return the same by `vmap(grad)`: all gradients, then their norms and their mean."""

    def run(params: Any, batch: Any) -> Any:
        grads = jax.vmap(jax.grad(loss), (None, 0))(params, batch)
        squares = [jnp.sum(jnp.square(g.reshape(g.shape[0], -1)), 1) for g in jax.tree.leaves(grads)]
        return jax.tree.map(lambda g: g.mean(0), grads), jnp.sqrt(sum(squares))

    return run


def ghost_by_hand(params: Any, batch: Any) -> Any:
    """Compute the same for the MLP, with its forward and backward pass written out."""
    x, labels = batch
    n, inputs, slopes = len(x), [], []
    layers = range(1, len(params) // 2 + 1)
    for i in layers:
        inputs.append(x)
        z = x @ params[f"W{i}"].T + params[f"b{i}"]  # [batch, out]
        slopes.append((z > 0).astype(z.dtype))
        x = jax.nn.relu(z)
    g = jax.nn.softmax(z) - jax.nn.one_hot(labels, z.shape[1], dtype=z.dtype)
    grads: dict[str, jax.Array] = {}
    squares = jnp.zeros(n)
    for i in reversed(layers):
        a = inputs[i - 1]
        of_bias = jnp.sum(g * g, 1)
        squares += of_bias * jnp.sum(a * a, 1) + of_bias  # |a|^2 |g|^2 of W, |g|^2 of b
        grads |= {f"W{i}": g.T @ a / n, f"b{i}": g.mean(0)}
        if i > 1:
            g = g @ params[f"W{i}"] * slopes[i - 2]
    return grads, jnp.sqrt(squares)


Torch = Callable[[], Any]  # returns the norm of each example's gradient


def torch_mlp(params: Any) -> Any:
    import torch
    from torch import nn

    layers: list[Any] = []
    for i in range(1, len(params) // 2 + 1):
        W, b = (torch.from_numpy(np.array(params[f"{name}{i}"])) for name in "Wb")
        layer = nn.Linear(W.shape[1], W.shape[0])
        layer.weight, layer.bias = nn.Parameter(W), nn.Parameter(b)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def torch_plain(params: Any, x: Any, labels: Any) -> Torch:
    from torch import nn

    model = torch_mlp(params)

    def run() -> None:
        model.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(x), labels).backward()

    return run


def torch_func(params: Any, x: Any, labels: Any) -> Torch:
    import torch
    from torch import nn

    model = torch_mlp(params)
    leaves = {name: p.detach() for name, p in model.named_parameters()}

    def loss(leaves: Any, x: Any, label: Any) -> Any:
        logits = torch.func.functional_call(model, leaves, (x[None],))
        return nn.functional.cross_entropy(logits, label[None])

    grads_of = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))

    def run() -> Any:
        grads = grads_of(leaves, x, labels)
        _ = {name: g.mean(0) for name, g in grads.items()}
        return torch.stack([g.flatten(1).square().sum(1) for g in grads.values()]).sum(0).sqrt()

    return run


def opacus(params: Any, x: Any, labels: Any) -> Torch:
    from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import (
        GradSampleModuleFastGradientClipping as GhostModule,
    )
    from torch import nn

    model = GhostModule(torch_mlp(params), max_grad_norm=1.0, use_ghost_clipping=True)

    def run() -> Any:
        model.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(x), labels).backward()
        return model.get_norm_sample()

    return run


def clipped_by_opacus(params: Any, x: Any, labels: Any, bound: float) -> tuple[Any, Torch]:
    """Return the model, and a function that leaves the sum of its clipped gradients in `grad` of its parameters."""
    import torch
    from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import (
        GradSampleModuleFastGradientClipping as GhostModule,
    )
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
    from torch import nn

    model = GhostModule(torch_mlp(params), max_grad_norm=bound, use_ghost_clipping=True)
    settings: dict[str, Any] = {"max_grad_norm": bound, "expected_batch_size": len(x)}
    sgd = torch.optim.SGD(model.parameters())
    optimizer = DPOptimizerFastGradientClipping(sgd, noise_multiplier=0.0, **settings)
    criterion = DPLossFastGradientClipping(model, optimizer, nn.CrossEntropyLoss())

    def run() -> Any:
        optimizer.zero_grad(set_to_none=True)
        criterion(model(x), labels).backward()
        return model.get_norm_sample()

    return model, run


def opacus_clipping(params: Any, x: Any, labels: Any) -> Torch:
    return clipped_by_opacus(params, x, labels, BOUND)[1]


def backpack(params: Any, x: Any, labels: Any) -> Torch:
    import torch
    from backpack import backpack, extend
    from backpack.extensions import BatchL2Grad
    from torch import nn

    model, loss = extend(torch_mlp(params)), extend(nn.CrossEntropyLoss())

    def run() -> Any:
        model.zero_grad(set_to_none=True)
        with backpack(BatchL2Grad()):
            loss(model(x), labels).backward()
        # These are gradients of the mean: 1/n of each example's gradient.
        return len(x) * torch.stack([p.batch_l2 for p in model.parameters()]).sum(0).sqrt()

    return run


TORCHES = {
    TORCH: torch_plain,
    "PyTorch: torch.func": torch_func,
    "Opacus, ghost norms": opacus,
    "Opacus, ghost clipping": opacus_clipping,
    "BackPACK, BatchL2Grad": backpack,
}


WAYS = {NORMS: norms, CLIPPED: clipped, "vmap(grad)": every_gradient, "jax_privacy": jax_privacy}


def compiled(name: str) -> tuple[dict[str, Callable], dict[str, str], dict[str, str]]:
    """Return the compiled contenders of a case, the temporary memory of each, and why others are skipped."""
    loss, params, batch = CASES[name]()
    ways, skipped = harness.available(lambda way: WAYS[way](loss), WAYS)
    ways |= {PLAIN: jax.value_and_grad(gf.batch_mean(loss))}
    ways |= {"ghost by hand": ghost_by_hand} if name == "MLP" else {}
    runs: dict[str, Callable] = {}
    memory = {}
    for way, f in ways.items():
        run: Any = jax.jit(f).lower(params, batch).compile()
        memory[way] = f"{run.memory_analysis().temp_size_in_bytes / 1e6:.1f} MB"
        runs[way] = run
    agree(runs, params, batch)
    return {way: lambda run=run: run(params, batch) for way, run in runs.items()}, memory, skipped


def agree(runs: dict[str, Callable], params: Any, batch: Any) -> None:
    """Raise unless all contenders return the same gradient and the same norms."""
    _, gradient = runs[PLAIN](params, batch)
    every = runs["vmap(grad)"](params, batch)[1]
    for way, run in runs.items():
        if way != PLAIN:
            grads, total = run(params, batch)
            np.testing.assert_allclose(total, every, rtol=1e-4, err_msg=way)
            for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(gradient), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-5, err_msg=way)


def torches(expected: Any) -> tuple[dict[str, Torch], dict[str, str]]:
    """Return the PyTorch libraries that are installed, and why others are skipped."""
    _, params, (x, labels) = CASES["MLP"]()

    def checked(name: str) -> Torch:
        import torch

        make = TORCHES[name]
        run = make(params, torch.from_numpy(np.array(x)), torch.from_numpy(np.array(labels)).long())
        if name != TORCH:
            np.testing.assert_allclose(run().detach().numpy(), expected, rtol=1e-4, err_msg=name)
        return run

    return harness.available(checked, TORCHES)


def counted(run: Callable, calls: int) -> harness.Contender:
    """Return the contender that calls `run` several times and waits for the last result."""

    def contender() -> float:
        for _ in range(calls):
            out = run()
        jax.block_until_ready(out)
        return calls

    return contender


def main() -> None:
    parser = harness.arguments(__doc__, rounds=15)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="only these cases")
    parser.add_argument("--malloc", choices=["default", "kept"], default="default", help="freed memory")
    options = parser.parse_args()
    if options.malloc == "kept" and not keep_freed_memory():
        parser.error("only glibc can keep freed memory")
    for name in options.only:
        runs, memory, skipped = compiled(name)
        if options.malloc == "kept":
            # The memory of others would leave holes in the heap that are too small for the next contender.
            runs = {way: run for way, run in runs.items() if way == PLAIN or way.startswith("gf.")}
        calls = 50 if name == "MLP" else 2
        compete(name, runs, PLAIN, calls, options, skipped, AIMS.get(name))
        print("temporary memory:", ", ".join(f"{way} {size}" for way, size in memory.items()))
        if name == "MLP" and options.malloc == "default":
            # A separate table: threads of PyTorch keep a core busy for a while after each call.
            theirs, skipped = torches(runs["vmap(grad)"]()[1])
            if TORCH in theirs:
                compete(f"{name}, in PyTorch", theirs, TORCH, calls, options, skipped)
            else:
                print("PyTorch's libraries: skipped,", skipped[TORCH])


def compete(
    title: str,
    runs: dict[str, Callable],
    baseline: str,
    calls: int,
    options: Any,
    skipped: dict[str, str] | None = None,
    aims: dict[str, float] | None = None,
) -> None:
    """Time the contenders and report."""
    contenders = {way: counted(run, 1 if way in SLOW else calls) for way, run in runs.items()}
    timings = harness.race(contenders, options.rounds)
    harness.report(
        title if options.malloc == "default" else f"{title}, freed memory kept",
        timings,
        baseline,
        "steps",
        aims=aims,
        skipped=skipped,
        packages=(*harness.PACKAGES, "jax-privacy", "torch", "opacus", "backpack-for-pytorch"),
        json_file=options.json,
    )


if __name__ == "__main__":
    main()
