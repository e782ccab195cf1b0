"""The memory that loading pretrained weights takes: the peak of a process above its start, relative to the parameters.

    python benchmarks/loading.py [MB] > loading.json

A random Llama of about 400 MB is written in float32 and in bfloat16, in one file and in shards. Each is loaded by a
process of its own. The peak counts pages of mapped files, as `VmHWM` of Linux does.
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

folder, small, dtype = sys.argv[1:]
dtype = None if dtype == "None" else dtype
gf.load_pretrained(small, dtype)  # imports and compiles what is needed
before = memory("VmRSS")
pathlib.Path("/proc/self/clear_refs").write_text("5")  # start the peak anew
_, params = gf.load_pretrained(folder, dtype)
jax.block_until_ready(params)
size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print(json.dumps({"size": size, "ratio": (memory("VmHWM") - before) / size}))
"""


def write(folder: Path, megabytes: float, dtype: str, shards: int) -> None:
    """Write a random Llama of a size."""
    import jax.numpy as jnp
    import numpy as np
    from safetensors.numpy import load_file, save_file

    import gradfn as gf

    width = max(8, int(64 * (megabytes / 400) ** 0.5)) * 8
    config = gf.GPTConfig(
        vocab=32 * width,
        context=128,
        n_layers=14,
        n_heads=8,
        width=width,
        hidden=3 * width,
        positions="rope",
        norm="rms",
        feed="swiglu",
        bias=False,
        tied=False,
    )
    import jax

    rng = np.random.default_rng(0)
    spec = gf.gpt(config).spec
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), dtype), spec)
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


def measure(megabytes: float) -> dict[str, dict[str, float]]:
    """Return the size and the ratio of each way of loading."""
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "small", 1, "float32", 1)
        for stored, shards in (("float32", 1), ("float32", 4), ("bfloat16", 1)):
            target = Path(folder) / f"{stored}-{shards}"
            write(target, megabytes, stored, shards)
            for dtype in ("float32", "None"):
                if (stored, dtype) == ("float32", "None"):
                    continue
                command = [sys.executable, "-c", CHILD, str(target), str(Path(folder) / "small"), dtype]
                output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                results[f"{stored} in {shards} file(s), loaded as {dtype}"] = json.loads(output)
    return results


if __name__ == "__main__":
    print(json.dumps(measure(float(sys.argv[1]) if len(sys.argv) > 1 else 400), indent=2))
