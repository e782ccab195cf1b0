"""The memory that loading pretrained weights takes: the peak of a process above its start, relative to the parameters.

    python benchmarks/loading.py > loading.json

A random Llama of 99 million parameters is written in float32 and in bfloat16, in one file and in shards. Each is loaded
by a process of its own, after a small model. The peak counts pages of mapped files, as `VmHWM` of Linux does. What
loading takes once in a process, whatever the size (the compiler's code, compiled programs), is `once_mb`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

CHILD = """
import json, pathlib, re, sys
import jax, jax.numpy as jnp, gradfn as gf

def memory(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])

def load(folder):
    before = memory("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # start the peak anew
    _, params = gf.load_pretrained(folder, None if dtype == "None" else dtype)
    jax.block_until_ready(params)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    return size, memory("VmHWM") - before

folder, small, dtype = sys.argv[1:]
(jnp.zeros([3]) + 1).block_until_ready()
size, peak = load(small)
once = peak - size
size, peak = load(folder)
print(json.dumps({"parameters_mb": size / 1e6, "peak_ratio": peak / size, "once_mb": once / 1e6}))
"""


def write(folder: Path, width: int, n_layers: int, vocab: int, dtype: str, shards: int = 1) -> None:
    """Write a random Llama."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from safetensors.numpy import load_file, save_file

    import gradfn as gf

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


def measure() -> dict[str, dict[str, float]]:
    """Return the memory of each way of loading."""
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        # Its embedding is large enough to be read in parts, so that all that is compiled is compiled for it.
        small = Path(folder) / "small"
        write(small, 64, 1, 32768, "float32")
        for stored, shards, dtypes in (
            ("float32", 1, ["float32"]),
            ("float32", 4, ["float32"]),
            ("bfloat16", 1, ["float32", "None"]),
        ):
            target = Path(folder) / f"{stored}-{shards}"
            write(target, 512, 24, 16384, stored, shards)
            for dtype in dtypes:
                command = [sys.executable, "-c", CHILD, str(target), str(small), dtype]
                output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                results[f"{stored}, files: {shards}, loaded as {dtype}"] = json.loads(output)
    return results


if __name__ == "__main__":
    print(json.dumps(measure(), indent=2))
