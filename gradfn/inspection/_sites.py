"""`gf.sites`: the values of a function that can be inspected and patched."""

import functools
from collections.abc import Callable, Iterable

from jaxtyping import PyTree

from gradfn.core.models import function_of
from gradfn.core.signature import transform_of
from gradfn.display import ShowsTable, TextTable
from gradfn.inspection._inspect import Inspection
from gradfn.inspection.picture import si, svg, totals
from gradfn.jaxpr import Program, Site, find_sites, trace_as_written
from gradfn.jaxpr.costs import Costs, costs
from gradfn.jaxpr.interpreter import bodies


class SiteList(ShowsTable, list[Site]):
    """A list of sites that prints as a table, with what each costs; `svg` draws the program.

    Attributes:
        notes: which values it does not contain, and why.
    """

    notes: tuple[str, ...] = ()
    _program: Program | None = None

    @functools.cached_property
    def costs(self) -> Costs:
        """What the function costs at each site: FLOPs, and bytes saved for the backward pass.

        Each operation counts to the first site that is computed from it. `costs.flops` and `costs.saved` are dicts by
        the name of the site, with what follows the last site under `""`. A product counts 2 FLOPs per
        multiplication, everything elementwise 1 per element, a reduction 1 per element that it reads; loops are
        multiplied by their iterations. Saved are the arrays that `jax.vjp` of the jitted function keeps to
        differentiate it with respect to its first argument; the compiler may get by with less. Those that are
        arguments are under `"inputs"`.
        """
        return costs(self._program, self) if self._program is not None else Costs({}, {}, ())

    def svg(self, inspection: Inspection | None = None, *, depth: int | None = None) -> str:
        """Return a picture of the function as SVG: its sites folded by module, from its inputs to its result.

        Nodes show their FLOPs and the bytes they save for the backward pass. An edge stands for values that flow from
        one node to another; its width is the norm of the gradient at these values, on a logarithmic scale.

        Args:
            inspection: of the same function, `gf.inspect(f)(*args)`; without one, all edges have the same width.
            depth: how many parts of a module's path to show: 2 folds `blocks/0/attention/query` into `blocks/0`. None
                shows as much as fits in 44 nodes.

        Raises:
            ValueError: sites that were put together by hand, an inspection of another function, or a depth below 1.

        Example:
            >>> import jax, jax.numpy as jnp, gradfn as gf
            >>> net = gf.mlp([4, 3, 2])
            >>> loss, args = gf.classification_loss(net), (net.init(jax.random.key(0)), (jnp.ones(4), 1))
            >>> picture = gf.sites(loss)(*args).svg()
            >>> picture[:4], picture.count("<path")
            ('<svg', 6)
        """
        if self._program is None:
            raise ValueError("svg: these sites have no program: call svg on what gf.sites(f)(*args) returns")
        if depth is not None and depth < 1:
            raise ValueError(f"svg: depth must be an integer >= 1, got {depth}")
        gradients = None if inspection is None else inspection.grad_stats
        if gradients is not None and not set(gradients) <= set(self.names):
            raise ValueError(
                "svg: the inspection is of another function than the sites: use gf.inspect(f) of the same f"
            )
        return svg(self._program, self, self.costs, gradients, depth)

    @property
    def names(self) -> list[str]:
        """The names, in the order in which the function computes the values."""
        return [site.name for site in self]

    def table(self, rows: int | None = None) -> TextTable:
        """Return a table with one row per site."""
        empty = () if self else ("No sites: name a value with gf.tap(x, 'name').",)
        sums = [totals(self.costs)] if self.costs.flops else []
        out = TextTable(
            caption="\n".join([*empty, *number_note(self), *self.notes, *sums, *self.costs.notes])
        )
        out.add_column("site", shorten=True)
        out.add_column("shape")
        out.add_column("dtype", drop=5)
        out.add_column("activation", drop=3)
        out.add_column("source", drop=4)
        out.add_column("FLOPs", drop=2)
        out.add_column("saved", drop=1)
        out.add_column("line", shorten="line")
        for s in self:
            flops, saved = (
                si(cost[s.name], unit) if s.name in cost else ""
                for cost, unit in ((self.costs.flops, ""), (self.costs.saved, "B"))
            )
            out.add_row(s.name, shape_text(s), s.dtype, s.kind, s.source, flops, saved, short_line(s.line))
        return out.folded(rows, "sites.table()")


