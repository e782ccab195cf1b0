"""The one transform that all inspection stands on: run a traced program with a visitor at chosen equations.

The protocol, in five steps::

    program = trace(f, *args)                   # any function -> a jaxpr, its inputs, its output tree
    places  = walk(program.jaxpr)               # every equation, nested ones too, each named by its path
    chosen  = {p.path: p for p in places if ...}
    outs, captures = interpret(program.jaxpr, visit, chosen, program.inputs, tokens)
    result  = program.rebuild(outs)             # the outputs in the tree that f returned

``visit(place, evaluate, inputs, token) -> (outputs, capture)`` stands in for one chosen equation.
``evaluate(inputs)`` does what the equation does; the visitor may change what goes in and what comes out.
Nothing else of the program changes. *Tokens go in, captures come out*, each a pytree per place, keyed by its
path, and neither has side effects; so the whole can be differentiated, compiled, batched and scanned like any
other function.

The containers that an equation sits in shape its tokens and captures:

- ``scan``: a leading axis over the iterations (tokens sliced, captures stacked), outer scans first.
- ``shard_map``: a leading axis over the devices.
- ``cond``: the captures of a branch that did not run are zeros; put a 1 in a capture to know which ran.
- ``while``: captures of the last iteration only (or ``merge(old, new)``); tokens stay the same. Under ``vmap``,
  rows that have finished repeat their own last iteration as long as others run.
- ``jit``: inlined where a chosen equation is inside (sharding constraints kept), else left alone.
- ``remat``: rebuilt with its policy; names inside still reach the policy.
- ``custom_jvp``, ``custom_vjp``: one equation each, unless ``walk(..., enter_custom=True)``.

A *probe* makes a cotangent visible: ``probe(summary, x, token)`` is ``x``, and the gradient of the token is
``summary(cotangent of x)``. Differentiate the interpreted program with respect to its tokens and the
statistics of every cotangent come out of the same backward pass that computes the gradients.
"""

from gradfn.jaxpr._probe import probe
from gradfn.jaxpr.interpreter import Place, evaluate, interpret, walk
from gradfn.jaxpr.program import Program, trace, trace_as_written
from gradfn.jaxpr.sites import Site, Use, find_sites, parameter_order, parameter_uses, select

__all__ = [
    "Place",
    "Program",
    "Site",
    "Use",
    "evaluate",
    "find_sites",
    "interpret",
    "parameter_order",
    "parameter_uses",
    "probe",
    "select",
    "trace",
    "trace_as_written",
    "walk",
]
