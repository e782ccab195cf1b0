"""One of the processes of test_processes.py: it trains small networks, and writes what came out as JSON."""

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradfn as gf

STEPS, BATCH, EXAMPLES = 40, 16, 128
NET = gf.mlp([8, 16, 4])
LOSS = gf.batch_mean(gf.classification_loss(NET))


def examples():
    """Return inputs `[EXAMPLES, 8]` and labels."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(EXAMPLES, 8)).astype(np.float32), rng.integers(0, 4, EXAMPLES)


def norm(params):
    return {"norm": sum(jnp.abs(leaf).sum() for leaf in jax.tree.leaves(params))}


def train(mesh, data, params=None, **options):
    """Train; return the losses, the parameters as lists, and a hash of their bits."""
    params = NET.init(jax.random.key(0)) if params is None else params
    settings = {"batch_size": BATCH, "mesh": mesh, "eval_every": 4, "evaluate": norm} | options
    fitted = gf.fit(LOSS, params, data, optax.adam(1e-2), STEPS, **settings)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(gf.train.gathered(fitted.params))]
    bits = hashlib.sha256(b"".join(leaf.tobytes() for leaf in leaves)).hexdigest()
    rows = [{name: row[name] for name in ("step", "loss", "norm")} for row in fitted.history]
    inspections = [row["step"] for row in fitted.inspections]
    return {
        "rows": rows,
        "params": [leaf.tolist() for leaf in leaves],
        "bits": bits,
        "inspections": inspections,
    }


def host_batch(first, n):
    """Return a function of the step that makes `n` rows of the step's batch, from `first`."""
    inputs, labels = examples()
    where = lambda step: (np.arange(first, first + n) + step * BATCH) % EXAMPLES  # noqa: E731
    return lambda step: (inputs[where(step)], labels[where(step)])


def failing(params, batch):
    """A loss that is not finite: the biases start from 0."""
    return LOSS(params, batch) + jnp.log(jnp.abs(params["b1"]).sum())


def main(address, n, i, out, todo):
    gf.train.initialize(
        address, n, i, timeout=120, heartbeat_seconds=15 if todo.get("folder") == "SIGKILL" else 100
    )
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    found = {}
    if "arrays" in todo:
        found["arrays"] = train(mesh, examples(), inspect_every=20)
    if "host" in todo:
        found["host"] = train(mesh, gf.train.from_host(host_batch(0, BATCH)))
        rows = BATCH // n
        found["local"] = train(mesh, gf.train.from_host(host_batch(i * rows, rows), local=True))
    if "split" in todo:
        params = NET.init(jax.random.key(0), shardings=gf.train.shardings(NET.spec, mesh, gf.train.FSDP))
        found["split"] = train(None, examples(), params)
        for name, few in {
            "none": None,
            "few": jax.make_mesh((1,), ("data",), devices=jax.devices()[:1]),
        }.items():
            try:
                train(few, examples())
            except ValueError as error:
                found[name] = str(error)
    if "nan" in todo:
        try:
            gf.fit(failing, NET.init(jax.random.key(0)), examples(), optax.sgd(0.1), 4, mesh=mesh)
        except FloatingPointError as error:
            found["nan"] = str(error).partition("\n")[0]
    if "folder" in todo:
        end, folder = todo["folder"], Path(todo["path"])

        def evaluate(params):
            evaluate.n += 1
            if end and i == 1 and evaluate.n == 4:
                os.kill(os.getpid(), getattr(signal, end))
            return norm(params)

        evaluate.n = 0
        options = {"folder": folder, "resume": True, "checkpoint_seconds": 0.0, "evaluate": evaluate}
        if todo.get("sharded"):
            params = NET.init(jax.random.key(0), shardings=gf.train.shardings(NET.spec, mesh, gf.train.FSDP))
            found["folder"] = train(None, examples(), params, keep_every=20, **options)
            kept = gf.train.kept(folder, like=params)
            found["kept"] = {step: float(norm(params)["norm"]) for step, params in kept.items()}
        else:
            found["folder"] = train(mesh, examples(), inspect_every=20, **options)
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], json.loads(sys.argv[5]))
