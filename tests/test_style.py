"""Keep names, docstrings, comments, messages and pages in plain technical English, and docstrings in one quoting style.

`python tests/test_style.py [path ...]` prints what is found in the whole tree, or in the files and folders given.
"""

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ["gradfn", "tests", "."]  # each is one test; the last one is for all other folders
# History keeps its words, and this file has to spell what it bans.
EXEMPT = ["CHANGELOG.md", "LICENSE", "tests/test_style.py"]


class Text(NamedTuple):
    """A piece of a file: a `docstring`, `comment`, `string` or `name` of Python, its `source`, or a whole `page`."""

    kind: str
    text: str
    line: int


class Form(NamedTuple):
    """A banned form: a regular expression over the texts of some kinds, and what to write instead."""

    pattern: re.Pattern[str]
    instead: str
    kinds: tuple[str, ...]


PROSE = ("docstring", "comment", "string", "page")
STRINGS = ("string",)


def form(pattern: str, instead: str, kinds: tuple[str, ...] = PROSE) -> Form:
    """Compile a form; a space in its pattern also matches the line break of wrapped prose."""
    return Form(re.compile(re.sub(r" (?![*?+{])", r"\\s+", pattern), re.IGNORECASE), instead, kinds)


# A pattern includes as much context as it takes to separate the banned meaning from ordinary English: "there is no
# place for it" passes, `places` as a name does not.
FORMS = [
    # "where the NaN came from" is English; "expected 3, came 4" is not.
    form(r"\bcame\b(?! (from|before|after|first|last|in|to|with|out|back)\b)", "got", STRINGS),
    form(r"[,;:] (there )?came\b(?! from)", "got"),
    form(r"\bwhole numbers?\b", "integer"),
    form(r"\b(is|are|be) -?\d+ or more\b|\bfrom -?\d+ (up|on)\b(?!-)", "must be an integer >= N", STRINGS),
    form(r"\bmeant over\b|\bloss(es)? (is|are) meant\b", "averaged over"),
    form(r"\bprocessors?\b", "CPU (`core` for one of its cores)"),
    # "so many that" is English.
    form(r"\bso many\b(?! (\w+ )?that\b)", "N"),
    form(r"\bnumbers of (the|its|those|all) (\w+ )?(inputs|arguments|leaves|parameters|outputs)", "indices"),
    form(r"\bplaces? (of|in) (the|a|its|this) (program|jaxpr|equation|trace)", "equation"),
    form(r"\b(each|every|last|first|one|of) turns?\b|\bturns? of (a|the|its) (loop|scan|while)", "iteration"),
    form(r"\bwa(y|ys) back\b|\bbackward way\b|\bon (the|its) way\b", "path, backward pass, intermediate"),
    # A server answers, and questions are answered; a network returns its output.
    form(r"(?<!server\s)(?<!mirror\s)(?<!questions\s)\banswer(s|ed|ing)?\b", "returns; output, prediction"),
    form(r"\blook(s|ed|ing)? at\b", "inspect, show, examine"),
    form(r"\b(was|were|is|are|be) asked\b|\basked for\b", "requested"),
    form(r"\b(it|they|what was|what is) said\b|\bis said\b", "reported"),
    form(r"\btold\b", "reported, known, by default (for `unless told`)"),
    form(r"(?<!by\s)\bhand(s|ed|ing)? on\b", "pass through"),
    form(r"\b(go|goes|going|went|gone) on\b", "resume, continue"),
    form(r"\b(takes?|took|taken|taking) in\b", "accept, read"),
    form(r"\b(takes?|took|taken|taking) off\b", "subtract, remove"),
    form(r"\bbegin(s|ning|nings)?\b|\bbegan\b|\bbegun\b", "start"),
    form(r"\bin (the )?place of\b|\bin (its|their) place\b", "instead of"),
    form(r"\bof (itself|themselves)\b", "on its own"),
    form(r"\bby (itself|themselves)\b", "on its own, independently"),
    form(r"\bby heart\b", "memorized"),
    # "there is no X" and "is no longer" are English; "X is no Y" asks for "is not a Y".
    form(r"(?<!there\s)\b(is|are|was|were) no (?!longer|more|less|fewer|better|worse|larger|smaller|matter)\w+",
         "is not a ..."),
    form(r"\b(has|have|had) (?-i:none)\b", "has no ..."),
    form(r"\b(hold|holds|held|holding) no(ne)?\b", "does not contain"),
    form(r"\b(one|a) (row|column|line|value|panel|picture|map|name|logit|cell|array|scalar) an? (?!time\b)\w", "per"),
    form(r"\b(nats|bits|units|tokens|examples|steps|bytes|images|microseconds|ms) an? "
         r"(second|step|token|epoch|batch|update|example|class|character|value|call|chunk|node|row|line|run|symbol)\b",
         "per"),
    form(r"\AMake (a function|the (\w+ )?(gradients?|fall|mean|influence|sums?|norms?)\b)",
         "Return a function that computes ...", ("docstring",)),
    form(r"\bnets? of somebody else\b|\bsomebody\b", "another library, a user"),
    # jnp.floor and "noise floor" are the field's; rooms and floors of the architecture are not.
    form(r"\bthe house\b|\b(each|this|that|the|other|upper|lower) floors?\b|\bfloors below\b|\brooms\b", "layer"),
    form(r"\bthe note('s)?\b(?! of)|\bnote's\b", "the tutorial"),
    form(r"\b(is|of) paper\b|\bpaper \(0\)", "background"),
    form(r"(?-i:\bADDRESS\b)", "<repository-url>"),
    form(r"\bfor ever\b", "forever"),
    form(r"\bprocessor time\b", "CPU time"),
    # British spellings of what this code speaks of. (HTML's attribute `aria-labelledby` passes.)
    form(r"\b(normal|maxim|minim|random|initial|regular|optim|summar|visual|serial|generl|general|factor|token|organ|"
         r"recogn|real|memor|quant|util|parallel|standard|vector|symmetr|categor|linear|emphas|special|local)"
         r"is(e|es|ed|ing|ation|ations|er|ers|able)\b", "-ize"),
    form(r"\b(un|mis|re|pre)?(col|behavi|neighb|fav|hon|lab|hum)our(s|ed|ing|ful|able|ite|hood|less)?\b", "-or"),
    form(r"\b(cent|met|fib|theat|calib)re(s|d)?\b", "-er"),
    form(r"\b(un)?(label|model|travel|cancel|signal|channel|level|total|marshal|tunnel)l(ed|ing|er|ers)\b", "one l"),
    form(r"\bgrey(s|ed|scale)?\b|\bartefacts?\b|\bwhilst\b|\bamongst\b|\bcatalogues?\b|\bdialogues?\b|\bprogramme\b"
         r"|\banaly(se|ses|sed|sing)\b(?<!analyses)|\bjudgement\b|\btowards\b|\bafterwards\b|\bdefence\b|\blicence\b"
         r"|\bpractise\b|\bfulfil\b|\benrol\b|\bmemorised\b", "American spelling"),
    # Identifiers: the field's terms.
    form(r"\A(told|said|came|seen|drawn|places)\Z",
         "metadata, label, actual, inspection (`visited` of a walk), samples, equations", ("name",)),
    form(r"\bseen( = |\[[\"']|\.[a-z])", "inspection", ("docstring", "page", "comment")),
    # One quoting style.
    form(r"``", "`single` backticks", ("docstring", "comment")),
    # Formatting: a comment after a closing bracket, or beside the only line between two, spreads an expression.
    form(r"(?m)^ *[)\]}]+[:,]? {2}# (?!fmt:|noqa|type:).*", "the comment above the statement", ("source",)),
    form(r"(?m)[(\[{]\n.*[^ \n] {2}# (?!fmt:|noqa|type:).*\n *[)\]}]", "the comment above the statement", ("source",)),
]  # fmt: skip


