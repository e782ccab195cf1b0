"""The cost of Kronecker factors, gradfn against curvlinops on the same weights and images.

    python -m benchmarks.kfac                    # empirical Fisher and Gauss-Newton, K-FAC and EK-FAC
    python -m benchmarks.kfac --only K-FAC

The net is 784-256-10 with sigmoid nodes, on 512 of the built-in digits, in one batch. Before the timing the factors of
both are compared: they differ by at most 1e-5 of the largest element. A call computes all factors (K-FAC), or the
eigenvectors and corrected eigenvalues (EK-FAC); gradfn's is one compiled program, curvlinops runs PyTorch's operations
one by one, with all threads. The baseline is gradfn.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import gradfn as gf
from benchmarks import harness
from benchmarks.curvature import counted

NET = gf.mlp([784, 256, 10])
ORDER = ("W1", "b1", "W2", "b2")
N = 512
TOLERANCE = 1e-5


def ours(kind: str, fisher: str, params: Any, batch: Any) -> Callable[[], Any]:
    """Return the function that computes gradfn's result."""
    make = gf.curvature.kfac if kind == "K-FAC" else gf.curvature.ekfac
    source = (gf.classification_loss(NET),) if fisher == "empirical Fisher" else (NET.apply, "softmax")
    curvature = jax.jit(make(*source, batch_size=N))
    return lambda: curvature(params, batch)


def theirs(kind: str, fisher: str, params: Any, batch: Any) -> Callable[[], Any]:
    """Return the function that computes curvlinops' result, an operator whose factors are known."""
    import curvlinops
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    model = torch.nn.Sequential(torch.nn.Linear(784, 256), torch.nn.Sigmoid(), torch.nn.Linear(256, 10))
    for weight, name in zip(model.parameters(), ORDER, strict=True):
        weight.data = torch.from_numpy(np.array(params[name]))
    data = torch.from_numpy(np.array(batch[0])), torch.from_numpy(np.array(batch[1])).long()
    make = curvlinops.KFACLinearOperator if kind == "K-FAC" else curvlinops.EKFACLinearOperator

    def solve() -> Any:
        operator = make(
            model,
            torch.nn.CrossEntropyLoss(),
            list(model.parameters()),
            [data],
            fisher_type="empirical" if fisher == "empirical Fisher" else "type-2",
            check_deterministic=False,
            num_data=N,
            num_per_example_loss_terms=1,
        )
        operator.compute_kronecker_factors()
        if kind == "EK-FAC":
            operator.compute_eigenvalue_correction()
        return operator

    return solve


def difference(found: Any, operator: Any) -> float:
    """Return the largest difference of the factors, relative to the largest element of each."""
    pairs = []
    for module, name in (("0", "W1"), ("2", "W2")):
        block = found.blocks[name]
        pairs += [(block.first[0], operator._gradient_covariances[module])]
        pairs += [(block.second[0], operator._input_covariances[module])]
    arrays = [(np.asarray(a), b.detach().numpy()) for a, b in pairs]
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in arrays)


def _make(made: dict[str, Callable], settings: tuple[Any, ...], name: str) -> Callable[[], Any]:
    return made[name](*settings)


def main() -> None:
    """Compare the factors, then the times."""
    parser = harness.arguments(__doc__.partition("\n")[0], rounds=11)
    parser.add_argument("--only", choices=("K-FAC", "EK-FAC"))
    options = parser.parse_args()
    images, labels = gf.data.digits().train
    batch = jnp.asarray(images[:N]), jnp.asarray(labels[:N])
    params = NET.init(jax.random.key(0))
    for kind in ("K-FAC", "EK-FAC") if options.only is None else (options.only,):
        for fisher in ("empirical Fisher", "Gauss-Newton matrix"):
            made = {"gradfn": ours, "curvlinops": theirs}
            settings = (kind, fisher, params, batch)
            ready, skipped = harness.available(partial(_make, made, settings), made)
            if kind == "K-FAC" and not skipped:
                apart = difference(ready["gradfn"](), ready["curvlinops"]())
                print(f"factors of the {fisher} differ by {apart:.1e} of the largest element")
                if not apart <= TOLERANCE:
                    raise SystemExit(
                        f"kfac: expected factors that differ by at most {TOLERANCE:g}, got {apart:.1e}"
                    )
            timings = harness.race({name: counted(solve) for name, solve in ready.items()}, options.rounds)
            harness.report(
                f"{kind} of the {fisher}, 784-256-10 on {N} digits",
                timings,
                "gradfn",
                "calls",
                skipped=skipped,
                packages=(*harness.PACKAGES, "torch", "curvlinops-for-pytorch"),
                json_file=options.json,
            )


if __name__ == "__main__":
    main()
