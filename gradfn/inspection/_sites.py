"""`gf.sites`: the values of a function that can be inspected and patched."""

from collections.abc import Callable, Iterable

from jaxtyping import PyTree

from gradfn.core.signature import transform_of
from gradfn.display import ShowsTable, TextTable
from gradfn.jaxpr import Program, Site, find_sites, trace_as_written
from gradfn.jaxpr.interpreter import bodies


class SiteList(ShowsTable, list[Site]):
    """A list of sites that prints as a table; `notes` explain which values it does not contain, and why."""

    notes: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """The names, in the order in which the function computes the values."""
        return [site.name for site in self]

    def table(self, rows: int | None = None) -> TextTable:
        """Return a table with one row per site."""
        empty = () if self else ("No sites: name a value with gf.tap(x, 'name').",)
        out = TextTable(caption="\n".join([*empty, *number_note(self), *self.notes]))
        out.add_column("site", shorten=True)
        out.add_column("shape")
        out.add_column("dtype", drop=3)
        out.add_column("activation", drop=2)
        out.add_column("source", drop=1)
        out.add_column("line", shorten=True)
        for s in self:
            out.add_row(s.name, shape_text(s), s.dtype, s.kind, s.source, short_line(s.line))
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
        f: any JAX function; its first argument counts as the parameters.

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

    @transform_of(f, "sites", own=0)
    def listed(*args: PyTree, **kwargs: PyTree) -> SiteList:
        """Return the sites of the function for these arguments."""
        program = trace_as_written(f, *args, **kwargs)
        found = SiteList(find_sites(program))
        found.notes = tuple(_notes(found, program))
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
