"""The rules of layer-wise relevance propagation, one per kind of equation.

The relevance of a value is the value times a *modified gradient* of the score. Each rule is the gradient that an
equation then has; where that is the ordinary gradient, as for all equations that only move or sum data, nothing is
changed. A rule also says what it *loses*: the relevance of the result that no operand gets, by cause.

Products with weights have the rules of Bach et al., 2015, and Montavon et al., 2019; softmaxes, products of values,
norms and activations those of Achtibat et al., *AttnLRP*, 2024.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from gradfn.attribution._attach import Losses, attach
from gradfn.attribution._modified import Explained
from gradfn.attribution._roles import EXTREMES, MOVES, POINTWISE, PRODUCTS, SUMS, Step
from gradfn.jaxpr import Equation, Site
from gradfn.jaxpr.interpreter import Evaluate, Path
from gradfn.jaxpr.users import RESULT, Users

RuleName = Literal["epsilon", "gamma", "z+"]
CAUSES = ("constants", "stabilizer", "softmax", "other_paths")
# They keep the order of the elements.
_SHAPES = {"reshape", "squeeze", "name", "copy", "convert_element_type"}


@dataclass(frozen=True)
class Product:
    """A product of data with weights: all of its terms, or those of one sign."""

    evaluate: Evaluate
    inputs: Sequence[PyTree]
    data: int
    weights: int

    def __call__(self, sign: int = 0) -> jax.Array:
        """Return the sum of the terms: all (0), the positive ones (1) or the negative ones (-1)."""
        if sign == 0:
            return self._with(self.inputs[self.data], self.inputs[self.weights])
        x, W = self.inputs[self.data], self.inputs[self.weights]
        parts = (jnp.maximum(W, 0), jnp.minimum(W, 0))[::sign]
        return self._with(jnp.maximum(x, 0), parts[0]) + self._with(jnp.minimum(x, 0), parts[1])

    def _with(self, x: jax.Array, W: jax.Array) -> jax.Array:
        inputs = list(self.inputs)
        inputs[self.data], inputs[self.weights] = x, W
        return self.evaluate(inputs)[0]


@dataclass(frozen=True)
class Layers:
    """The rule for products with weights, as in `gf.attribution.lrp`."""

    rule: RuleName
    epsilon: float
    gamma: float

    def of(self, y: jax.Array, product: Product, bias: jax.Array | None, tokens: PyTree) -> jax.Array:
        """Return a layer's output `y`, the product plus a bias, with the rule attached."""
        contributions, share = self._contributions(y, product, bias)
        total = contributions if share is None else contributions + share
        slope = _ratio(y, total, self.epsilon)
        lost = {"stabilizer": y - slope * total}
        if share is not None:
            lost["constants"] = slope * share
        return attach(y, contributions, slope, lost, tokens)

    def _contributions(
        self, y: jax.Array, product: Product, bias: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Return what the inputs and the bias contribute to the output, weighted as the rule wants."""
        if self.rule == "epsilon":
            return product().reshape(y.shape), bias
        raised = product(1).reshape(y.shape)
        if self.rule == "z+":
            return raised, None if bias is None else jnp.maximum(bias, 0)
        # Contributions of the sign of the output are raised.
        raised = jnp.where(y > 0, raised, product(-1).reshape(y.shape))
        total = product().reshape(y.shape) + self.gamma * raised
        if bias is None:
            return total, None
        return total, bias + self.gamma * jnp.where(y > 0, jnp.maximum(bias, 0), jnp.minimum(bias, 0))


def _ratio(y: jax.Array, total: jax.Array, epsilon: float) -> jax.Array:
    """Return y / total, with epsilon added to the magnitude of total; 0 where that is 0."""
    stable = total + jnp.where(total < 0, -epsilon, epsilon).astype(total.dtype)
    return jnp.where(stable == 0, 0, y / jnp.where(stable == 0, 1, stable))


class Call(NamedTuple):
    """One evaluation of a step: its inputs, and what the rules of a run share."""

    step: Step
    evaluate: Evaluate
    inputs: list[PyTree]
    rules: Rules

    def attached(self, y: jax.Array, slope: float | jax.Array, **lost: jax.Array) -> jax.Array:
        """Return `y` with its cotangent scaled, and what is lost recorded by cause."""
        return attach(y, y, jnp.asarray(slope, y.dtype), lost, self.rules.tokens)

    def onto(self, k: int, y: jax.Array, slope: jax.Array, **lost: jax.Array) -> jax.Array:
        """Return `y` as a function of operand k alone."""
        return attach(y, self.inputs[k], slope, lost, self.rules.tokens)

    def with_inputs(self, change: Callable[[int, PyTree], PyTree]) -> list[PyTree]:
        """Evaluate the step with floating operands changed."""
        pairs = enumerate(self.inputs)
        return self.evaluate([change(k, x) if k in self.step.floating else x for k, x in pairs])

    def without_gradient_to(self, *operands: int) -> jax.Array:
        return self.with_inputs(lambda k, x: jax.lax.stop_gradient(x) if k in operands else x)[0]


Rule = Callable[[Call], list[PyTree]]


@dataclass
class Rules:
    """The visitor that attaches the rules to the equations of a score.

    Attributes:
        by_path: the rule and the step of each equation that is not left alone.
        layers: the rule of products with weights.
        ends: by the path of such a product, where its bias is added.
        tokens: scalars by cause, whose gradients are what the rules lose.
        products: those of which the bias is yet to come, by the path where it comes.
    """

    by_path: dict[Path, tuple[Rule, Step]]
    layers: Layers
    ends: dict[Path, Path]
    tokens: PyTree
    products: dict[Path, Product] = field(default_factory=dict)

    def __call__(self, equation: Equation, evaluate: Evaluate, inputs: Sequence[PyTree]) -> list[PyTree]:
        """Return the outputs of an equation, with its rule attached."""
        rule, step = self.by_path[equation.path]
        return rule(Call(step, evaluate, list(inputs), self))


def rules_of(steps: dict[Path, Step], what: str) -> dict[Path, tuple[Rule, Step]]:
    """Return the rule of each step, without those whose ordinary gradient is the rule.

    Raises:
        ValueError: a step that has no rule.
    """
    found: dict[Path, tuple[Rule, Step]] = {}
    for path, step in steps.items():
        rule = _rule_of(step)
        if rule is None:
            raise ValueError(
                f"{what}: no rule for {step.name}, at {step.equation.line}. Write it with sums, products and "
                "functions of one number, or explain a site that comes after it: at='...'"
            )
        if rule is not _ordinary:
            found[path] = rule, step
    return found


def _rule_of(step: Step) -> Rule | None:
    name, live = step.name, step.live
    others = [step.operands[k] for k in step.floating if k not in live]
    if step.softmax:
        return _softmax
    if name in PRODUCTS:
        return _layer if others and others[0].constant else _product
    if name == "mul":
        return _ordinary if others and others[0].constant else _product
    if name == "div" and step.operands[1].constant:
        return _ordinary
    if name == "div":
        return _identity if others and others[0].constant else _quotient
    if name in POINTWISE:
        return _identity if len(live) == 1 and all(value.constant for value in others) else None
    if name in EXTREMES:
        one = _identity if all(value.number for value in others) else _extreme
        return _ordinary if not others else one if len(live) == 1 else None
    if name in ("add", "sub") and others and others[0].number:
        return _identity
    if name in MOVES | SUMS and not (name == "sort" and others):
        return _ordinary if all(value.zero for value in others) else _mixed
    return None


def _ordinary(call: Call) -> list[PyTree]:
    """Leave the gradient as it is: it shares the relevance of a sum among its terms, in proportion."""
    return call.evaluate(call.inputs)


def _mixed(call: Call) -> list[PyTree]:
    """Share a sum in proportion, of which only some terms get their share."""
    step, outs = call.step, call.evaluate(call.inputs)
    others = [k for k in step.floating if k not in step.live]
    causes = {k: "constants" if step.operands[k].constant else "other_paths" for k in others}
    of_cause = {cause: _terms(call, [k for k in others if causes[k] == cause]) for cause in causes.values()}
    return [
        call.attached(y, 1, **{cause: terms[i] for cause, terms in of_cause.items()})
        if _is_floating(y)
        else y
        for i, y in enumerate(outs)
    ]


def _terms(call: Call, operands: Sequence[int]) -> list[jax.Array]:
    """Return the outputs of a linear equation with all other floating operands set to 0."""
    eqn = call.step.equation.eqn
    arrays = [jnp.asarray(x, atom.aval.dtype) for x, atom in zip(call.inputs, eqn.invars, strict=True)]
    kept = [
        jnp.zeros_like(x) if k in call.step.floating and k not in operands else x
        for k, x in enumerate(arrays)
    ]
    outs = eqn.primitive.bind(*kept, **eqn.params)
    return list(outs) if eqn.primitive.multiple_results else [outs]


def _identity(call: Call) -> list[PyTree]:
    """Pass the relevance of a function of one number to that number."""
    (k,) = call.step.live
    x, y = call.inputs[k], call.without_gradient_to(k)
    # Relevance is the value times a gradient: that of 0 is 0.
    small = jnp.abs(x) < float(jnp.finfo(x.dtype).tiny) ** 0.5
    slope = jnp.where(small, 0, y / jnp.where(small, 1, x))
    return [call.onto(k, y, slope, stabilizer=jnp.where(small, y, 0))]


def _softmax(call: Call) -> list[PyTree]:
    """Take the first-order Taylor expansion of a softmax, which is its ordinary gradient."""
    y, x = call.evaluate(call.inputs)[0], call.inputs[0]
    # A masked score is infinite, its exponential 0.
    shares = {
        "exp": lambda: jnp.where(y == 0, 0, x * y),
        "log": lambda: jnp.ones_like(y),
        "div": lambda: jnp.zeros_like(y),
    }
    return [call.attached(y, 1, softmax=y - shares[call.step.name]())]


def _layer(call: Call) -> list[PyTree]:
    """Apply the rule of products with weights, once the bias is there."""
    path, (data,) = call.step.equation.path, call.step.live
    (weights,) = [k for k in call.step.floating if k != data]
    product, y = Product(call.evaluate, call.inputs, data, weights), call.without_gradient_to(data)
    if path in call.rules.ends:
        call.rules.products[call.rules.ends[path]] = product
        return [y]
    return [call.rules.layers.of(y, product, None, call.rules.tokens)]


def _bias(call: Call) -> list[PyTree]:
    """Apply the rule of a product with weights whose bias is added here."""
    product = call.rules.products.pop(call.step.equation.path)
    (bias,) = [x for k, x in enumerate(call.inputs) if k not in call.step.live]
    return [call.rules.layers.of(call.evaluate(call.inputs)[0], product, bias, call.rules.tokens)]


def _product(call: Call) -> list[PyTree]:
    """Give half to each of two factors that depend on the data, or all to one that is scaled."""
    step = call.step
    a, b = step.floating
    kinds = [step.operands[k].kind for k in (a, b)]
    if set(kinds) == {"data", "factor"}:
        return _scaled(call, step.floating[kinds.index("factor")])
    y, epsilon = call.evaluate(call.inputs)[0], call.rules.layers.epsilon
    # An elementwise product has one term, a matrix product a sum that may be close to 0.
    slope = _ratio(y, 2 * y, epsilon) if step.name in PRODUCTS else jnp.full_like(y, 0.5)
    return [call.attached(y, slope, **_halves(call, y, slope))]


def _quotient(call: Call) -> list[PyTree]:
    """Treat a quotient as the product with the reciprocal."""
    if [value.kind for value in call.step.operands] == ["data", "factor"]:
        return _scaled(call, 1)
    a, b = call.inputs
    y = call.without_gradient_to(0, 1)
    inverse = jax.lax.stop_gradient(1 / b)
    product = a * attach(inverse, b, inverse * inverse)
    lost = _halves(call, y, jnp.full_like(y, 0.5))
    return [attach(y, product, jnp.asarray(0.5, y.dtype), lost, call.rules.tokens)]


def _scaled(call: Call, factor: int) -> list[PyTree]:
    """Give all of a product to the operand that the factor scales: a norm is a constant."""
    y = call.without_gradient_to(factor)
    return [y if any(k != factor for k in call.step.live) else call.attached(y, 0, other_paths=y)]


def _halves(call: Call, y: jax.Array, slope: jax.Array) -> Losses:
    """Return what is lost where each of two operands gets `slope * y`, if it is live."""
    lost = {"stabilizer": y - 2 * slope * y}
    return lost if len(call.step.live) == 2 else lost | {"other_paths": slope * y}


def _extreme(call: Call) -> list[PyTree]:
    """Give all to the operand that is selected."""
    (k,) = call.step.live
    others = [value for i, value in enumerate(call.step.operands) if i != k]
    y, x = call.without_gradient_to(k), call.inputs[k]
    cause = "constants" if all(value.constant for value in others) else "other_paths"
    return [call.onto(k, y, (x == y).astype(y.dtype), **{cause: jnp.where(x == y, 0, y)})]


def _is_floating(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def fuse_biases(found: dict[Path, tuple[Rule, Step]], call: Explained) -> dict[Path, Path]:
    """Find where the bias of each product with weights is added, and let the rule of the layer apply there."""
    users, steps = Users(call.program.jaxpr.jaxpr), call.steps
    # What lies between a product and its bias is not seen by the rule, so a site there needs the two apart.
    site = call.source.path if isinstance(call.source, Site) else None
    ends: dict[Path, Path] = {}
    for path, (rule, step) in list(found.items()):
        end = _end(users, steps, step, site) if rule is _layer else None
        if end is not None and end not in ends.values():
            ends[path] = end
            found[end] = _bias, steps[end]
    return ends


def _end(users: Users, steps: dict[Path, Step], step: Step, site: Path | None) -> Path | None:
    """Return the path of the sum with a constant that is the only use of a product, up to its shape."""
    if any(frame.kind == "custom" for frame in step.equation.frames):
        return None
    path = step.equation.path
    while path != site:
        body, uses = users.body(path[:-1])
        of_it = uses.get(body.eqns[path[-1]].outvars[0], [])
        if len(of_it) != 1 or of_it[0] == RESULT:
            return None
        path = (*path[:-1], of_it[0])
        after = steps.get(path)
        if after is None:
            return None
        if after.name == "add":
            others = [value for k, value in enumerate(after.operands) if k not in after.live]
            return path if others and others[0].constant and not others[0].number else None
        if after.name not in _SHAPES:
            return None
    return None
