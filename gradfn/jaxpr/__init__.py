"""The one transform behind all inspection: run a traced program with a visitor at chosen equations.

The protocol, in four steps::

    program = trace(f, *args)                   # any function -> a jaxpr, its inputs, its output tree
    chosen  = {path: e for path, e in program.equations().items() if ...}    # nested equations too
    outs, captures = interpret(program.jaxpr, visit, chosen, program.inputs, tokens)
    result  = program.rebuild(outs)             # the outputs in the tree that f returned

`visit(equation, evaluate, inputs, token) -> (outputs, capture)` replaces one chosen equation.
`evaluate(inputs)` computes what the equation computes; the visitor may change its inputs and its outputs.
Nothing else in the program changes. *Tokens go in, captures come out*: one pytree per equation, keyed by its
path. Neither has side effects, so the whole can be differentiated, compiled, batched and scanned like any
other function.

The containers around an equation determine the shape of its tokens and captures:

- `scan`: a leading axis over the iterations (tokens sliced, captures stacked), outer scans first.
- `shard_map`: a leading axis over the devices.
- `cond`: the captures of a branch that did not run are zeros; put a 1 in a capture to know which one ran.
- `while`: the captures of the last iteration (or `merge(old, new)`); tokens stay the same. Under `vmap`,
  rows that have finished repeat their own last iteration while others run.
- `jit`: inlined if it contains a chosen equation (sharding constraints are kept), otherwise left alone.
- `remat`: rebuilt with its policy; names inside still reach the policy.
- `custom_jvp`, `custom_vjp`: one equation each, unless `equations(enter_custom=True)`.

A *probe* makes a cotangent visible: `probe(summary, x, token)` is `x`, and the gradient of the token is
`summary(cotangent of x)`. Differentiate the interpreted program with respect to its tokens, and the
statistics of every cotangent come out of the same backward pass that computes the gradients.
"""

from gradfn.jaxpr._probe import probe
from gradfn.jaxpr.interpreter import Equation, evaluate, interpret, walk
from gradfn.jaxpr.program import Program, trace, trace_as_written, trace_without_probabilities
from gradfn.jaxpr.sites import (
    Site,
    Use,
    find_sites,
    find_sites_and_order,
    parameter_uses,
    select,
)

__all__ = [
    "Equation",
    "Program",
    "Site",
    "Use",
    "evaluate",
    "find_sites",
    "find_sites_and_order",
    "interpret",
    "parameter_uses",
    "probe",
    "select",
    "trace",
    "trace_as_written",
    "trace_without_probabilities",
    "walk",
]
