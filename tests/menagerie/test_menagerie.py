"""Whether what gradfn says of a network is right for every architecture that can be built here.

All layers and nets of gradfn, the layers and examples of Equinox, Flax Linen, Flax NNX and Haiku, each in a dozen
contexts (`contexts`), the losses of optax, and random programs over the primitives of `jax.lax` (`random_programs`).
For each of them four properties are compared with something that does not use gradfn (`check`). A sample runs with all
other tests; all of them run with `pytest -m "attack and not optimized" tests/menagerie`. How many held is printed at
the end.
"""

import functools
import importlib
import re
import zlib

import jax
import numpy as np
import pytest

import gradfn as gf
from tests.menagerie import contexts, random_programs
from tests.menagerie.by_hand import traced
from tests.menagerie.check import PROPERTIES, check

PROGRAMS = 400
# All are run in parts, each of which takes a minute or so.
PARTS = 80

# What gradfn refuses, with the reason: by property, a pattern of its error.
REFUSED = {
    "norms": {
        "there is no floating parameter": "nothing to take the norm of",
        # Not understood yet: `vmap(grad)` of the same loss works. It raises, and returns nothing wrong.
        "Transpose rule .* for 'stop_gradient' not implemented": "a cholesky and a sort in branches in a custom_jvp",
    },
}

# Other libraries warn and promote as they please.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def theirs(x64):
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def family(module):
    """Return the names and builders of a module's cases."""
    if module == "random_programs":
        return {
            f"random {seed}": functools.partial(random_programs.program, seed) for seed in range(PROGRAMS)
        }
    cases = {}
    for name, make in importlib.import_module(f"tests.menagerie.{module}").LAYERS.items():
        layer = functools.cache(make)
        for context in contexts.names(name):
            cases[f"{name}, {context}"] = lambda args=(name, layer, context): _in_context(*args)
    return cases


def _in_context(name, layer, context):
    return contexts.case(name, layer(), context)


FAMILIES = {"build": (14, ()), "losses": (6, ()), "random_programs": (10, ())}
FAMILIES["frameworks"] = (14, ("equinox", "flax", "haiku"))


@pytest.fixture
def tally(request, record_property):
    """Return a function that checks cases, prints each failure, and fails if there is one."""

    def run(builders):
        held, tried, refused, failures = dict.fromkeys(PROPERTIES, 0), dict.fromkeys(PROPERTIES, 0), [], []
        for name, build in builders.items():
            try:
                case = build()
            except Exception as error:
                failures.append(f"{name}: is not built: {type(error).__name__}: {error!s:.300}")
                continue
            # A layer that does not fit into a context.
            if case is None:
                continue
            for what, error in check(case).items():
                if error and any(re.search(pattern, error) for pattern in REFUSED.get(what, ())):
                    refused.append((name, what))
                    continue
                tried[what] += 1
                held[what] += error is None
                if error:
                    failures.append(f"{case.name}: {what}: {error:.600}")
        for what in PROPERTIES:
            record_property("menagerie", (what, tried[what], held[what]))
        record_property("menagerie", ("refused, as listed", len(refused), len(refused)))
        assert not failures, "\n".join(failures)

    return run


def select(name, n):
    """Return n cases of a family, evenly, the same ones in each run."""
    builders = family(name)
    names = sorted(builders, key=lambda name: zlib.crc32(name.encode()))
    return {name: builders[name] for name in names[:n]}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_sample(name, tally):
    n, libraries = FAMILIES[name]
    for library in libraries:
        pytest.importorskip(library)
    tally(select(name, n))


@pytest.mark.slow
@pytest.mark.attack
@pytest.mark.parametrize("part", range(PARTS))
def test_all(part, tally):
    every = {}
    for name, (_, libraries) in FAMILIES.items():
        for library in libraries:
            pytest.importorskip(library)
        every |= family(name)
    names = list(every)[part::PARTS]
    tally({name: every[name] for name in names})
    jax.clear_caches()


def test_values_in_linen_are_those_that_linen_itself_captures():
    """By the scopes of its modules: in a transformer, an autoencoder and a network of convolutions."""
    pytest.importorskip("flax")
    models = importlib.import_module("tests.menagerie.frameworks")
    tokens, floats = models.TOKENS, models.floats
    cases = (
        (models.LinenLM(), tokens, 11),
        (models.LinenVAE(), floats(4), 5),
        (models.LinenCNN(), floats(4, 4, 1), 4),
    )
    for model, x, least in cases:
        keys = {"params": jax.random.key(0), "noise": jax.random.key(1)}
        params = {"params": model.init(keys, x)["params"]}
        f = lambda p, x, model=model, keys=keys: model.apply(p, x, rngs=keys)  # noqa: E731
        captured = traced(gf.capture(f, keep=None), params, x)(params, x)
        _, state = model.apply(params, x, rngs=keys, capture_intermediates=True, mutable=["intermediates"])
        flat = jax.tree_util.tree_leaves_with_path(state["intermediates"])
        theirs = {
            "/".join([type(model).__name__, *[e.key for e in path[:-2]]]): value for path, value in flat
        }
        same = [name for name in theirs if name in captured]
        assert len(same) >= least, f"{sorted(theirs)} in {list(captured)}"
        for name in same:
            np.testing.assert_allclose(captured[name].value, theirs[name], rtol=1e-5, atol=1e-6)


def test_every_public_layer_of_the_frameworks_is_there_or_listed():
    for library in FAMILIES["frameworks"][1]:
        pytest.importorskip(library)
    frameworks = importlib.import_module("tests.menagerie.frameworks")
    for framework, classes in frameworks.public_classes().items():
        names = " ".join(name for name in frameworks.LAYERS if name.startswith(framework))
        missing = [c for c in classes if c not in frameworks.OTHERS[framework] and c not in names]
        assert not missing, f"{framework}: no entry for {missing}"


def test_every_loss_of_optax_is_there():
    losses = importlib.import_module("tests.menagerie.losses")
    assert losses.public_losses() == sorted(losses.LOSSES)
