"""The memory that loading pretrained weights takes: the peak of a process above its start, relative to the parameters.

    python -m benchmarks.loading                 # as in README.md

A random Llama of 99 million parameters is written in float32 and in bfloat16, in one file and in shards. Each is loaded
by a process of its own, after a small model. The peak counts pages of mapped files, as `VmHWM` of Linux does. What
loading takes once in a process, whatever the size (the compiler's code, compiled programs), is not counted.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

import gradfn as gf
from benchmarks import harness

PARAMETERS = "the parameters"

CHILD = """
import json, pathlib, re, sys
import jax, jax.numpy as jnp, gradfn as gf

def memory(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])

def load(folder):
    before = memory("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # start the peak anew
    _, params = gf.load_pretrained(folder, dtype)
    jax.block_until_ready(params)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    return size, memory("VmHWM") - before

folder, small, dtype = sys.argv[1:]
(jnp.zeros([3]) + 1).block_until_ready()
load(small)  # what it takes once
print(json.dumps(load(folder)))
"""


def write(folder: Path, width: int, n_layers: int, vocab: int, dtype: str, shards: int = 1) -> None:
    """Write a random Llama."""
    config = gf.GPTConfig(
        vocab=vocab,
        context=128,
        n_layers=n_layers,
        n_heads=8,
        width=width,
        hidden=3 * width,
        positions="rope",
        norm="rms",
        feed="swiglu",
        bias=False,
        tied=False,
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), dtype), gf.gpt(config).spec)
    gf.save_pretrained(folder, config, params)
    if shards > 1:
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        where = {
            name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(tensors)
        }
        for file in sorted(set(where.values())):
            save_file({name: tensors[name] for name in tensors if where[name] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def measure(width: int, n_layers: int, vocab: int) -> dict[str, dict[str, float]]:
    """Return the peak in MB of each way of loading, by files and by the dtype of the parameters."""
    figures: dict[str, dict[str, float]] = {PARAMETERS: {}}
    with tempfile.TemporaryDirectory() as folder:
        # Its embedding is large enough to be read in parts, so that all that is compiled is compiled for it.
        small = Path(folder) / "small"
        write(small, 64, 1, 32768, "float32")
        for name, stored, shards, dtypes in (
            ("one file of float32", "float32", 1, ["float32"]),
            ("four files of float32", "float32", 4, ["float32"]),
            ("one file of bfloat16", "bfloat16", 1, ["float32", "bfloat16"]),
        ):
            target = Path(folder) / f"{stored}-{shards}"
            write(target, width, n_layers, vocab, stored, shards)
            for dtype in dtypes:
                command = [sys.executable, "-c", CHILD, str(target), str(small), dtype]
                output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                size, peak = json.loads(output)
                figures[PARAMETERS][f"as {dtype}, MB"] = size / 1e6
                figures.setdefault(name, {})[f"as {dtype}, MB"] = peak / 1e6
    return figures


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--vocab", type=int, default=16384)
    parser.add_argument("--json", metavar="FILE", help="also write the table to this file")
    options = parser.parse_args(arguments)
    figures = measure(options.width, options.layers, options.vocab)
    aims = {name: dict.fromkeys(row, 1.2) for name, row in figures.items() if name != PARAMETERS}
    harness.report_figures(
        "Memory while pretrained weights are loaded", figures, PARAMETERS, aims=aims, json_file=options.json
    )


if __name__ == "__main__":
    main()
