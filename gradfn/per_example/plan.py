"""The plan behind `gf.per_example.norms`: a strategy per parameter, and one pass over the batch for most of them."""

import copy
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import PyTree

from gradfn.core.devices import explicit_spec
from gradfn.core.precision import is_narrow, widen
from gradfn.flatten import flat_products
from gradfn.jaxpr import Equation, interpret
from gradfn.jaxpr.interpreter import Evaluate, Path
from gradfn.jaxpr.varying import as_varying
from gradfn.jaxpr.views import Meeting, parameter_meetings
from gradfn.per_example.ghost import Measure, at, averaged, in_chunks, safest, weighted
from gradfn.per_example.strategies import FallBack, Found, Strategy, keeping, pairing, strategy_for
from gradfn.per_example.traced_loss import Arrays, TracedLoss


class Plan:
    """A strategy for each floating parameter, in order, and the pass over the batch that they share.

    Attributes:
        loss: the loss of one example, with its batch.
        strategies: one per floating parameter.
        fallback: the indices of those that the pass does not cover.
        is_narrow: whether any value is of less than 32 bits.
    """

    def __init__(self, loss: TracedLoss) -> None:
        self.loss = loss
        equations = loss.program.equations()
        meetings: dict[int, list[Meeting]] = {i: [] for i in loss.numbers}
        for meeting in parameter_meetings(loss.program):
            for i in meeting.leaves:
                # Aux has no gradient.
                if meeting.path or meeting.operand == 0:
                    meetings[i].append(meeting)
        pairs = zip(loss.numbers, loss.floating, strict=True)
        self.strategies = [
            strategy_for(i, x, meetings[number], equations) for i, (number, x) in enumerate(pairs)
        ]
        self.fallback = [s.parameter for s in self.strategies if isinstance(s, FallBack)]
        atoms = [atom for e in equations.values() for atom in (*e.eqn.invars, *e.eqn.outvars)]
        self.is_narrow = any(is_narrow(getattr(atom.aval, "dtype", bool)) for atom in atoms)

    @property
    def covered(self) -> list[int]:
        """The indices of the parameters that the pass covers."""
        return [s.parameter for s in self.strategies if s.parameter not in self.fallback]

    @property
    def _at(self) -> dict[Path, Strategy]:
        return {path: s for s in self.strategies for path in s.uses}

    @property
    def not_kept(self) -> list[int]:
        """The indices of the parameters whose weighted gradients cannot be summed after one pass."""
        # Examples that are split over explicit mesh axes are not merged into one product.
        split = self.loss.split is not None or any(map(explicit_spec, self.loss.floating))
        return [s.parameter for s in self.strategies if split or keeping(s) is None]

    def keeping(self) -> "Plan":
        """Return the plan that keeps what weighted gradients are summed from, of parameters that all can be kept."""
        plan = copy.copy(self)
        plan.strategies = [s for s in map(keeping, self.strategies) if s is not None]
        return plan

    def pairing(self) -> "Plan":
        """Return the plan that records inputs and cotangents, and computes the gradients of no parameter from them."""
        plan = copy.copy(self)
        plan.strategies = [pairing(s) for s in self.strategies]
        plan.fallback = []
        return plan

    def of(self, arrays: Arrays) -> "Plan":
        """Return the same plan for other arrays."""
        plan = copy.copy(self)
        plan.loss = self.loss.of(arrays)
        return plan

    def arguments(self, which: Iterable[int]) -> dict[int, jax.Array]:
        """Return the arrays that the pass differentiates with respect to, by parameter."""
        loss, out = self.loss, {}
        for i in which:
            argument = self.strategies[i].argument(loss.floating[i], loss.size)
            out[i] = loss.spread(argument) if self.strategies[i].copies else argument
        return out

    def tokens(self) -> dict[Path, jax.Array]:
        """Return the tokens of all uses: zeros whose gradients are what the strategies need."""
        out = {}
        for path, strategy in self._at.items():
            use = strategy.uses[path]
            out[path] = self.loss.of_all(strategy.token(use), use.equation.axes)
        return out

    def losses(
        self, arguments: dict[int, jax.Array], tokens: dict[Path, PyTree], stop: bool
    ) -> tuple[jax.Array, tuple[PyTree, dict[Path, PyTree]]]:
        """Return each example's loss, their aux and what is captured at the uses.

        With `stop`, no gradient reaches the parameters of which `found` returns the sum of gradients.
        """
        loss = self.loss
        equations = {path: strategy.uses[path].equation for path, strategy in self._at.items()}

        def one(
            arguments: dict[int, jax.Array],
            tokens: dict[Path, PyTree],
            zero: jax.Array,
            example: list[PyTree],
        ) -> tuple[PyTree, PyTree]:
            leaves = [arguments.get(i, leaf) for i, leaf in enumerate(loss.floating)]

            def visit(
                equation: Equation, evaluate: Evaluate, inputs: Sequence[PyTree], token: PyTree
            ) -> tuple[list[PyTree], PyTree]:
                return self._visit(stop, zero, equation, evaluate, inputs, token)

            inputs = loss.inputs(leaves, example)
            outs, captures = interpret(loss.program.jaxpr, visit, equations, inputs, tokens)
            value, aux = loss.outputs(outs)
            return value, (aux, captures)

        def all_of_them(
            arguments: dict[int, jax.Array], tokens: dict[Path, PyTree], batch: list[PyTree]
        ) -> tuple[PyTree, PyTree]:
            zeros = loss.of_all(jax.ShapeDtypeStruct((), jnp.result_type(float)))
            axes = {i: 0 if self.strategies[i].copies else None for i in arguments}
            return jax.vmap(one, (axes, 0, 0, 0))(arguments, tokens, zeros, batch)

        return flat_products(all_of_them)(arguments, tokens, loss.batch)

    def _visit(
        self,
        stop: bool,
        zero: jax.Array,
        equation: Equation,
        evaluate: Evaluate,
        inputs: Sequence[PyTree],
        token: PyTree,
    ) -> tuple[list[PyTree], PyTree]:
        strategy = self._at[equation.path]
        use = strategy.uses[equation.path]
        rule, V = use.rule, inputs[use.operand]
        left = lax.stop_gradient(rule.left(inputs))
        stopped = stop and strategy.makes_total
        averages = strategy.averages and not stopped
        if stopped or averages or strategy.is_folded(use, V):
            inputs = list(inputs)
            inputs[use.operand] = lax.stop_gradient(V)
        (y,) = evaluate(inputs)
        # Even where all examples look up the same rows, positions for instance, each has its own cotangent.
        y += zero.astype(y.dtype)
        if averages:
            y = averaged(rule, y, V, self.loss.size, left)
        y, capture = strategy.probed(use, y, V, token, left)
        return [y], capture

    def found(
        self,
        grads: Mapping[int, jax.Array],
        of_tokens: Mapping[Path, PyTree],
        captures: Mapping[Path, PyTree],
    ) -> tuple[dict[int, jax.Array], dict[int, Found]]:
        """Return the norms `[B]` of the covered parameters, and all that their strategies found."""
        recorded = {path: (token, captures.get(path)) for path, token in of_tokens.items()}
        found, norms, measures = {}, {}, {}
        for i in self.covered:
            of_one = self.strategies[i].found(self.loss.floating[i], grads[i], recorded, self.loss.size)
            if isinstance(of_one.norms, Measure):
                measures[i] = of_one.norms
            else:
                norms[i] = as_varying(of_one.norms, self.loss.varying)
            found[i] = of_one
        return norms | dict(zip(measures, safest(list(measures.values())), strict=True)), found

    def totals(self, grads: Mapping[int, jax.Array]) -> dict[int, jax.Array]:
        """Return the sums of the gradients over the batch, given what the pass computed."""
        return {i: self.strategies[i].total(g, self.loss.size) for i, g in grads.items()}


def fall_back(
    loss: TracedLoss, which: Sequence[int], chunk: int, weights: jax.Array | None = None
) -> tuple[dict[int, jax.Array], dict[int, jax.Array]]:
    """Return the norms `[B]`, and the sum of the gradients, of some parameters, by `vmap(grad)` of them.

    With weights `[B]`, they are those of the weighted gradients.
    """

    def of_one(example: list[PyTree]) -> list[PyTree]:
        def value(leaves: list[PyTree]) -> PyTree:
            floating = list(loss.floating)
            for i, leaf in zip(which, leaves, strict=True):
                floating[i] = leaf
            return loss.run(floating, example)[0]

        return [widen(g) for g in jax.grad(value)([loss.floating[i] for i in which])]

    def of_some(start: PyTree, count: int) -> list[PyTree]:
        grads = jax.vmap(of_one)([at(leaf, start, count) for leaf in loss.batch])
        return grads if weights is None else [weighted(g, at(weights, start, count)) for g in grads]

    sums, norms = in_chunks(of_some, loss.size, chunk, loss.split is not None)
    return dict(zip(which, norms, strict=True)), dict(zip(which, sums, strict=True))
