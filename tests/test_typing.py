"""The installed wheel is typed: a script of a user passes `mypy --strict`, and mistakes in it are found."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("mypy")

ROOT = Path(__file__).parents[1]
SCRIPT = """
import jax
import jax.numpy as jnp

import gradfn as gf

data = gf.data.digits()
net: gf.Net = gf.mlp([784, 16, 10])
loss = gf.classification_loss(net)
mean = gf.batch_mean(loss)
optimizer = gf.train.adamw_warmup_cosine(10)
fitted: gf.Fit = gf.fit(mean, net.init(jax.random.key(0)), data.train, optimizer, 10)
batch = jax.tree.map(jnp.asarray, data.train)

inspection = gf.inspect(mean)(fitted.params, batch)
print(inspection.grads["W1"].shape, inspection)
eigs: gf.curvature.Eigs = gf.curvature.hessian_eigs(mean, k=2)(fitted.params, batch, key=jax.random.key(1))
print(eigs.values.max(), eigs.vectors["W1"])
norms: gf.per_example.ExampleNorms = gf.per_example.norms(loss)(fitted.params, batch)
saliency: jax.Array = gf.attribution.saliency(net.apply, target=3)(fitted.params, batch[0][0])
report: gf.NanReport = gf.nan_origin(mean)(fitted.params, batch)
steps: list[str] = [step.operation for step in gf.backprop(mean)(fitted.params, batch)]


def of_layers(layer: gf.Net) -> gf.Net:
    return gf.serial(first=gf.layers.dense(4, 3), then=gf.residual(layer))
"""
MISTAKES = """
import gradfn as gf

gf.fitt
gf.curvature.hvpp
gf.mlp("784")
gf.curvature.hessian_eigs(lambda w: w, k=1)(1.0).value
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A fresh environment with the wheel in it; what gradfn needs comes from this one."""
    folder = tmp_path_factory.mktemp("installed")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", folder, ROOT]
    built = subprocess.run(build, capture_output=True, text=True)
    if built.returncode:
        pytest.skip(f"no wheel could be built: {built.stderr.strip().splitlines()[-1:]}")
    venv.create(folder / "env", symlinks=True)
    base = {"base": str(folder / "env"), "platbase": str(folder / "env")}
    packages = Path(sysconfig.get_path("purelib", "venv", base))
    (wheel,) = folder.glob("gradfn-*.whl")
    zipfile.ZipFile(wheel).extractall(packages)
    (packages / "needed.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "env" / "bin" / "python"


def check(python, folder, script):
    file = folder / "script.py"
    file.write_text(script)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--python-executable",
        python,
        "--cache-dir",
        folder,
        file,
    ]
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")
    }
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_a_script_passes_mypy_strict(installed, tmp_path):
    found = check(installed, tmp_path, SCRIPT)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.slow
def test_mistakes_are_found(installed, tmp_path):
    found = check(installed, tmp_path, MISTAKES)
    lines = [line.split(": ", 1)[1] for line in found.stdout.splitlines() if ": error: " in line]
    assert [line.rpartition("[")[2] for line in lines] == [
        "attr-defined]",
        "attr-defined]",
        "arg-type]",
        "attr-defined]",
    ]