def number_note(sites: Iterable[Site]) -> list[str]:
    """Return a line that explains numbers behind names, where a name has one."""
    names = [site.name for site in sites]
    numbered = [
        name for name in names if name.rpartition(".")[2].isdigit() and name.rpartition(".")[0] in names
    ]
    if not numbered:
        return []
    base = numbered[0].rpartition(".")[0]
    return [
        f"{base}, {numbered[0]}, ...: the first value of that name in the order of computation, the second, ..."
    ]


def shape_text(site: Site) -> str:
    """Return a site's shape as text; the iterations of loops stand in front: `4 × [32, 16]`."""
    return "".join(f"{n} × " for n in site.axes) + str(list(site.shape))


def short_line(line: str) -> str:
    """Return a source line with no more of its file than the last folder: `linen/linear.py:294 (f)`."""
    file, _, rest = line.replace(".<locals>", "").partition(":")
    return ":".join(["/".join(file.split("/")[-2:]), rest])


def sites(f: Callable) -> Callable[..., SiteList]:
    """Return a function that lists the values inside `f` that can be inspected and patched by name.

    Args:
        f: any JAX function; its first argument counts as the parameters. Or a model: of one that holds its parameters
            (an Equinox or NNX module, a bound Linen module) the arguments are those of a call; a `gf.Net`, a Linen
            module and what `hk.transform` returns take the parameters first, as their `apply` does.

    Returns:
        A function of the same arguments (arrays, or anything that has a shape and dtype) that returns the
        sites in the order of computation, each with name, shape, dtype, source line, and which source named
        it: `name` (`gf.tap`), `scope` (`jax.named_scope`: the modules of Linen and Haiku) or
        `parameter` (the first place where the parameter of that path meets data). Nothing is computed. Of
        a function that returns `(scalar, aux)`, what only aux is computed from is not listed, except for
        values named with `gf.tap`: their gradient is zero.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from gradfn.inspection import sites
        >>> def f(params, x):
        ...     return jnp.sum(jnp.tanh(x @ params["W"] + params["b"]))
        >>> listed = sites(f)({"W": jnp.ones((3, 2)), "b": jnp.zeros(2)}, jnp.ones((5, 3)))
        >>> listed.names
        ['W', 'b', 'b:tanh']
        >>> listed[0].shape, listed[0].source
        ((5, 2), 'parameter')
    """

    function, first = function_of(f)

    @transform_of(f if first else function, "sites", own=0)
    def listed(*args: PyTree, **kwargs: PyTree) -> SiteList:
        """Return the sites of the function for these arguments."""
        program = trace_as_written(function, *first, *args, **kwargs)
        found = SiteList(find_sites(program))
        found.notes, found._program = tuple(_notes(found, program)), program
        return found

    return listed


def _notes(found: list[Site], program: Program) -> list[str]:
    equations = program.equations()
    opaque = [
        site.name
        for site in found
        if site.source == "parameter"
        and not site.kind
        and bodies(equations[site.path].eqn, enter_custom=True)[0] == "custom"
    ]
    notes = {
        "a function with its own derivative rule; the values inside it are not sites": opaque,
        "only aux is computed from it; its gradient is zero": [s.name for s in found if s.reaches == "aux"],
        "nothing is computed from it; use what gf.tap returns": [
            s.name for s in found if s.reaches == "nothing"
        ],
    }
    return [f"{', '.join(names)}: {note}" for note, names in notes.items() if names]
