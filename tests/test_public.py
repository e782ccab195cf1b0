"""The public names: what `gf` and its namespaces show, and that all that users receive is among it."""

import inspect
import pkgutil
import re
import subprocess
import sys
import types
import typing
from importlib import import_module
from pathlib import Path

import pytest

import gradfn as gf

NAMESPACES = ("attribution", "circuits", "curvature", "data", "inspection", "layers", "per_example", "train")
# The contract; results and errors beside the functions that return or raise them.
FLAT = [
    *(
        "Param",
        "init",
        "count",
        "shapes",
        "table",
        "Net",
        "serial",
        "residual",
        "repeat",
        "ParameterError",
        "tap",
    ),
    *("mlp", "hidden_width", "cnn", "rnn", "gpt", "GPTConfig", "vit", "ViTConfig", "LanguageModel"),
    "RopeScaling",
    *("generate", "stream", "stack_blocks", "unstack_blocks", "load_pretrained", "save_pretrained"),
    *(
        "classification_loss",
        "regression_loss",
        "quadratic_loss",
        "next_token_loss",
        "batch_mean",
        "BatchMean",
        "Loss",
        "ExampleLoss",
        "accuracy",
    ),
    *("fit", "train_step", "train_state", "stalled", "Fit", "TrainState", "CheckpointError"),
    "report",
    *(
        "inspect",
        "capture",
        "sites",
        "patch",
        "backprop",
        "chain_rule",
        "nan_origin",
        "nan_guard",
        "check_grads",
    ),
    *(
        "Inspection",
        "Capture",
        "SiteList",
        "Backward",
        "ChainRule",
        "NanReport",
        "NanRecord",
        "GradCheck",
        "TextTable",
    ),
]
MISSPELLED = {
    "hvp": "gf.curvature.hvp",
    "per_example_norms": "gf.per_example.norms",
    "integrated_gradient": "gf.attribution.integrated_gradients",
    "clasification_loss": "gf.classification_loss",
}

# Bookkeeping inside pytrees that users carry along but do not read.
INTERNAL = {"_Info", "Found", "Spot", "Ticket", "Graph", "Rest"}


def namespaces():
    return [getattr(gf, name) for name in NAMESPACES]


def public():
    """Every public function and class, by its full name."""
    found = {f"gf.{name}": getattr(gf, name) for name in gf.__all__ if name not in NAMESPACES}
    for space in namespaces():
        found |= {f"{space.__name__.replace('gradfn', 'gf')}.{n}": getattr(space, n) for n in space.__all__}
    return found


def test_the_flat_names_are_those_of_the_contract():
    assert sorted(gf.__all__) == sorted([*FLAT, *NAMESPACES])
    assert dir(gf) == sorted(gf.__all__)
    for name in gf.__all__:
        assert getattr(gf, name) is not None
    assert gf.train is import_module("gradfn.train")


@pytest.mark.parametrize("name", NAMESPACES)
def test_a_namespace_shows_its_public_names_alone(name):
    space = getattr(gf, name)
    assert dir(space) == space.__all__ == sorted(space.__all__)
    assert all(getattr(space, each) is not None for each in space.__all__)


def test_dir_shows_every_name_before_first_use():
    assert set(gf.__all__) <= set(run("import gradfn; print(*dir(gradfn))").split())


@pytest.mark.parametrize("name", MISSPELLED)
def test_a_misspelled_name_gets_a_hint(name):
    message = f"module 'gradfn' has no attribute '{name}'. Did you mean {MISSPELLED[name]}"
    with pytest.raises(AttributeError, match=re.escape(message)):
        getattr(gf, name)


def test_a_misspelled_name_of_a_namespace_gets_a_hint():
    message = (
        "module 'gradfn.curvature' has no attribute 'hesian_eigs'. Did you mean gf.curvature.hessian_eigs"
    )
    with pytest.raises(AttributeError, match=re.escape(message)):
        getattr(gf.curvature, "hesian_eigs")  # noqa: B009


@pytest.mark.parametrize("module", [gf, gf.curvature])
@pytest.mark.parametrize("name", ["zzz", "a.b", "", "_x"])
def test_a_name_like_no_other_gets_no_hint(name, module):
    with pytest.raises(AttributeError, match=f"module '{module.__name__}' has no attribute '{name}'$"):
        getattr(module, name)


def test_importing_imports_nothing_else():
    code = "import sys, gradfn, gradfn.cli; print([name for name in ('jax', 'numpy', 'rich') if name in sys.modules])"
    assert run(code) == "[]\n"


def test_no_function_hides_the_module_of_its_name():
    for package in [gf, *map(import_module, subpackages())]:
        for module in pkgutil.iter_modules(package.__path__):
            if module.name == "__main__":
                continue
            full = f"{package.__name__}.{module.name}"
            assert getattr(package, module.name, sys.modules.get(full)) is sys.modules.get(full), full


def subpackages():
    return [m.name for m in pkgutil.walk_packages(gf.__path__, "gradfn.") if m.ispkg]


def test_every_public_name_has_a_docstring():
    for name, value in public().items():
        assert inspect.getdoc(value), name
        if isinstance(value, type):  # Python's own of a dataclass, `Eigs(values, vectors)`, does not count
            assert not inspect.getdoc(value).startswith(f"{value.__name__}("), name


def test_every_type_that_users_receive_is_public():
    values = public()
    classes = {value for value in values.values() if isinstance(value, type)}
    for name, value in values.items():
        for received in (*results_of(value), *fields_of(value)):
            for each in ours(received):
                assert each in classes or each.__name__ in INTERNAL, (
                    f"{name}: {each.__module__}.{each.__name__}"
                )


def results_of(value):
    return [typing.get_type_hints(value)["return"]] if isinstance(value, types.FunctionType) else []


def fields_of(value):
    if not isinstance(value, type) or issubclass(value, BaseException):
        return []
    return [hint for name, hint in typing.get_type_hints(value).items() if not name.startswith("_")]


def ours(annotation):
    """Every class of gradfn in an annotation: `Callable[..., Eigs]` has one."""
    if isinstance(annotation, type) and annotation.__module__.startswith("gradfn."):
        yield annotation
    for part in typing.get_args(annotation):
        for each in part if isinstance(part, list) else [part]:
            yield from ours(each)


def run(code):
    root = Path(gf.__file__).parents[1]
    return subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    ).stdout


def test_every_field_is_documented():
    for name, value in public().items():
        fields = getattr(value, "_fields", None) or getattr(value, "__dataclass_fields__", ())
        for field in fields:
            assert field.startswith("_") or re.search(rf"\b{field}\b", value.__doc__), f"{name}.{field}"