def files(paths: list[str]) -> list[Path]:
    """Return the tracked and new files of Python, prose and pages below `paths`."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *paths]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    kinds = (".py", ".pyi", ".md", ".js", ".html", ".css")
    return [
        ROOT / name
        for name in names
        if name.endswith(kinds) and name not in EXEMPT and (ROOT / name).exists()
    ]


def texts(path: Path) -> Iterator[Text]:
    """Yield the texts of a file: a Python file's by kind, any other as one page."""
    source = path.read_text(encoding="utf-8")
    if path.suffix not in (".py", ".pyi"):
        # A comment's marks would stand between the words of a wrapped sentence.
        yield Text("page", re.sub(r"(?m)^(\s*)(//|\*|>)", lambda mark: " " * len(mark[0]), source), 1)
        return
    yield Text("source", source, 1)
    yield from comments(source)
    docstrings = set()
    for node in ast.walk(ast.parse(source)):  # a definition comes before its docstring
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                docstrings.add(id(first.value))
        yield from (Text("name", name, line) for name, line in names(node))
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield Text("docstring" if id(node) in docstrings else "string", node.value, node.lineno)


def comments(source: str) -> Iterator[Text]:
    """Yield each block of comments as one text, so that sentences are whole."""
    block: list[str] = []
    start = last = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line = token.start[0]
            if block and line != last + 1:
                yield Text("comment", "\n".join(block), start)
                block = []
            start = start if block else line
            block.append(token.string.lstrip("#"))
            last = line
    if block:
        yield Text("comment", "\n".join(block), start)


def names(node: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield the names that a node of a syntax tree binds."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id, node.lineno
    elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        yield node.name, node.lineno
    elif isinstance(node, ast.arg):
        yield node.arg, node.lineno
    elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        yield node.attr, node.lineno


def findings(paths: list[str]) -> list[str]:
    """Return what is banned in the files below `paths`: file:line, what was found, what to write."""
    found = []
    for path in files(paths):
        for text in texts(path):
            for banned in FORMS:
                if text.kind not in banned.kinds:
                    continue
                for match in banned.pattern.finditer(text.text):
                    line = text.line + text.text.count("\n", 0, match.start())
                    words = " ".join(match[0].split())
                    found.append((str(path.relative_to(ROOT)), line, text.kind, words, banned.instead))
    return [
        f"{path}:{line}: {kind} {words!r}: write {instead}"
        for path, line, kind, words, instead in sorted(found)
    ]


@pytest.mark.parametrize("part", PARTS)
def test_banned_forms_stay_out(part: str) -> None:
    others = PARTS[:-1] if part == PARTS[-1] else []
    found = findings([part, *(f":(exclude){path}" for path in others)])
    assert not found, "\n".join(found)


if __name__ == "__main__":
    for finding in (remaining := findings(sys.argv[1:] or ["."])):
        print(finding)
    sys.exit(bool(remaining))
