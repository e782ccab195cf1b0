"""The recipes of docs/finetuning.md are short; `tests/test_docs.py` runs them."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "finetuning.md"
LINES = 15


def test_every_recipe_has_at_most_fifteen_lines():
    sections = re.split(r"^## (.+)\n", PAGE.read_text(), flags=re.MULTILINE)[1:]
    recipes = dict(zip(sections[::2], sections[1::2], strict=True))
    assert len(recipes) >= 9
    for name, section in recipes.items():
        blocks = re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
        assert len(blocks) == 1, name
        lines = [line for line in blocks[0].splitlines() if line.strip()]
        assert len(lines) <= LINES, f"{name}: {len(lines)} lines"
